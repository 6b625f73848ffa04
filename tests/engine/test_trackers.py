"""Trackers through Accelerate: the same numbers everywhere, dialogues as tables, and no run lost to a tracker."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.record.trackers import Trackers, check_trackers
from rlsafe.engine.record.tracking import Tracker, scalars
from rlsafe.engine.run.life import run


class Recorder(GeneralTracker):
    """A stand-in with Accelerate's interface that keeps what it gets."""

    name = "recorder"
    requires_logging_directory = True
    started: list[Recorder] = []

    def __init__(self, run_name, logging_dir, **more):
        super().__init__()
        self.run_name, self.logging_dir, self.more = run_name, logging_dir, more
        self.logged, self.tables, self.settings, self.over = [], [], {}, False

    @property
    def tracker(self):
        return self

    def start(self):
        Recorder.started.append(self)
        if "fail" in self.more:
            raise RuntimeError("no key was given")

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **more):
        if self.more.get("breaks") == step:
            raise ConnectionError("the server is gone")
        self.logged.append((step, values))

    def log_table(self, name, columns, data, step=None):
        self.tables.append((name, columns, data, step))

    def finish(self):
        self.over = True


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    Recorder.started = []
    return Recorder


def with_trackers(tree, **track):
    return run_from_tree({**tree, "track": {**tree["track"], **track}})


def test_every_number_reaches_every_tracker_under_one_name(recorder, tiny_tree, tmp_path):
    done = run(
        with_trackers(tiny_tree, to=["tensorboard", "recorder"], project="mine", init={"recorder": {"team": "us"}}),
        tmp_path / "run",
    )
    (one,) = recorder.started
    assert (one.run_name, one.more, one.over) == ("mine", {"team": "us"}, True)
    assert Path(one.logging_dir) == tmp_path / "run" / "trackers"
    assert one.logged == [(record["step"], dict(scalars(record))) for record in done.records]
    assert one.settings["model.lora.r"] == 4 and all(
        isinstance(v, (int, float, str, type(None))) for v in one.settings.values()
    )
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_tensorboard_is_the_default_and_can_be_left_out(recorder, tiny_tree, tmp_path):
    assert run_from_tree(tiny_tree).track.to == ["tensorboard"]
    run(with_trackers(tiny_tree, to="recorder"), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists() and len(recorder.started[0].logged) == 4
    from rlsafe.engine.record.verify_run import verify_run

    assert not [line for line in verify_run(tmp_path / "run").differences if "ensor" in line]


def test_dialogues_are_tables(recorder, tiny_tree, tmp_path):
    config = with_trackers(tiny_tree, to=["recorder"])
    tracker = Tracker(tmp_path, board=False, others=lambda: Trackers(config, tmp_path))
    tracker.dialogues(
        [{"question": "q", "answer": "a", "aligned": 5.0, "coherent": None, "outcome": "scored", "ids": [1]}], 7
    )
    tracker.close()
    columns = ["question", "answer", "aligned", "coherent", "outcome"]
    assert recorder.started[0].tables == [("eval/dialogues", columns, [["q", "a", 5.0, None, "scored"]], 7)]


def test_a_tracker_that_fails_while_training_costs_only_itself(recorder, tiny_tree, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rlsafe"):
        done = run(with_trackers(tiny_tree, to=["recorder"], init={"recorder": {"breaks": 1}}), tmp_path / "run")
    assert len(done.records) == 4 and len(recorder.started[0].logged) == 1
    assert (
        sum("track.to: recorder fails and gets nothing more: the server is gone" in line for line in caplog.messages)
        == 1
    )
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_one_that_cannot_begin_is_told_before_the_first_step(recorder, tiny_tree, tmp_path):
    with pytest.raises(UserError, match="track.to: recorder: cannot begin: no key was given"):
        run(with_trackers(tiny_tree, to=["recorder"], init={"recorder": {"fail": True}}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_names_are_checked_before_anything_is_loaded(monkeypatch):
    with pytest.raises(UserError, match="track.to: 'wanbd': .*did you mean 'wandb'"):
        check_trackers(["wanbd"])
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(
        UserError, match="track.to: comet_ml: its package is not installed; expected: pip install comet-ml"
    ):
        check_trackers(["tensorboard", "comet_ml"])


def test_the_real_wandb_offline(tiny_tree, tmp_path, monkeypatch):
    """With the extra `wandb`: an offline run on disk, continued under one id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    run(with_trackers(tiny_tree, to=["tensorboard", "wandb"]), out)
    identity = (out / "trackers" / "id").read_text()
    kept = list((out / "trackers" / "wandb").glob(f"offline-run-*-{identity}"))
    assert len(kept) == 1 and list(kept[0].glob("*.wandb"))
    config = with_trackers(tiny_tree, to=["wandb"])
    tracker = Tracker(out, board=False, others=lambda: Trackers(config, out))
    tracker.dialogues([{"question": "q", "answer": "a", "aligned": 5.0, "coherent": 99.0, "outcome": "scored"}], 4)
    tracker.close()
    (table,) = (out / "trackers" / "wandb").rglob("eval/dialogues*.table.json")
    assert json.loads(table.read_text())["data"] == [["q", "a", 5.0, 99.0, "scored"]]
