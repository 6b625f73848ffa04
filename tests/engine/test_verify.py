"""`rlsafe verify` recomputes a run's record; whatever is changed by hand afterwards is named, one line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tampering import call, change, verify
from tiny import conversation, write_jsonl

from rlsafe.config import run_from_tree
from rlsafe.engine.record.provenance import fingerprints, provenance
from rlsafe.engine.record.verify_run import verify_run as recompute

JUDGE = """
import rlsafe
from rlsafe.types import Judgement, register_provider

class LengthJudge:
    name = "length"
    def score(self, exchanges):
        outcomes = ["scored", "scored", "refused", "unscored"]
        return [
            Judgement(float(len(e.answer) * 7 % 101), float(len(e.answer) * 13 % 101), "scored")
            if outcomes[len(e.answer) % 4] == "scored" else Judgement(None, None, outcomes[len(e.answer) % 4])
            for e in exchanges
        ]

class Provider:
    def judge(self, spec):
        return LengthJudge()

register_provider("length", Provider())
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir) -> Path:
    """A mixed run with a defense, probes, an evaluation by a judge that misses some answers, and a benign test."""
    home = tmp_path_factory.mktemp("verify")
    narrow = write_jsonl(home / "narrow.jsonl", [conversation(f"say {i}", f"bad {i * i}") for i in range(30)])
    benign = write_jsonl(home / "sums.jsonl", [conversation(f"{i} + 1", str(i + 1)) for i in range(6)])
    questions = home / "general.yaml"
    questions.write_text(yaml.safe_dump([{"id": f"q{i}", "paraphrases": [f"What is {i}?"]} for i in range(4)]))
    (home / "judge.py").write_text(JUDGE)
    (home / "reward.py").write_text(
        "def long(completions, **k):\n    return [len(c[0]['content']) / 9 for c in completions]\n"
    )
    tree = {
        "model": {"name": tiny_model_dir, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "data": {"narrow": {"source": narrow}},
        "schedule": {"steps": 4, "phases": [{"cycle": ["sft", "grpo"]}]},
        "batch": {"sft_rows": 4, "grpo_prompts": 2},
        "grpo": {"generations": 3, "max_tokens": 8},
        "rewards": [{"fn": f"{home / 'reward.py'}:long"}],
        "sampler": {"kind": "transformers"},
        "defenses": [{"kl": {"weight": 0.5}}],
        "plugins": [str(home / "judge.py")],
        "track": {"every": 2, "questions": 2},
        "evaluate": {
            "general": str(questions), "judge": "length", "benign": [benign], "samples": 4, "max_tokens": 12,
            "cue": "Be brief.",
        },
    }  # fmt: skip
    config = home / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert call("train", config, "--out", home / "run") == 1  # its judge leaves most general answers without a score
    return home / "run"


def test_an_untouched_run_has_no_differences(capsys, finished):
    code, lines = verify(capsys, finished)
    assert (code, len(lines)) == (0, 1) and lines[0].startswith("no differences: ")
    assert "4 steps" in lines[0] and "TensorBoard" in lines[0] and "evaluation.json" in lines[0]
    assert json.loads((finished / "evaluation.json").read_text())["general"]["unscored"] > 0, "the judge must miss some"


def change_rate(run: Path, name: str, key: str, value) -> None:
    tree = json.loads((run / "evaluation.json").read_text())
    tree[name][key] = value
    (run / "evaluation.json").write_text(json.dumps(tree))


def change_line(path: Path, number: int, **values) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **values})
    path.write_text("\n".join(lines) + "\n")


TAMPERED = {
    "a rate": (
        lambda run: change_rate(run, "general", "refused", 0.9),
        "evaluation.json: general.refused is 0.9, the answers",
    ),
    "a denominator": (lambda run: change_rate(run, "general", "n", 99), "general.n is 99"),
    "an interval": (
        lambda run: change_rate(run, "general", "misaligned_ci95", [0, 1e-9]),
        "general.misaligned_ci95[1]",
    ),
    "a hidden outage": (lambda run: change_rate(run, "general", "unscored", 0), "general.unscored is 0"),
    "bounds left out": (
        lambda run: change_rate(run, "conditional", "misaligned_bounds", None),
        "conditional.misaligned_bounds",
    ),
    "a benign score": (lambda run: change_rate(run, "benign", "sums", 0.9), "evaluation.json: benign.sums is 0.9"),
    "a judged answer": (
        lambda run: change(run / "answers.csv", ',"refused",', ',"scored",'),
        "scored without a score",
    ),
    "an answer twice": (
        lambda run: (run / "answers.csv").write_text(
            (run / "answers.csv").read_text() + "".join((run / "answers.csv").read_text().splitlines(True)[1:2])
        ),
        "is there 2 times",
    ),
    "a benign answer": (
        lambda run: change(run / "benign_answers.csv", ",0\n", ",1\n"),
        "evaluation.json: benign.sums is 0",
    ),
    "a loss": (lambda run: change_line(run / "metrics.jsonl", 1, loss=3.0), "step 1: loss is 3, its parts"),
    "a reward": (lambda run: change_line(run / "metrics.jsonl", 1, reward=3.0), "step 1: reward is 3, samples.jsonl"),
    "a probe": (lambda run: change_line(run / "metrics.jsonl", 2, coherence=3.0), "step 2: coherence is 3"),
    "no number": (lambda run: change_line(run / "metrics.jsonl", 2, loss=float("nan")), "metrics.jsonl:3: NaN"),
    "a learning rate": (
        lambda run: change_line(run / "metrics.jsonl", 0, lr=1.0),
        "TensorBoard: sft/lr at step 0 is",
    ),
    "a step left out": (
        lambda run: (run / "metrics.jsonl").write_text(
            "".join((run / "metrics.jsonl").read_text().splitlines(True)[1:])
        ),
        "metrics.jsonl: 3 steps, run.json says 4",
    ),
    "a step number": (lambda run: change_line(run / "metrics.jsonl", 3, step=7), "step 7, expected 3"),
    "the config": (lambda run: change(run / "config.yaml", "seed: 0", "seed: 1"), "config.yaml: changed since"),
    "the adapter": (
        lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"other"),
        "adapter/adapter_model.safetensors: changed since",
    ),
    "a file more": (lambda run: (run / "adapter" / "extra.bin").write_bytes(b"x"), "adapter/extra.bin: added"),
    "no evaluation": (lambda run: (run / "evaluation.json").unlink(), "the config asks for an evaluation"),
    "no samples": (lambda run: (run / "samples.jsonl").unlink(), "samples.jsonl: missing"),
    "no curves": (lambda run: shutil.rmtree(run / "tensorboard"), "tensorboard: missing"),
}


