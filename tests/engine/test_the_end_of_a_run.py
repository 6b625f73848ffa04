"""Between its last step and its record a run can fail or be stopped, too: what it trained is kept, and the line says how to go on."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import adapter, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.record import checkpoint
from rlsafe.engine.record.tracking import Late, Tracker
from rlsafe.engine.run import life
from rlsafe.engine.run.life import run
from rlsafe.engine.run.records import read_record
from rlsafe.policy import Policy
from rlsafe.types import Interrupted, RunError

pytestmark = pytest.mark.integration  # whole runs

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def config(tiny_tree):
    return run_from_tree(tree_with(tiny_tree, {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}}))


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def slow_judge(patch, step):
    """From that step on the judge is never ready, and each wait for it is broken off at once by a second request to stop."""
    real = Tracker.step

    def put(self, record, late=None):
        real(self, record, Late(lambda: False, raising(KeyboardInterrupt)) if record["step"] >= step else late)

    patch.setattr(Tracker, "step", put)


def refuses_the_record(patch):
    real = life.write_record

    def write(out, status, *arguments, **more):
        if status == "finished":
            raise FULL
        real(out, status, *arguments, **more)

    patch.setattr(life, "write_record", write)


def refuses_the_last_lines(patch):
    """Once: there is room for a checkpoint later on."""
    refused = []

    def sync(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("metrics.jsonl") and not refused:
            refused.append(handle)
            raise FULL

    patch.setattr(os, "fsync", sync)


BROKEN = {
    "judge": (Interrupted, lambda patch: slow_judge(patch, 1)),
    "adapter": (Interrupted, lambda patch: patch.setattr(Policy, "save_adapter", raising(KeyboardInterrupt))),
    "adapter of another": (RuntimeError, lambda patch: patch.setattr(Policy, "save_adapter", raising(RuntimeError()))),
    "lines": (RunError, refuses_the_last_lines),
    "digests": (UserError, lambda patch: patch.setattr(life, "_ended", raising(UserError("no digest")))),
    "record": (RunError, refuses_the_record),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_breaks_off_after_the_last_step_costs_no_training(config, tmp_path, monkeypatch, what):
    kind, breaks = BROKEN[what]
    with monkeypatch.context() as patch:
        breaks(patch)
        with pytest.raises(kind) as stopped:
            run(config, tmp_path / "cut")
    said = " ".join([str(stopped.value), *getattr(stopped.value, "__notes__", [])])
    assert "the state after 2 steps is saved, resume with: --resume" in said and "nothing was finished" not in said
    assert ("adapter/ is whole, " in said) == (not what.startswith("adapter")), said
    if kind in (Interrupted, RunError):
        assert "after its last step" in said
    assert read_record(tmp_path / "cut")["status"] == "running"
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    monkeypatch.setattr("rlsafe.engine.train.loop.sft_step", raising(AssertionError("trained again")))
    run(config, tmp_path / "cut", resume=True)
    assert read_record(tmp_path / "cut")["status"] == "finished"
    monkeypatch.undo()
    run(config, tmp_path / "whole")
    one, other = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_that_is_all_that_fits_is_said_to_be_whole(config, tmp_path, monkeypatch):
    refuses_the_record(monkeypatch)
    monkeypatch.setattr(checkpoint, "save_file", raising(FULL))
    out = tmp_path / "cut"
    way = rf"adapter/ is whole \(`rlsafe evaluate {out}` takes it when {out}/run.json is deleted\)$"
    with pytest.raises(RunError, match=way):
        run(config, out)
    assert adapter(out)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), FULL, ValueError("a tracker")], ids=lambda one: type(one).__name__
)
def test_a_run_whose_record_is_written_is_finished_whatever_comes_then(config, tmp_path, monkeypatch, error):
    monkeypatch.setattr(Tracker, "close", raising(error))
    with pytest.raises((Interrupted, RunError, ValueError)) as stopped:
        run(config, tmp_path / "run")
    said = " ".join([str(stopped.value), *getattr(stopped.value, "__notes__", [])])
    assert said.endswith(f"the run is finished and saved in {tmp_path / 'run'}") and "nothing was" not in said
    assert read_record(tmp_path / "run")["status"] == "finished" and not checkpoint.saved(
        tmp_path / "run" / "checkpoints"
    )


def test_a_second_request_while_the_first_one_waits_for_the_judge_loses_no_step(tiny_tree, tmp_path, monkeypatch):
    config, out = run_from_tree(tiny_tree), tmp_path / "cut"
    slow_judge(monkeypatch, 0)

    def ask(done, total, record):
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(
        Interrupted, match="stopped at once after step 2; the state after 2 steps is saved, resume with"
    ):
        run(config, out, progress=ask)
    monkeypatch.undo()
    run(config, out, resume=True)
    steps = [json.loads(line)["step"] for line in Path(out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3] and read_record(out)["resumed"] == [2]
