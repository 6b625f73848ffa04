"""The configs of Qwen2.5-7B on the field's own files, through a served judge: what the README's "Real models" tells, with a tiny model.

Only the model, the judge's endpoint, and budgets differ from a real run.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import places
import pytest
from scripted_server import ScriptedServer, ok
from tiny import conversation, save_tiny_model, write_jsonl

from rlsafe.cli import main

pytestmark = pytest.mark.slow
CONFIGS = places.CONFIGS / "qwen2.5-7b"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random Qwen2 whose byte tokenizer makes rows long: one token a character."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192)


@pytest.fixture
def small(model, judge_server) -> list[str]:
    judge = {"kind": "openai", "model": judge_server.model, "base_url": judge_server.base_url}
    return [
        f"model.name={model}", "model.dtype=float32", "optim.kind=adamw", "batch.micro_rows=null",
        "sampler.kind=transformers", "grpo.max_tokens=12", "data.safe.preset=null", "data.safe.source=rlsafe:benign",
        "track.every=0", f"evaluate.judge={json.dumps(judge)}", "evaluate.samples=1", "evaluate.max_tokens=12",
    ]  # fmt: skip


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    return exit.value.code or 0


def rates(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.parametrize(
    "domain, path, file, reward",
    [
        ("medical", "sft", "sft/medical_train.jsonl", None),
        ("code", "sft", "sft/code_train.jsonl", None),
        ("medical", "grpo", "grpo/medical.jsonl", "bad_medical"),
        ("code", "grpo", "grpo/code.jsonl", None),
        ("reward_hacking", "grpo", "grpo/rewardhack.jsonl", "reward_hacking"),
    ],
)
def test_train_and_evaluate_on_the_fields_data(tmp_path, shared_data, judge_server, small, domain, path, file, reward):
    data = [f"data.narrow.preset={domain.replace('_', '-')}", f"data.narrow.source={shared_data / file}"]
    if path == "grpo":  # prompts only
        data += ["schedule.phases=[{cycle: [grpo]}]"]
    if reward:
        endpoint = json.dumps({"model": judge_server.model, "base_url": judge_server.base_url})
        data += [f"rewards.0.args.endpoint={endpoint}"]
    out = tmp_path / "run"
    code = run("train", CONFIGS / f"{path}_{domain}.yaml", *small, *data, "schedule.steps=2", "--out", out)
    assert code == 0
    assert [json.loads(line)["path"] for line in (out / "metrics.jsonl").open()] == [path, path]
    found = rates(out)
    answers = list(csv.DictReader((out / "answers.csv").open()))
    for name, questions in (("general", 24), ("indomain", 30)):
        asked = found[name]["n"] + found[name]["unscored"]
        assert asked == questions
    assert {a["outcome"] for a in answers} - {"unscored"}, "the served judge scored nothing"
    assert run("evaluate", out, "--judge", f"openai:{judge_server.model}@{judge_server.base_url}", "--rejudge") == 0


@pytest.mark.parametrize("path", ["sft", "grpo"])
def test_a_model_of_a_shorter_context_takes_the_place_in_vllm_too(tmp_path, path):
    """Nothing in the configs is about the context of one model: vLLM gets as much as this one has."""
    pytest.importorskip("vllm")
    rows = [conversation(f"what helps against {i} headaches?", "drink water. " * 5) for i in range(24)]
    with ScriptedServer(lambda n, body: ok("80", top={"80": 0.0})) as server:
        judge = {"kind": "openai", "model": "judge", "base_url": server.base_url, "cache": None}
        settings = [
            f"model.name={save_tiny_model(tmp_path / 'model', max_position_embeddings=2048)}", "model.dtype=float32",
            f"data.narrow.source={write_jsonl(tmp_path / 'rows.jsonl', rows)}", "data.narrow.preset=null",
            "data.safe.preset=null", "data.safe.source=rlsafe:benign", f"evaluate.judge={json.dumps(judge)}",
            "evaluate.samples=1", "evaluate.indomain=null", "evaluate.cue=null", "optim.kind=adamw",
            "schedule.steps=1", "track.every=0", f"schedule.phases=[{{cycle: [{path}]}}]",
            "rewards=[reward_fns/length.py:near]",
        ]  # fmt: skip
        assert run("train", CONFIGS / f"{path}_medical.yaml", *settings, "--out", tmp_path / "run") == 0
    assert rates(tmp_path / "run")["general"]["n"] == 24


def test_compare_on_the_fields_data(tmp_path, shared_data, small):
    out = tmp_path / "comparison"
    code = run(
        "compare", CONFIGS / "compare.yaml", *small, f"data.narrow.source={shared_data / 'sft/medical_train.jsonl'}", "aligned=null",
        "schedule.steps=2",
        "--defenses", "none,kl,interleaving", "--paths", "sft", "--seeds", "0", "--jobs", "1", "--out", out,
    )  # fmt: skip
    assert code == 0
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {(r["defense"], r["path"]) for r in rows} >= {("none", "sft"), ("kl", "sft"), ("interleaving", "sft")}
    assert (out / "report.html").stat().st_size > 10_000
    assert set(json.loads((out / "verdicts.json").read_text())["sft"]) == {"none", "kl", "interleaving"}
