"""Ranks of a run decide alike, whatever each of them sees: one that left the others' way would leave them waiting."""

import signal
from types import SimpleNamespace

import pytest
import yaml

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.run import interrupts, life, resume
from rlsafe.engine.run.finished import Run


def test_ranks_that_name_their_directory_by_the_clock_mean_the_same(tmp_path, monkeypatch, tiny_tree):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_tree))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    used = []
    monkeypatch.setattr(life, "run", lambda config, out, **_: used.append(out) or SimpleNamespace(config=config))
    monkeypatch.setattr("rlsafe.engine.train.distributed.start", lambda cpu: None)
    monkeypatch.setattr("rlsafe.rollouts.ranks.of_first", lambda work: work().with_name("of-the-first"))
    life.train("c.yaml")
    life.train("c.yaml", out="named")
    assert [str(out) for out in used] == ["runs/of-the-first", "named"]


def test_ranks_that_find_different_checkpoints_do_not_train_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "gather_object", lambda mine: [40, *mine])
    two = SimpleNamespace(several=True)
    resume.check_same(two, 40, tmp_path)
    with pytest.raises(
        UserError, match=rf"{tmp_path}: the processes found different checkpoints.*steps 0, 40, 0 = none"
    ):
        resume.check_same(two, 0, tmp_path)


def test_one_rank_speaks_for_a_run_that_was_over_before(tmp_path, monkeypatch, tiny_tree):
    done = Run(tmp_path, run_from_tree(tiny_tree))
    assert done.is_main
    monkeypatch.setenv("RANK", "1")
    assert not done.is_main


def test_a_signal_that_reaches_a_rank_twice_is_one_request(monkeypatch):
    """From the scheduler, and passed on by the launcher: the step is finished and saved, which several ranks cannot do later."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with interrupts.stop_requests() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked.is_set()
        monkeypatch.setattr(interrupts, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
