"""Faults of the machine and of the numbers: one clear line, and nothing that was finished is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_runs import GRPO, MIXED, SFT, adapter, distance, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.record import checkpoint
from rlsafe.engine.run.life import run
from rlsafe.engine.train.loss import StepLoss
from rlsafe.policy import Policy
from rlsafe.types import Interrupted, RunError

pytestmark = pytest.mark.integration  # whole runs

EVERY = {"checkpoint": {"every": 1, "keep": 2}}


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def go(tree, out, **arguments):
    return run(run_from_tree(tree), out, **arguments)


def same_bits(one: Path, other: Path) -> bool:
    a, b = adapter(one), adapter(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ interrupts


def test_sigterm_saves_and_a_second_signal_stops_at_once_without_losing_a_finished_step(
    tiny_tree, tmp_path, monkeypatch
):
    tree = tree_with(tiny_tree, MIXED)
    train(tree, tmp_path / "whole")

    def terminate(done, total, _):
        if done == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="after step 2 of 6; state saved"):
        go(tree, tmp_path / "cut", progress=terminate)
    real = StepLoss.forward

    def twice(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return real(self, *arguments)

    monkeypatch.setattr(StepLoss, "forward", twice)
    with pytest.raises(Interrupted, match="stopped at once in step 2; .*step-000002|after 2 steps is saved"):
        go(tree, tmp_path / "cut", resume=True)
    monkeypatch.undo()
    go(tree, tmp_path / "cut", resume=True)
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("kind", "path", "done"), [(SFT, "sft", 1), (MIXED, "grpo", 3)], ids=["sft", "mixed"])
def test_a_step_that_fails_costs_only_itself(tiny_tree, tmp_path, monkeypatch, kind, path, done):
    """No periodic checkpoints here: the state after the last whole step is saved when the next one fails."""
    tree = tree_with(tiny_tree, kind)
    train(tree, tmp_path / "whole")
    real, calls = StepLoss.forward, []

    def late_failure(self, policy, micro, frozen):
        calls.extend([1] * (micro.batch.where.path == path))
        if len(calls) == 2:  # the second micro-batch of its path
            raise RunError("the weather")
        return real(self, policy, micro, frozen)

    monkeypatch.setattr(StepLoss, "forward", late_failure)
    with pytest.raises(RunError, match=f"the weather; the state after {done} steps is saved, resume with"):
        go(tree, tmp_path / "cut")
    monkeypatch.undo()
    go(tree, tmp_path / "cut", resume=True)
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "cut")]
    assert samples[0] == samples[1], "no completion is written twice"


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("damage", ["flipped", "cut short", "foreign", "half deleted"])
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(tiny_tree, tmp_path, damage):
    tree = tree_with(tiny_tree, SFT, EVERY)
    go(tree, tmp_path / "run")
    kept = checkpoint.saved(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-000003", "step-000004"], "the newest two"
    whole = adapter(tmp_path / "run")
    newest = kept[-1] / "tensors.safetensors"
    if damage == "flipped":
        data = bytearray(newest.read_bytes())
        data[-3] ^= 1
        newest.write_bytes(data)
    elif damage == "cut short":
        newest.write_bytes(newest.read_bytes()[:-100])
    elif damage == "half deleted":
        (kept[-1] / "state.json").unlink()
    else:
        shutil.rmtree(kept[-1])
        kept[-1].mkdir()
        (kept[-1] / "notes.txt").write_text("mine")
    again = go(tree, tmp_path / "run", resume=True)
    assert any("step-000004" in note and "skipped" in note for note in again.notes), again.notes
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed"] == [3]
    assert all(torch.equal(whole[name], value) for name, value in adapter(tmp_path / "run").items())


def test_no_readable_checkpoint_is_an_error_not_a_silent_start_over(tiny_tree, tmp_path):
    tree = tree_with(tiny_tree, SFT, EVERY)
    go(tree, tmp_path / "run")
    for path in checkpoint.saved(tmp_path / "run" / "checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="none of the 2 checkpoints can be read"):
        go(tree, tmp_path / "run", resume=True)


def test_other_settings_are_named_and_harmless_ones_are_not(tiny_tree, tmp_path):
    tree = tree_with(tiny_tree, SFT, EVERY)
    go(tree, tmp_path / "run")
    other = tree_with(tree, {"optim": {"lr": 0.5}, "seed": 3})
    with pytest.raises(UserError, match=r"seed: was 0, now 3; optim.lr: was 0.01, now 0.5"):
        go(other, tmp_path / "run", resume=True)
    go(
        tree_with(tree, {"checkpoint": {"every": 3, "keep": 1}, "batch": {"micro_rows": 2}}),
        tmp_path / "run",
        resume=True,
    )


# ------------------------------------------------------------------------------------------------ memory and disk


@pytest.mark.parametrize(
    "kind", [SFT, GRPO, pytest.param(MIXED, marks=pytest.mark.integration)], ids=["sft", "grpo", "mixed"]
)
def test_too_little_memory_halves_the_budget_and_changes_no_number(tiny_tree, tmp_path, monkeypatch, kind):
    tree = tree_with(tiny_tree, kind, {"optim": {"lr": 1e-3}})
    go(tree, tmp_path / "whole")
    real = StepLoss.forward
    limit = 100  # padded tokens that fit

    def little(self, policy, micro, frozen):
        if micro.batch.ids.numel() > limit:
            real(self, policy, micro, frozen)[0].backward()  # what was begun leaves gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, policy, micro, frozen)

    monkeypatch.setattr(StepLoss, "forward", little)
    done = go(tree, tmp_path / "little")
    assert any("out of memory; batch.micro_tokens is" in note for note in done.notes)
    assert distance(adapter(tmp_path / "whole"), adapter(tmp_path / "little")) < 2e-5
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "little"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["tokens"] == other["tokens"]
    limit = 5
    with pytest.raises(RunError, match="single row .*gradient_checkpointing"):
        go(tree, tmp_path / "none")


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tiny_tree, tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk: checkpoints fit, metrics soon do not."""
    tree = tree_with(tiny_tree, {**SFT, **EVERY}, {"schedule": {"steps": 12, "phases": [{"cycle": ["sft"]}]}})
    go(tree, tmp_path / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done, total, _):
        if done == 5:
            size = (tmp_path / "cut" / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))

    try:
        with pytest.raises(RunError, match=r"File too large; the run stopped after step 5; .*resume with"):
            go(tree, tmp_path / "cut", progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    names = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-000003", "step-000004"], "the unfinished one is gone, the older ones are whole"
    go(tree, tmp_path / "cut", resume=True)
    assert same_bits(tmp_path / "whole", tmp_path / "cut")


def test_a_full_disk_at_the_end_does_not_cost_the_training(tiny_tree, tmp_path, monkeypatch):
    """The adapter does not fit; its state does, or nothing does."""
    tree = tree_with(tiny_tree, SFT, {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}})
    go(tree, tmp_path / "whole")

    def full(self, directory, **other):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save_adapter", full)
        said = "cut/adapter: No space left on device; the run stopped after its last step; the state after 2 steps is saved"
        with pytest.raises(RunError, match=f"{said}, resume with"):
            go(tree, tmp_path / "cut")
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            RunError, match=r"nothing/adapter: No space.* could be kept: it begins anew .*every: N saves"
        ):
            go(tree, tmp_path / "nothing")
    assert not (tmp_path / "cut" / "adapter").exists()
    go(tree, tmp_path / "cut", resume=True)
    assert same_bits(tmp_path / "whole", tmp_path / "cut")
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [0, 1]


