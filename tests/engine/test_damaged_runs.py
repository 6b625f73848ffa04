"""What a crash or a full disk left in a run's directory: each line says a way on that loses nothing."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
from tiny_runs import tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.record import publish as publishing
from rlsafe.engine.record.publish import publish
from rlsafe.engine.run.finished import Run
from rlsafe.engine.run.life import run
from rlsafe.engine.run.records import read_record
from rlsafe.evaluate.commands.command import load_policy


@pytest.fixture
def finished(tiny_tree, tmp_path):
    """A finished run of one step without checkpoints."""
    one = {"steps": 1, "phases": [{"cycle": ["sft"]}]}
    return run(run_from_tree(tree_with(tiny_tree, {"schedule": one})), tmp_path / "run")


def told(out, config):
    """What each reader of a run.json says of a damaged one."""
    readers = (
        lambda: load_policy(config, out),
        lambda: publish(out),
        lambda: Run.read(out),
        lambda: read_record(out),
    )
    lines = []
    for read in readers:
        with pytest.raises(UserError) as refused:
            read()
        lines.append(str(refused.value))
    return lines


def test_a_record_that_was_lost_does_not_cost_the_adapter(finished):
    """Without checkpoints nothing goes on by --resume, and --overwrite deletes what is whole."""
    out, config = finished.out, finished.config
    (out / "run.json").write_text("")
    for line in told(out, config):
        assert f"{out}/run.json" in line and "--resume" not in line, line
        assert "if the run was finished, delete run.json: its adapter/ can be evaluated; else" in line, line
        assert line.index("delete run.json") < line.index("--overwrite"), line
    with pytest.raises(UserError, match="delete run.json: its adapter/ can be evaluated; else"):
        read_record(out, resume=True)
    (out / "checkpoints" / "step-000001").mkdir(parents=True)
    for line in told(out, config):
        assert "--resume" in line and "delete" not in line, line
    shutil.rmtree(out / "checkpoints")
    (out / "run.json").unlink()
    assert load_policy(config, out)[0].is_lora, "as the line says"
    with pytest.raises(UserError, match="has no run.json.* can be evaluated, but not published"):
        publish(out)
    (out / "run.json").write_text("")
    shutil.rmtree(out / "adapter")
    for line in told(out, config)[1:]:
        assert "delete" not in line and "--overwrite" in line, line


@pytest.mark.parametrize("part", ["weights", "card"])
def test_a_disk_that_fills_while_merging_does_not_stand_in_the_way_of_the_same_command(
    finished, tmp_path, monkeypatch, part
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    merged = tmp_path / "merged"

    def refuse(*_, **__):
        raise full

    with monkeypatch.context() as patch:
        if part == "weights":
            save = "safetensors.torch.save_file"
            patch.setattr(save, refuse)
        else:
            patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
        with pytest.raises(OSError, match="No space left") as stopped:
            publish(finished.out, out=tmp_path / "out", merge=merged)
    if part == "weights":
        assert stopped.value.filename == str(merged / "model.safetensors")
    assert not merged.exists() and not list(tmp_path.glob(".merged*"))
    assert publish(finished.out, out=tmp_path / "out", merge=merged).merged == merged
    assert (merged / publishing.CARD).is_file() and (merged / "model.safetensors").is_file()