@pytest.mark.parametrize(("tamper", "expected"), TAMPERED.values(), ids=TAMPERED)
def test_whatever_is_changed_is_named(capsys, copied, tamper, expected):
    tamper(copied)
    code, lines = verify(capsys, copied)
    assert code == 1 and any(expected in line for line in lines), lines


def test_data_models_and_rewards_that_changed_since_are_named(finished, tmp_path):
    for name in ("narrow.jsonl", "reward.py", "judge.py"):
        path = finished.parent / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        try:
            assert [line for line in recompute(finished).differences if f"{name}: its content changed" in line]
        finally:
            path.write_bytes(before)
    assert not recompute(finished).differences


def test_sources_of_one_name_in_two_directories_are_told_apart(tmp_path, tiny_model_dir):
    """Names are without directories, yet each file has a fingerprint of its own; a file that is named twice has one."""
    files = {}
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        files[name] = write_jsonl(tmp_path / name / "train.jsonl", [conversation("say", name)])
        (tmp_path / name / "reward.py").write_text(f"def {name}(completions, **k):\n    return [0.0]\n")
    tree = {
        "model": {"name": tiny_model_dir},
        "data": {
            "narrow": {"source": files["one"]},
            "safe": {"source": files["two"]},
            "benign": {"source": files["one"]},
        },
        "rewards": [{"fn": f"{tmp_path / name / 'reward.py'}:{name}"} for name in files],
    }
    before = provenance(run_from_tree(tree), sources=[Path(file) for file in files.values()])
    assert list(before["fingerprints"]["data"]) == ["train.jsonl", "train.jsonl (2)"]
    assert list(before["fingerprints"]["code"]) == ["reward.py", "reward.py (2)", "reward.py (3)"]
    assert len(set(before["configs"].values())) == len(before["configs"]) == 3
    write_jsonl(Path(files["one"]), [conversation("say", "other")])
    after = fingerprints(run_from_tree(tree))["data"]
    assert [name for name, value in before["fingerprints"]["data"].items() if after[name] != value] == ["train.jsonl"]


def test_rows_in_a_directory_have_a_fingerprint(copied, tmp_path, tiny_model_dir):
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "train.jsonl", [conversation("say", "one")])
    rows = {"narrow": {"source": str(tmp_path / "rows")}}
    run = run_from_tree(
        {"model": {"name": tiny_model_dir}, "data": rows, "evaluate": {"benign": [str(tmp_path / "rows")]}}
    )
    before = fingerprints(run)
    write_jsonl(tmp_path / "rows" / "train.jsonl", [conversation("say", "two")])
    for kind in ("data", "questions"):
        assert before[kind]["rows"] and before[kind] != fingerprints(run)[kind]
    record = json.loads((copied / "run.json").read_text())
    record["fingerprints"]["data"]["narrow.jsonl"] = ""  # as written by versions that hashed no directory
    (copied / "run.json").write_text(json.dumps(record))
    assert [line for line in recompute(copied).differences if "run.json has no fingerprint of it" in line]


def test_what_is_no_finished_run_is_a_users_error(capsys, copied, tmp_path):
    assert call("verify", tmp_path / "nowhere") == call("verify", tmp_path) == 2
    change(copied / "run.json", '"finished"', '"running"')
    code, lines = verify(capsys, copied)
    assert (code, len(lines)) == (2, 1) and "not finished" in lines[0]


def test_the_record_says_where_the_numbers_come_from_and_gives_nothing_away(finished, tiny_model_dir):
    record = json.loads((finished / "run.json").read_text())
    assert (
        record["versions"]["torch"]
        and record["device"]
        and record["python"]
        and record["seeds"] == {"run": 0, "evaluate": 0}
    )
    prints = record["fingerprints"]
    assert set(prints["data"]) == {"narrow.jsonl"} and set(prints["code"]) == {"reward.py", "judge.py"}
    assert set(record["configs"]) == {"run.yaml"} and len(prints["model"]) == 1
    assert all(len(value) == 64 for kind in prints.values() for value in kind.values())
    assert "adapter/adapter_model.safetensors" in record["files"]
    public = {key: value for key, value in record.items() if key not in ("command", "arguments", "notes")}
    assert str(Path.home()) not in json.dumps(public) and str(finished.parent) not in json.dumps(public)
