"""What a machine or launch cannot do is refused before the model loads; what it wastes is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_runs import tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.run import layout
from rlsafe.engine.run.build import prepare

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "total", "fits"),
    [("Qwen/Qwen2.5-7B", 80, True), ("Qwen/Qwen2.5-7B", 24, False), ("Qwen/Qwen2.5-32B", 80, False)],
)
def test_a_model_that_vllms_share_of_the_card_cannot_hold(tiny_tree, name, total, fits):
    tree = tiny_tree | {
        "model": {"name": name, "dtype": "bfloat16", "lora": {"r": 4}, "gradient_checkpointing": True},
        "sampler": {"kind": "auto"},
    }
    if fits:
        return layout.check_sampler_fits(run_from_tree(tree), name, total * GIB)
    with pytest.raises(UserError, match=f"sampler.gpu_memory: 0.4 of this GPU is .*{name}; raise it, or .*kind=server"):
        layout.check_sampler_fits(run_from_tree(tree), name, total * GIB)
    layout.check_sampler_fits(run_from_tree(tree | {"sampler": {"kind": "transformers"}}), name, total * GIB)


def test_processes_without_prompts_are_told_with_the_setting_that_mends_it(tiny_tree):
    tree = tiny_tree | {"schedule": {"steps": 1, "phases": [{"cycle": ["grpo"]}]}}
    ranks, said = SimpleNamespace(num_processes=8, device=torch.device("cpu")), []
    layout.check_layout(prepare(run_from_tree(tree)), "here", ranks, said.append)
    assert said == [], "they share the completions of a prompt"
    whole = tree_with(tree, {"grpo": {"resample": 4}})  # needs whole groups
    layout.check_layout(prepare(run_from_tree(whole)), "here", ranks, said.append)
    assert said == [
        "batch.grpo_prompts: 3 prompts a step leave 5 of 8 processes without rollouts; batch.grpo_prompts=24 gives each as many as "
        "one process has"
    ]


def test_a_gpu_that_the_run_does_not_use_is_named_once_unless_it_was_hidden(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(layout.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "has a GPU and the run does not use it" in layout.unused_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0: the driver may be older" in layout.unused_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert layout.unused_gpu() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(layout.glob, "glob", lambda pattern: [])
    assert layout.unused_gpu() is None


def test_a_dry_run_and_doctor_say_what_does_not_fit(tiny_tree, monkeypatch):
    from rlsafe import doctor
    from rlsafe.engine.plan.estimate import memory, unfit
    from rlsafe.policy.shapes import model_shape

    name = "Qwen/Qwen2.5-32B"
    tree = tiny_tree | {
        "model": {"name": name, "dtype": "bfloat16", "lora": {"r": 4}, "gradient_checkpointing": True},
        "sampler": {"kind": "auto"},
    }
    config = run_from_tree(tree)
    need = memory(config, model_shape(config.model, name), cuda=True)
    small, large = unfit(config, need, 80 * GIB), unfit(config, need, 400 * GIB)
    assert len(small) == 2 and "vLLM will not start" in small[0] and "run out of memory" in small[1] and large == []
    monkeypatch.setattr(layout, "unused_gpu", lambda: "this machine has a GPU and the run does not use it")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    check = doctor._device()
    assert check.status == "note" and "does not use it" in check.found and "580" in check.fix


def test_bfloat16_is_not_taken_from_a_gpu_that_only_emulates_it(monkeypatch):
    from rlsafe.config import ModelConfig
    from rlsafe.policy.load import resolve_dtype

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="this GPU does not support bfloat16"):
        resolve_dtype(ModelConfig(name="x", dtype="bfloat16"), torch.device("cuda"), None)