def test_a_directory_that_cannot_be_written_is_named_before_anything_is_loaded(tiny_tree, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match="--out .*cannot be written"):
        go(tiny_tree, tmp_path / "file" / "run")


def test_a_home_that_cannot_be_written_costs_nothing(tiny_tree, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no directory, so no cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    go(tree_with(tiny_tree, MIXED), tmp_path / "run")
    assert (tmp_path / "run" / "adapter").is_dir()


# ------------------------------------------------------------------------------------------------ numbers


def poison(where: str):
    """Make one quantity of step 2 NaN, on the real path."""
    real, seen = StepLoss.forward, []

    def forward(self, policy, micro, frozen):
        seen.append(1)
        if len(seen) == 3:
            if where == "advantages":
                micro.batch.advantages[0] = float("nan")
            elif where == "gradient":  # finite forward, infinite backward
                total, terms = real(self, policy, micro, frozen)
                parameter = next(iter(policy.trainable().values()))
                return total + (0 * parameter.sum()).clamp(min=0).sqrt(), terms
            elif where == "loss":
                self.counts = {name: float("nan") for name in self.counts}
        return real(self, policy, micro, frozen)

    return forward


@pytest.mark.parametrize(
    ("where", "kind", "named"),
    [
        ("loss", SFT, "sft loss, penalty defense/kl/full: NaN"),
        ("advantages", GRPO, "advantages, grpo loss: NaN"),
        ("gradient", SFT, "the gradient norm is nan"),
    ],
)
def test_what_is_no_number_stops_or_skips_with_its_batch_saved(tiny_tree, tmp_path, monkeypatch, where, kind, named):
    tree = tree_with(tiny_tree, kind)
    monkeypatch.setattr(StepLoss, "forward", poison(where))
    with pytest.raises(RunError, match=f"step 2: {named}.*nothing was updated.*nonfinite/step-000002.*on_nan: skip"):
        go(tree, tmp_path / "stop")
    saved = tmp_path / "stop" / "nonfinite" / "step-000002"
    record = json.loads((saved / "batch.json").read_text())
    assert record["rows"] and all(row["text"] for row in record["rows"]) and named.split(":")[0] in record["what"]
    assert load_file(str(saved / "tensors.safetensors"))
    monkeypatch.setattr(StepLoss, "forward", poison(where))
    done = go(tree_with(tree, {"optim": {"on_nan": "skip"}}), tmp_path / "skip")
    lines = metrics(tmp_path / "skip")
    assert [line.get("skipped") for line in lines] == [None, None, 1, None] and lines[2]["loss"] is None
    assert any("step 2: " in note for note in done.notes)
    assert all(value.isfinite().all() for value in adapter(tmp_path / "skip").values())


def test_skipping_every_step_is_not_a_run(tiny_tree, tmp_path, monkeypatch):
    def never(self, *_):
        from rlsafe.engine.train.loss import NotFinite

        raise NotFinite("sft loss: NaN or Inf")

    monkeypatch.setattr(StepLoss, "forward", never)
    tree = tree_with(
        tiny_tree, {"schedule": {"steps": 30, "phases": [{"cycle": ["sft"]}]}, "optim": {"on_nan": "skip"}}
    )
    with pytest.raises(RunError, match="the 10th step in a row"):
        go(tree, tmp_path / "run")


def test_a_model_without_anything_to_train_is_an_error(tiny_tree, tmp_path, monkeypatch):
    from rlsafe.policy import Policy

    monkeypatch.setattr(Policy, "trainable", lambda self: {})
    with pytest.raises(UserError, match="nothing is trainable"):
        go(tiny_tree, tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["run.json"]
