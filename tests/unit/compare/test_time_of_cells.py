"""How long a cell took: all its attempts, and nothing where that is not known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from synthetic_comparison import CONFIG, make

import rlsafe.evaluate
from rlsafe.compare.grid.grid import expand
from rlsafe.compare.grid.records import Directory
from rlsafe.compare.report import pages
from rlsafe.compare.run import one_cell
from rlsafe.compare.run.progress import Progress
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.verdicts import judge_defenses
from rlsafe.config import load_compare
from rlsafe.types import Interrupted

SMALL = CONFIG.split("aligned:")[0]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """`lab.attempt(training, evaluation)` runs a cell; each: its seconds, and the error that ends it. `lab.seconds()`: its record."""
    (tmp_path / "c.yaml").write_text(SMALL)
    cell = expand(load_compare(tmp_path / "c.yaml"), ["none"], ["sft"], [0])[1]
    directory, now, of = Directory(tmp_path / "out"), [0.0], {}

    def take(part):
        seconds, error = of[part]
        now[0] += seconds
        if error:
            raise error

    def train(config, where, **more):
        (where / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
        take("training")
        (where / "run.json").write_text('{"status": "finished"}')
        return SimpleNamespace(sampler=None, policy=SimpleNamespace(tokenizer=None), config=config, stopped=False)

    def attempt(training, evaluation=(0.0, None)):
        of.update(training=training, evaluation=evaluation)
        one_cell.run_cell(cell, directory, SimpleNamespace(judge=lambda config: None))

    monkeypatch.setattr("rlsafe.engine.run.life.run", train)
    for name in ("evaluate", "evaluate_run"):
        monkeypatch.setattr(rlsafe.evaluate, name, lambda *a, **k: take("evaluation"))
    monkeypatch.setattr(rlsafe.evaluate, "reader_of", lambda config, policy: None)
    monkeypatch.setattr(one_cell, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return SimpleNamespace(
        attempt=attempt, directory=directory, cell=cell, seconds=lambda: directory.record(cell.id)["seconds"]
    )


def test_a_cell_that_went_on_took_all_its_attempts(lab):
    with pytest.raises(Interrupted):
        lab.attempt((90.0, Interrupted("stopped")))
    assert lab.seconds() == 90
    lab.attempt((10.0, None), (5.0, RuntimeError("the judge is gone")))
    assert lab.seconds() == 105
    lab.attempt((0.0, None), (7.0, None))  # it is only evaluated again
    assert lab.seconds() == 112


def test_a_cell_whose_process_was_killed_took_nobody_knows_how_long(lab):
    with pytest.raises(SystemExit):  # as a signal that no handler sees: the record is what was written before
        lab.attempt((90.0, SystemExit()))
    lab.attempt((10.0, None))
    assert lab.seconds() is None


def test_a_cell_that_begins_anew_takes_its_own_time(lab):
    lab.directory.write_record(lab.cell, "failed", 90.0, "out of memory")  # before any checkpoint
    lab.attempt((10.0, None))
    assert lab.seconds() == 10


def test_a_time_that_is_not_known_is_left_out(tmp_path, capsys):
    arms = {("", "untrained"): {}, ("sft", "none"): {"general": 0.5}}
    directory = make(tmp_path / "out", arms, SMALL, paths=["sft"], seeds=[0])
    cell = expand(load_compare(tmp_path / "out.yaml"), ["none"], ["sft"], [0])[1]
    directory.write_record(cell, "done", None)
    results = load(directory.out)
    (row,) = pages.costs(results, judge_defenses(results)[0])
    assert row["seconds"] is None and row["step"] == pytest.approx(0.1)
    progress = Progress([cell])
    progress.finish(cell, None, "")
    assert progress.left() is None and "sft / none / seed 0: done" in capsys.readouterr().err
