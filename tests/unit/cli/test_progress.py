"""A run shows life: a bar on a terminal, a line now and then where the output is piped, also for runs in other processes."""

from __future__ import annotations

import io
import json

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress as Bar

from rlsafe.cli import main
from rlsafe.compare.grid.grid import expand
from rlsafe.compare.run.progress import Progress
from rlsafe.config import load_compare
from rlsafe.engine.record.latest import SILENCE, Followed, Latest, bar_columns, duration
from rlsafe.progress import RunBar


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_line_holds_the_newest_numbers_and_the_time_left():
    clock = Clock()
    latest = Latest(clock)
    for done in (1, 2, 3):
        clock.now += 10 if done == 1 else 2  # the first step waits for the engine
        latest.step(done, 10, {"loss": 1 / done, "reward": 0.25 * done, "kl": 0.5 if done == 1 else None, "groups": 4})
    assert latest.left == 14
    assert latest.line() == "step 3/10, about 14 s left: loss 0.333  reward 0.75  kl 0.5"
    assert [duration(s) for s in (89, 600, 9000)] == ["about 89 s", "about 10 min", "about 2.5 h"]


def test_steps_with_nothing_to_learn_from_are_counted():
    latest = Latest()
    for done in (1, 2):
        latest.step(done, 2, {"loss": 0.0, "groups": 4, "zero_variance_groups": 4})
    assert "(2 steps without spread in rewards)" in latest.numbers()


def test_a_long_run_tells_a_twentieth_of_its_steps_and_never_falls_silent():
    clock, told = Clock(), []
    latest = Latest(clock)
    for done in range(1, 201):
        clock.now += SILENCE + 1 if done == 37 else 0.01
        latest.step(done, 200, {})
        told += [done] * latest.due()
    assert told == [1, *range(10, 31, 10), 37, *range(40, 201, 10)]


def test_another_process_is_followed_by_its_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    one = Followed(file, 4)
    assert not one.look()
    file.write_text(json.dumps({"step": 0, "path": "sft", "loss": 2.0}) + "\n" + '{"step": 1, "lo')
    assert one.look() and (one.latest.done, one.latest.values) == (1, {"loss": 2.0})
    assert not one.look()
    with file.open("a") as more:
        more.write('ss": 1.0}\n')
    assert one.look() and one.latest.done == 2
    file.write_text(json.dumps({"step": 0, "loss": 5.0}) + "\n")  # it began anew
    assert one.look() and one.latest.values == {"loss": 5.0}


def test_steps_that_were_over_before_the_first_look_say_nothing_of_the_time_left(tmp_path):
    file = tmp_path / "metrics.jsonl"
    one = Followed(file, 20)
    one.latest.clock = clock = Clock()
    file.write_text("".join(json.dumps({"step": step, "loss": 2.0}) + "\n" for step in range(5)))
    assert one.look() and one.latest.left is None
    clock.now += 3
    with file.open("a") as more:
        more.write(json.dumps({"step": 5, "loss": 2.0}) + "\n")
    assert one.look() and one.latest.left == 3 * 14


def test_what_an_earlier_run_left_is_not_told_as_new(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 3, "loss": 2.0}) + "\n")
    assert not Followed(file, 4).look()


def test_a_run_that_went_on_from_a_checkpoint_and_overtook_what_was_read_is_followed(tmp_path):
    """Its worker was killed and begun again between two looks: the old end is now in the middle of a line."""
    file = tmp_path / "metrics.jsonl"
    record = {"step": 0, "loss": 2.0, "seconds": 1}
    file.write_text(json.dumps(record) + "\n" + json.dumps(record | {"step": 1}) + "\n")
    one = Followed(file, 4)
    file.write_text(json.dumps(record) + "\n")
    with file.open("a") as more:
        for step in (1, 2):
            more.write(json.dumps(record | {"step": step, "loss": 3.0, "seconds": 1.25}) + "\n")
    assert one.look() and (one.latest.done, one.latest.values) == (3, {"loss": 3.0})


def test_a_piped_training_shows_life(tiny_tree, tmp_path, capfd):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_tree))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(config), "--out", str(tmp_path / "out")])
    out, err = capfd.readouterr()
    assert ended.value.code == 0
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0].split(":")[0] for line in lines] == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert "left: loss " in lines[1] and "step " not in out.split("4 steps in")[0]


def test_other_ranks_keep_quiet(tiny_tree, tmp_path, capfd, monkeypatch):
    from rlsafe.progress import run_bar

    monkeypatch.setenv("RANK", "1")
    with run_bar() as bar:
        bar.started("starting")
        bar.stepped(1, 1, {"loss": 1.0})
    assert capfd.readouterr().err == ""


@pytest.fixture
def progress(tmp_path, tiny_tree):
    config = tmp_path / "compare.yaml"
    tiny_tree.pop("sampler")
    config.write_text(
        yaml.safe_dump({"run": tiny_tree, "paths": {"sft": {}}, "defenses": {"none": []}, "seeds": [0, 1]})
    )
    return Progress([cell for cell in expand(load_compare(config)) if cell.kind == "narrow"])


@pytest.mark.parametrize("terminal", [True, False])
def test_each_run_of_a_comparison_has_a_bar_or_lines(progress, terminal, tmp_path):
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=140)
    progress.bar.live.console = progress.console
    cell, other = progress.cells
    for one in (cell, other):
        (tmp_path / "cells" / one.id).mkdir(parents=True)
    progress.start_many(2)
    progress.look(tmp_path)
    for one in (cell, other):
        (tmp_path / "cells" / one.id / "metrics.jsonl").write_text(
            json.dumps({"step": 0, "loss": 2.0, "reward": 0.5}) + "\n"
        )
    progress.look(tmp_path)
    if terminal:
        assert {progress.bar.tasks[i].description for i in progress.bars.values()} == {
            f"{one.label}: reward 0.5  loss 2" for one in (cell, other)
        }
        progress.finish(cell, 3.0, "")
        assert set(progress.bars) == {other.id} and len(progress.bar.tasks) == 2
    else:
        assert f"{cell.label}: step 1/4: loss 2  reward 0.5" in progress.console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_time_left_and_the_reward_fit_a_narrow_terminal(width):
    drawn, clock = io.StringIO(), Clock()
    console = Console(file=drawn, force_terminal=True, width=width, color_system=None)
    numbers = {"loss": 0.1234567, "reward": 0.5, "kl": 0.0123, "coherence": 89.4, "misaligned_general": 0.3125}
    with Bar(*bar_columns(), console=console, auto_refresh=False, expand=True) as bar:
        shown = RunBar(bar)
        shown.latest.clock = clock
        for done in (1, 2):
            clock.now += 5
            shown.stepped(done, 400, numbers | {"misaligned_indomain": 0.9375})
        bar.refresh()
    last = drawn.getvalue().rpartition("2/400")[2]
    assert "about 33 min left" in last and "reward 0.5  kl 0.0123" in last
    assert ("loss 0.123" in last) == (width == 140)
