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
    with pytest.raises(UserError, match=f"sampler.gpu_memory: 0.4 of this GPU is .*{name}; raise it, .*kind=server"):
        layout.check_sampler_fits(run_from_tree(tree), name, total * GIB)
    layout.check_sampler_fits(run_from_tree(tree | {"sampler": {"kind": "transformers"}}), name, total * GIB)


def test_an_engine_split_over_cards_needs_a_part_of_each(tiny_tree):
    model = {"name": "Qwen/Qwen2.5-32B", "dtype": "bfloat16", "lora": {"r": 4}}
    tree = tiny_tree | {"model": model, "sampler": {"kind": "vllm", "tensor_parallel": 4}}
    layout.check_sampler_fits(run_from_tree(tree), model["name"], 80 * GIB)
    with pytest.raises(UserError, match="sampler.tensor_parallel"):
        layout.check_sampler_fits(
            run_from_tree(tree_with(tree, {"sampler": {"tensor_parallel": 1}})), model["name"], 80 * GIB
        )


def test_processes_that_engines_cannot_share_out_are_refused_before_the_model_loads(tiny_tree):
    grpo = {
        "schedule": {"steps": 1, "phases": [{"cycle": ["grpo"]}]},
        "sampler": {"kind": "vllm", "tensor_parallel": 4},
    }
    prepared = prepare(run_from_tree(tree_with(tiny_tree, grpo)))
    six, eight = (SimpleNamespace(num_processes=n, device=torch.device("cpu")) for n in (6, 8))
    with pytest.raises(UserError, match="sampler.tensor_parallel: 4 processes share an engine, and the run has 6"):
        layout.check_layout(prepared, "here", six, lambda line: None)
    layout.check_layout(prepared, "here", eight, lambda line: None)


def test_an_engine_that_starts_after_the_last_step_is_checked_before_the_first(tiny_tree, monkeypatch, narrow_file):
    """The answers of the evaluation need one, too; a run of supervision alone would find out when it is over."""
    checked = []
    monkeypatch.setattr(layout, "check_sampler_fits", lambda *arguments: checked.append(arguments))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    gpu = SimpleNamespace(num_processes=1, device=torch.device("cuda", 0))
    quiet = tree_with(tiny_tree, {"track": {"every": 0}, "sampler": {"kind": "auto"}})
    for evaluate, times in (({}, 0), ({"benign": [narrow_file], "benign_limit": 2}, 1)):
        prepared = prepare(run_from_tree(tree_with(quiet, {"evaluate": evaluate})))
        layout.check_layout(prepared, "here", gpu, lambda line: None)
        assert len(checked) == times


def test_a_run_that_never_samples_is_not_measured_by_an_engine(tiny_tree, monkeypatch, safe_file):
    """Probes are on by default, and ask nothing without a judge and questions; some defenses ask by themselves."""
    from rlsafe.engine.run.dry import dry

    name = "Qwen/Qwen2.5-7B-Instruct"
    model = {
        "name": name,
        "dtype": "bfloat16",
        "quantization": "4bit",
        "gradient_checkpointing": True,
        "lora": {"r": 4},
    }
    tree = tiny_tree | {"model": model, "track": {}, "sampler": {"kind": "auto"}}
    gpu = SimpleNamespace(num_processes=1, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * GIB))
    layout.check_layout(prepare(run_from_tree(tree)), name, gpu, lambda line: None)
    found = dry(run_from_tree(tree))
    assert found.need.sampler == found.need.merging == 0 and not any("vLLM" in line for line in found.memory)
    onpolicy = {"evaluate": {"judge": "static"}, "defenses": [{"interleaving-onpolicy": {"source": safe_file}}]}
    for asking in (onpolicy, {"schedule": {"steps": 1, "phases": [{"cycle": ["grpo"]}]}}):
        config = run_from_tree(tree_with(tree, asking))
        with pytest.raises(UserError, match="sampler.gpu_memory: 0.4 of this GPU"):
            layout.check_layout(prepare(config), name, gpu, lambda line: None)
        assert dry(config).need.sampler > 0


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
    small, large = (unfit(config, need, total * GIB, total * GIB) for total in (80, 400))
    assert len(small) == 2 and "vLLM will not start" in small[0] and "run out of memory" in small[1] and large == []
    [busy] = unfit(config, need, 50 * GIB, 400 * GIB)
    assert "50.0 GiB of this GPU's 400.0 GiB are free now" in busy and "others use it" in busy
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
    stored = SimpleNamespace(get_text_config=lambda: SimpleNamespace(dtype=torch.bfloat16))
    auto = ModelConfig(name="x")
    assert resolve_dtype(auto, torch.device("cuda"), stored) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_dtype(auto, torch.device("cuda"), stored) == torch.bfloat16
    assert resolve_dtype(auto, torch.device("cpu"), stored) == torch.float32


def test_the_estimate_is_of_the_dtype_that_this_gpu_will_take(tiny_tree, monkeypatch):
    from rlsafe.engine.plan.estimate import memory
    from rlsafe.policy.shapes import model_shape

    name = "Qwen/Qwen2.5-7B"
    config = run_from_tree(tiny_tree | {"model": {"name": name, "lora": {"r": 4}}})
    shape = model_shape(config.model, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    emulated = memory(config, shape, cuda=True).weights
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert emulated == 2 * memory(config, shape, cuda=True).weights


def test_ranks_wait_for_one_whose_judge_is_out(monkeypatch):
    """NCCL ends a run whose ranks are ten minutes apart; a grader's outage may take longer."""
    from rlsafe.engine.train import distributed

    asked = []

    def accelerator(cpu, kwargs_handlers):
        asked.extend(kwargs_handlers)
        return SimpleNamespace(mixed_precision="no", num_processes=1)

    monkeypatch.setattr(distributed, "Accelerator", accelerator)
    distributed.start(cpu=True)
    [group] = asked
    assert group.to_kwargs()["timeout"].total_seconds() >= 24 * 3600 and "backend" not in group.to_kwargs()


def test_a_checkpoint_goes_on_where_there_are_fewer_cards(monkeypatch):
    """Of the GPUs' generators it holds the one that the run drew from; that of another card may not be there."""
    from rlsafe.engine.train.state import random_state, set_random_state

    drawn = torch.tensor([5], dtype=torch.uint8)
    held = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device="cuda": drawn + (device if isinstance(device, int) else 0)
    )
    saved = random_state()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def put(state, device="cuda"):
        assert device in ("cuda", 0), "no such card"
        held["state"] = state

    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    set_random_state(saved)
    assert torch.equal(held["state"], drawn)
