"""8-bit moments: a resumed run goes on with the codes it saved, and what cannot keep them says so in one line."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator

from rlsafe.config import OptimConfig, UserError, run_from_tree
from rlsafe.engine.record.checkpoint import pack, unpack
from rlsafe.engine.run.life import run
from rlsafe.engine.train.distributed import check_moments, load_optimizer, whole_optimizer
from rlsafe.engine.train.optimizer import make_optimizer
from rlsafe.types import Interrupted

SETTINGS = OptimConfig(kind="adamw_8bit", lr=1e-2)


def stepped(steps: int, wrap: bool = False):
    """Parameters of 8- and of 32-bit moments (bitsandbytes keeps small ones whole) after some steps, and their optimizer."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 96)), torch.nn.Parameter(torch.randn(8))]
    optimizer = make_optimizer(SETTINGS, parameters, pytest.fail)
    if wrap:
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    for _ in range(steps):
        step(parameters, optimizer)
    return parameters, optimizer


def step(parameters, optimizer):
    for parameter in parameters:
        parameter.grad = torch.sin(parameter.detach() * 7)
    optimizer.step()


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
def test_loaded_moments_make_the_update_that_the_saved_ones_would_have_made(wrap):
    parameters, optimizer = stepped(3, wrap)
    assert {value.dtype for value in optimizer.state[parameters[0]].values() if torch.is_tensor(value)} >= {torch.uint8}
    tensors: dict[str, torch.Tensor] = {}
    saved = unpack(copy.deepcopy(pack(whole_optimizer(optimizer), tensors)), tensors)
    again, other = stepped(0, wrap)
    for parameter, value in zip(again, parameters, strict=True):
        parameter.data.copy_(value.data)
    load_optimizer(other, saved)
    assert other.state[again[0]]["state1"].dtype == torch.uint8
    step(parameters, optimizer)
    step(again, other)
    assert all(torch.equal(one, two) for one, two in zip(parameters, again, strict=True))


def test_moments_of_another_width_are_refused_in_one_line():
    _, optimizer = stepped(1)
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.randn(64, 96)), torch.nn.Parameter(torch.randn(8))])
    with pytest.raises(UserError, match="the checkpoint's moments have 8 bits and this machine keeps them in 32"):
        load_optimizer(plain, whole_optimizer(optimizer))


@pytest.mark.parametrize(
    ("variable", "how"), [("ACCELERATE_USE_FSDP", "sharded by FSDP2"), ("ACCELERATE_USE_DEEPSPEED", "by DeepSpeed")]
)
def test_shards_cannot_keep_them(monkeypatch, variable, how):
    monkeypatch.setenv(variable, "true")
    two = type("Two", (), {"num_processes": 2})()
    with pytest.raises(UserError, match=f"optim.kind: adamw_8bit: its moments cannot be .*{how}; expected adamw"):
        check_moments(SETTINGS, two)
    check_moments(OptimConfig(), two)
    check_moments(SETTINGS, type("One", (), {"num_processes": 1})())


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(tiny_tree, tmp_path):
    from safetensors.torch import load_file

    tree = tiny_tree | {"optim": {"kind": "adamw_8bit", "lr": 1e-2}, "checkpoint": {"every": 1}}
    tree["model"] = tree["model"] | {"lora": {"r": 64, "alpha": 64}}  # 64 x 64: large enough for 8 bits
    run(run_from_tree(tree), tmp_path / "whole")

    def stop(done, total, record):
        if done == 2:
            raise Interrupted("here")

    with pytest.raises(Interrupted):
        run(run_from_tree(tree), tmp_path / "cut", progress=stop)
    ended = run(run_from_tree(tree), tmp_path / "cut", resume=True)
    assert any("state1" in entry for entry in ended.components.optimizer.state.values())
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
