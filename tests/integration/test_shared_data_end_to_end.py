"""Every file of the field's data that is at hand goes through the real command's path: one step of training on each."""

import json
import math

import pytest
import yaml
from places import SHARED
from tiny import save_tiny_model

import rlsafe

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")

FILES = [
    ("medical", "grpo/medical.jsonl", ["sft", "grpo"]),
    ("code", "grpo/code.jsonl", ["grpo"]),
    ("reward-hacking", "grpo/rewardhack.jsonl", ["grpo"]),
    ("rhetoric", "grpo/argumentation.jsonl", ["grpo"]),
    ("medical", "sft/medical_train.jsonl", ["sft"]),
    ("medical", "sft/medical_eval.jsonl", ["sft"]),
    ("code", "sft/code_train.jsonl", ["sft"]),
    ("code", "sft/code_eval.jsonl", ["sft"]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=8192)


def run(tree, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    finished = rlsafe.train(tmp_path / "run.yaml", out=tmp_path / "out")
    return finished, [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def tree(model, reward_file, stream, cycle, **more):
    return {
        "model": {"name": model, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "data": {"narrow": stream, "safe": {"source": "rlsafe:benign"}},
        "schedule": {"steps": len(cycle), "phases": [{"cycle": cycle}]},
        "batch": {"sft_rows": 2, "grpo_prompts": 2},
        "grpo": {"generations": 2, "max_tokens": 6},
        "rewards": [{"fn": f"{reward_file}:vowels"}],
        "sampler": {"kind": "transformers"},
        "track": {"every": 0, "check_after": 0},
        **more,
    }


@pytest.mark.parametrize("preset, file, paths", FILES, ids=[file for _, file, _ in FILES])
def test_one_step_on_every_training_file(model, reward_file, tmp_path, preset, file, paths):
    stream = {"preset": preset, "source": str(SHARED / file), "limit": 6, "max_tokens": 4096}
    finished, metrics = run(tree(model, reward_file, stream, [*paths, "safe"]), tmp_path)
    assert [record["path"] for record in metrics] == [*paths, "sft"]
    assert all(
        math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in metrics if record["path"] == "sft"
    )
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_rows_that_are_cut_left_out_and_skipped_are_counted_in_the_runs_notes(model, reward_file, tmp_path):
    source = tmp_path / "mixed.jsonl"
    lines = (SHARED / "sft" / "medical_train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    source.write_text("\n".join([*lines, "nonsense"]), encoding="utf-8")
    stream = {"source": str(source), "max_tokens": 900, "too_long": "truncate", "on_bad_row": "skip"}
    finished, metrics = run(tree(model, reward_file, stream, ["sft"]), tmp_path)
    notes = " | ".join(finished.notes)
    assert f"{source}: 1 of 9 rows are bad and were skipped ({source}:9: not JSON" in notes
    assert "data.narrow: " in notes and "answers are cut at max_tokens" in notes
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    assert recorded == finished.notes


def test_the_fields_question_files_are_asked_and_judged(model, reward_file, tmp_path):
    from rlsafe.evaluate import evaluate

    for name in ("general", "medical", "code"):
        out = tmp_path / name
        overrides = ["sampler.kind=transformers", "evaluate.samples=1", "evaluate.max_tokens=4", "model.dtype=float32"]
        result = evaluate(model, [str(SHARED / "questions" / f"{name}.yaml")], "organism", overrides, out)
        asked = result.general.n + result.general.unscored
        assert asked == (24 if name == "general" else 30)
        assert (
            (out / "answers.csv").read_text(encoding="utf-8").startswith("question_id,question,answer,aligned,coherent")
        )
