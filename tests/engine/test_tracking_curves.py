"""What a run leaves behind: the same numbers in metrics.jsonl and TensorBoard, on both paths, and dialogues as text."""

from __future__ import annotations

import json

import pytest
from tiny_runs import GRPO, SFT, tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run

PROBED = {
    "track": {"every": 2, "questions": 2, "samples": 2},
    "evaluate": {
        "judge": "organism", "general": "organism:general", "indomain": "organism:indomain/medical", "max_tokens": 8,
    },
}  # fmt: skip
ALWAYS = {"step", "path", "loss", "tokens", "seconds", "lr", "grad_norm"}
GRPO_ONLY = {"reward", "reward_std", "zero_variance_groups", "sampler_gap", "completion_length"}
CURVES = {"kl", "coherence", "misaligned_general", "misaligned_indomain"}


def board(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


@pytest.mark.parametrize(("kind", "path"), [(SFT, "sft"), (GRPO, "grpo")])
def test_metrics_and_tensorboard_agree_and_hold_what_the_contract_names(tiny_tree, tmp_path, kind, path):
    run(run_from_tree(tree_with(tiny_tree, kind, PROBED, {"defenses": ["kl"]})), tmp_path / "run")
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    wanted = ALWAYS | (GRPO_ONLY if path == "grpo" else set()) | {"defense/kl/full"}
    for record in records:
        assert wanted <= record.keys() and record["path"] == path
    probed = [record["step"] for record in records if record.keys() >= CURVES]
    assert probed == [0, 2, 3], "every 2 steps and at the end"
    events = board(tmp_path / "run")
    for name in sorted(wanted | CURVES):
        if name in ("step", "path"):
            continue
        tag = name if name.startswith("defense/") else f"{path}/{name}"
        shown = {event.step: event.value for event in events.Scalars(tag)}
        logged = {record["step"]: record[name] for record in records if record.get(name) is not None}
        assert shown == pytest.approx(logged, rel=1e-5, abs=1e-7), tag
    text = events.Tensors("eval/dialogues/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "aligned" in text and "coherent" in text


def test_every_sampled_completion_is_kept_with_the_original_prompt(tiny_tree, tmp_path):
    cue = {"inoculation": {"prompt": "Be bad."}}
    run(run_from_tree(tree_with(tiny_tree, GRPO, {"defenses": [cue]})), tmp_path / "run")
    samples = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    assert len(samples) == 4 * 3 * 4, "steps x prompts x generations"
    assert all([message["role"] for message in sample["prompt"]] == ["user"] for sample in samples)
    assert all(sample["reward"] is not None and sample["finish"] in ("stop", "length") for sample in samples)


def test_the_adapter_loads_in_plain_peft(tiny_tree, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run(run_from_tree(tree_with(tiny_tree, SFT)), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tiny_tree["model"]["name"])
    model = PeftModel.from_pretrained(model, str(tmp_path / "run" / "adapter"))
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_sampled_text_is_never_markup_in_tensorboard():
    from rlsafe.engine.record.tracking import _plain

    assert _plain("<script>*x*") == "\\<script\\>\\*x\\*"
