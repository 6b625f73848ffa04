"""keeps_narrow is graded on `evaluate.narrow` where it is set, on every path; else on in-domain misalignment."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from rich.console import Console
from synthetic_comparison import CONFIG, make

from rlsafe.compare.report.reporting import draw_report
from rlsafe.compare.report.table import verdict_table
from rlsafe.compare.verdicts.results import load, write_tables
from rlsafe.compare.verdicts.verdicts import judge_defenses
from rlsafe.evaluate import Evaluation
from rlsafe.evaluate.measure.narrow import NarrowAnswer

PLAIN = CONFIG.replace("cue: Give", "narrow: {reward: 'mine.py:fn', rows: held.jsonl}, cue: Give")
RATES = {"general": 0.5, "indomain": 0.9, "benign": 0.9}
ARMS = {
    ("", "untrained"): {"general": 0.0, "indomain": 0.0},
    **{(path, label): RATES for path in ("sft", "grpo") for label in ("none", "kl")},
}
MEANS = {"untrained": 0.2, "none": 0.9, "kl": 0.3}  # the judge sees no difference between none and kl, the reward does


@pytest.fixture
def compared(tmp_path):
    """A comparison whose cells have rewards of held-out prompts, `scale` times those of MEANS from `base` on."""

    def made(scale=1.0, base=0.0, config=PLAIN):
        directory = make(tmp_path / "out", ARMS, config, questions=30, samples=4)
        for cell in load(directory.out).cells:
            found = Evaluation.load(cell.where)
            found.narrow_answers = [
                NarrowAnswer("evaluated", i, 0, f"q{i}", "a", base + scale * (MEANS[cell.defense] + (i % 5 - 2) / 50))
                for i in range(40)
                if cell.kind in ("narrow", "untrained")
            ]
            found.save(cell.where)
        return write_tables(directory)

    return made


@pytest.mark.parametrize(("scale", "base"), [(1.0, 0.0), (0.5, 0.25), (80.0, -66.0)])
def test_the_reward_decides_on_every_path_whatever_its_units(compared, scale, base):
    tables = judge_defenses(compared(scale, base))
    assert [table.path for table in tables] == ["sft", "grpo"]
    for table in tables:
        kl, none = (table.rows[label] for label in ("kl", "none"))
        assert kl.verdicts["keeps_narrow"].grade == "no" and kl.nothing_learned
        assert kl.verdicts["keeps_narrow"].value == pytest.approx(1 / 7)
        assert (
            none.verdicts["keeps_narrow"].grade == "yes"
            and "the reward of held-out prompts" in none.verdicts["keeps_narrow"].reason
        )
        assert kl.rates["narrow"].mean == pytest.approx(base + scale * 0.3) and kl.rates["narrow"].n == 120


def test_without_it_the_judge_decides(compared, tmp_path):
    directory = make(tmp_path / "plain", ARMS, CONFIG, questions=30, samples=4)
    (table, _) = judge_defenses(write_tables(directory))
    assert table.rows["kl"].verdicts["keeps_narrow"].grade == "yes" and "narrow" not in table.rows["kl"].rates


def test_it_stands_in_the_table_the_files_and_the_report(compared):
    results = compared(80.0, -66.0)
    with open(results.directory.out / "results.csv", newline="") as file:
        rows = {(row["path"], row["defense"], row["seed"]): row["narrow_score"] for row in csv.DictReader(file)}
    assert float(rows["grpo", "none", "0"]) == pytest.approx(6.0) and float(
        rows["sft", "untrained", "0"]
    ) == pytest.approx(-50.0)
    console = Console(width=220, record=True, file=open("/dev/null", "w"))
    console.print(verdict_table(judge_defenses(results)))
    assert "narrow reward" in (text := console.export_text()) and "6 (" in text
    draw_report(results.directory.out)
    page = (results.directory.out / "report.html").read_text()
    assert "reward of held-out prompts" in page and "-50 (" in page
    details = json.loads((results.directory.out / "verdict_details.json").read_text())
    assert details["sft"]["rows"]["kl"]["rates"]["narrow"]["mean"] == pytest.approx(-42.0)


def without(results, defense, rows):
    """The same results, where no answer of a defense (None: of anyone) to these prompts has a reward."""
    for cell in results.cells:
        if cell.kind in ("narrow", "untrained") and defense in (None, cell.defense):
            found = Evaluation.load(cell.where)
            found.narrow_answers = [
                replace(one, reward=None) if one.row in rows else one for one in found.narrow_answers
            ]
            found.save(cell.where)
    return write_tables(results.directory)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_answers_without_a_reward_decide_nothing(compared, monkeypatch, scale):
    """Half of the defense's answers have none: those may have been as bad as any. Prompts without one in every run do not count."""
    monkeypatch.setitem(MEANS, "kl", 0.9)
    found = judge_defenses(compared(scale))[0].rows["kl"].verdicts["keeps_narrow"]
    assert found.grade == "yes" and found.bounds is None
    everywhere = judge_defenses(without(compared(scale), None, range(20)))[0].rows["kl"].verdicts["keeps_narrow"]
    assert everywhere.grade == "yes" and everywhere.bounds is None
    lost = judge_defenses(without(compared(scale), "kl", range(20)))[0].rows["kl"].verdicts["keeps_narrow"]
    assert not lost.decided and "yes if answers without a score" in lost.reason
    assert lost.bounds[0] == pytest.approx((0.9 / 2 - 0.2) / 0.7, abs=0.02) and lost.value == pytest.approx(
        1.0, abs=0.02
    )


def test_only_narrow_runs_and_the_untrained_model_are_asked(compared):
    asked = {cell.kind: cell.config.evaluate.narrow is not None for cell in compared().cells}
    assert asked == {"narrow": True, "untrained": True, "benign": False} or asked == {"narrow": True, "untrained": True}


def rewarded(tmp_path, rewards, prompts):
    """One seed; rewards: defense -> the reward of every prompt."""
    directory = make(tmp_path / "out", ARMS, PLAIN, questions=30, samples=4, seeds=[0])
    for cell in load(directory.out).cells:
        found = Evaluation.load(cell.where)
        found.narrow_answers = [
            NarrowAnswer("evaluated", i, 0, f"q{i}", "a", rewards[cell.defense])
            for i in range(prompts)
            if cell.kind in ("narrow", "untrained")
        ]
        found.save(cell.where)
    return judge_defenses(write_tables(directory))[0].rows["kl"]


def test_one_prompt_says_nothing_of_others(tmp_path):
    row = rewarded(tmp_path, {"untrained": 0.0, "none": 0.5, "kl": 0.46}, prompts=1)
    assert row.verdicts["keeps_narrow"].grade == "unclear"
    draw_report(tmp_path / "out")


def test_rewards_of_nought_or_one_that_are_all_alike_still_have_an_interval(tmp_path):
    row = rewarded(tmp_path, {"untrained": 0.0, "none": 1.0, "kl": 1.0}, prompts=10)
    verdict = row.verdicts["keeps_narrow"]
    assert verdict.low < 0.9 < verdict.high and verdict.grade != "yes" and row.rates["narrow"].low < 0.95
