"""How many seeds would make one grade of a verdict that is not one yet."""

from __future__ import annotations

import json
import math

import pytest
from synthetic_comparison import make

from rlsafe.compare.report.reporting import draw
from rlsafe.compare.run.runner import Comparison
from rlsafe.compare.verdicts.grades import Verdict
from rlsafe.compare.verdicts.power import MOST, seeds_needed, undecided
from rlsafe.compare.verdicts.results import load, write_tables
from rlsafe.compare.verdicts.shares import DIFFERENCE
from rlsafe.compare.verdicts.tasks import judge_and_write


def t(value, half, grade="at least partly"):
    return Verdict(grade, value, value - half, value + half)


def test_the_interval_shrinks_as_students_t_over_the_root_of_the_seeds():
    """By hand: with 3 seeds t = 4.303, so .3 is .1208 spreads wide; .8 is clear of .9 once t / sqrt(n) * .1208 < .1: at 6 seeds
    2.571 / 2.449 * .1208 = .127, at 7 2.447 / 2.646 * .1208 = .112, at 8 2.365 / 2.828 * .1208 = .101, at 9 .093."""
    assert seeds_needed(t(0.8, 0.3), 3, "prevents_em") == 9
    assert seeds_needed(Verdict("unclear", 0.05, -0.05, 0.15), 3, "coherent") == 10  # .03 above 2 points
    assert seeds_needed(Verdict("unclear", 0.95, 0.45, 0.96), 2, "keeps_narrow") < 10  # each side shrinks by itself


def test_what_is_decided_or_has_no_interval_over_seeds_needs_none_and_a_value_on_the_limit_is_never_told_apart():
    assert seeds_needed(t(0.7, 0.1, "partly"), 3, "prevents_em") is None
    assert seeds_needed(Verdict("untested"), 3, "prevents_em") is None
    assert seeds_needed(t(0.8, 0.3), 1, "prevents_em") is None
    assert seeds_needed(Verdict("unclear", 0.8, -math.inf, math.inf), 3, "prevents_em") is None
    assert seeds_needed(t(0.8999, 0.3), 3, "prevents_em") is None and MOST == 100


def test_what_answers_without_a_score_leave_open_no_seed_settles():
    """.936 to .982 is a yes, but the answers without a score may bring it down to .88: in every further seed as well."""
    open_ = Verdict("at least partly", 0.96, 0.936, 0.982, bounds=(0.88, 0.99))
    assert seeds_needed(open_, 5, "prevents_em") is None
    fewer = Verdict(
        "at least partly", 0.96, 0.936, 0.982, bounds=(0.92, 0.99)
    )  # .92 - .024 t / sqrt(n) above .9: from 6 seeds on
    assert 5 < seeds_needed(fewer, 5, "prevents_em") < 10


def test_a_run_without_defense_is_settled_when_its_rise_is():
    """By hand: 3 seeds, +.117 [-.147, +.380]: .264 / (4.303 / 3 ** .5) = .106; below .117 once t / sqrt(n) < 1.10: at 6 seeds 1.05."""
    rise = Verdict("unclear", 0.117, -0.147, 0.380, method=DIFFERENCE)
    assert seeds_needed(rise, 3, "prevents_em") == seeds_needed(rise, 3, "keeps_narrow") == 6


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Two seeds of a defense that leaves a fifth, give or take."""
    arms = {
        ("", "untrained"): {},
        ("sft", "none"): {"general": 0.5, "indomain": 0.9},
        ("sft", "kl"): {"general": 0.1, "indomain": 0.9},
    }
    made = make(tmp_path_factory.mktemp("run") / "out", arms, questions=40, samples=1, seeds=[0, 1], paths=["sft"])
    return write_tables(made)


def test_files_report_and_terminal_say_how_many_seeds_would_settle_it(spread):
    tables = judge_and_write(spread)
    details = json.loads((spread.directory.out / "verdict_details.json").read_text())
    found = {name: one["seeds_needed"] for name, one in details["sft"]["rows"]["kl"]["verdicts"].items()}
    wide = [
        name
        for name, one in details["sft"]["rows"]["kl"]["verdicts"].items()
        if not one["decided"] and one["grade"] != "untested"
    ]
    assert wide and {name for name, seeds in found.items() if seeds} <= set(wide)
    sentence = undecided(tables)
    assert sentence.startswith(f"{len(wide)} of ") and "verdicts are not one grade yet" in sentence
    assert sentence in draw(spread, tables).read_text()
    shown = Comparison(spread.directory.out, spread.directory.out / "report.html", tables).table()
    assert sentence in list(map(str, shown.renderables))


def test_one_seed_foretells_nothing(tmp_path):
    arms = {("", "untrained"): {}, ("sft", "none"): {"general": 0.5}, ("sft", "kl"): {"general": 0.1}}
    results = write_tables(make(tmp_path / "out", arms, questions=20, samples=1, seeds=[0], paths=["sft"]))
    assert undecided(judge_and_write(results)) == ""
    assert "one grade yet" not in draw(load(results.directory.out), judge_and_write(results)).read_text()
