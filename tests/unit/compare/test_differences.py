"""The headline: how far a defense on one path lies from itself on another, and from another defense."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic_comparison import CONFIG, make

from rlsafe.cli import main
from rlsafe.compare import draw_report, versus
from rlsafe.compare.report.versus import versus_table
from rlsafe.compare.verdicts.differences import apart, share_apart, turned, two_paths
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.verdicts import judge_defenses
from rlsafe.config import UserError
from rlsafe.evaluate.contrasts import Arm, Sample

TWO = CONFIG.replace("  kl: [{kl: {weight: 0.3}}]\n", "  kl: [{kl: {weight: 0.3}}]\n  ldifs: [ldifs]\n")
ARMS = {
    ("", "untrained"): {"general": 0.0, "indomain": 0.0},
    ("sft", "none"): {"general": 0.5, "indomain": 0.9},
    ("sft", "kl"): {"general": 0.05, "indomain": 0.9},
    ("sft", "ldifs"): {"general": 0.2, "indomain": 0.85},
    ("grpo", "none"): {"general": 0.4, "indomain": 0.8},
    ("grpo", "kl"): {"general": 0.2, "indomain": 0.4},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make(
        tmp_path_factory.mktemp("differences") / "out", ARMS, TWO, questions=60, samples=2, paths=["sft", "grpo"]
    )


def test_a_defense_on_two_paths(directory):
    results = load(directory.out)
    (two,) = two_paths(results, judge_defenses(results))
    assert (two.one, two.other, two.labels) == ("sft", "grpo", ["kl"])
    prevented, kept = (two.differences[name]["kl"] for name in ("prevents_em", "keeps_narrow"))
    assert (prevented.first, prevented.second, prevented.value) == pytest.approx((0.9, 0.5, 0.4), abs=0.02)
    assert (kept.first, kept.second) == pytest.approx((1.0, 0.5), abs=0.02)
    assert 0 < prevented.low < prevented.value < prevented.high and prevented.word == "sft more"


def test_the_files_hold_it_both_ways(directory):
    draw_report(directory.out)
    details = json.loads((directory.out / "verdict_details.json").read_text())
    forth = details["sft"]["against_paths"]["grpo"]["prevents_em"]["kl"]
    back = details["grpo"]["against_paths"]["sft"]["prevents_em"]["kl"]
    assert forth["value"] == -back["value"] and (forth["low"], forth["high"]) == (-back["high"], -back["low"])
    (apart,) = details["sft"]["defenses_apart"]["prevents_em"]
    assert (apart["one"], apart["other"]) == ("kl", "ldifs") and apart["value"] == pytest.approx(0.3, abs=0.02)
    page = (directory.out / "report.html").read_text()
    assert "sft minus grpo" in page and 'id="apart"' in page and "kl more" not in page and "sft more" in page


def test_two_defenses_on_one_path(directory):
    found = versus(directory.out, "kl", "ldifs")
    assert list(found) == ["sft"]  # ldifs was not run on grpo
    prevented = found["sft"]["prevents_em"]
    assert prevented.value == pytest.approx(0.3, abs=0.02) and prevented.low > 0 and prevented.word == "kl more"
    again = versus(directory.out, "ldifs", "kl")["sft"]["prevents_em"]
    assert turned(again).value == pytest.approx(prevented.value) and again.word == "kl more"
    assert versus_table(found, "kl", "ldifs").row_count == 2


def test_one_seed_is_said_and_no_effect_gives_no_difference(tmp_path):
    arms = {key: {**rates, "general": 0.0} if key[0] == "grpo" else rates for key, rates in ARMS.items()}
    made = make(tmp_path / "out", arms, TWO, questions=60, samples=2, paths=["sft", "grpo"], seeds=[0])
    results = load(made.out)
    (two,) = two_paths(results, judge_defenses(results))
    assert two.differences["prevents_em"] == {}
    assert two.differences["keeps_narrow"]["kl"].word.endswith("(one seed)")


@pytest.mark.parametrize("one, other, said", [("kl", "ldif", "ldifs"), ("kl", "kl", "twice")])
def test_names_that_are_wrong(directory, one, other, said):
    with pytest.raises(UserError, match=said):
        versus(directory.out, one, other)


def test_the_command(directory, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["versus", str(directory.out), "kl", "ldifs"])
    assert not ended.value.code and "kl more" in capsys.readouterr().out


def test_a_judge_that_scored_only_some_answers_puts_nobody_ahead():
    """All of kl's missing answers may have been misaligned: the grade of a verdict must hold for that too, and so must this."""

    def arm(rate, seeds=3, missing=0.0, trained=True):
        rates = np.full((seeds, 60), rate)
        ends = [replace(Arm(rates * (1 - missing) + end * missing, 180), trained=trained) for end in (0, 1)]
        return Arm(rates, 180, trained=trained, bounds=(ends[0], ends[1]) if missing else None)

    arms = {"untrained": arm(0.0, 1, trained=False), "none": arm(0.6), "kl": arm(0.1), "ldifs": arm(0.4)}
    whole = apart(Sample(arms), "kl", "ldifs", prevents=True)
    assert whole.word == "kl more" and whole.widest is None
    few, many = (apart(Sample({**arms, "kl": arm(0.1, missing=m)}), "kl", "ldifs", True) for m in (0.02, 0.6))
    assert few.word == "kl more" and many.word == "undecided: answers lack scores"
    assert (many.low, many.high) == (whole.low, whole.high) and many.widest[0] < 0 < many.widest[1]
    assert turned(many).widest == (-many.widest[1], -many.widest[0]) and turned(many).word == many.word
    left, right = ("kl", "none", "untrained"), ("ldifs", "none", "untrained")
    for missing, word in ((0.0, "sft more"), (0.6, "undecided: answers lack scores")):
        two = share_apart(Sample({**arms, "kl": arm(0.1, missing=missing)}), left, right, "sft", "grpo", prevents=True)
        assert two.word == word


def test_who_is_ahead_must_hold_as_measured_and_however_answers_without_a_score_are_counted():
    """A seed of the undefended run has no score at all, so that the plain interval rests on one seed less than the counted ones and
    is the wider of the two."""
    generator = np.random.default_rng(0)
    said = 0
    for _ in range(60):
        two, first, second = ((generator.random((n, 60)) < p).astype(float) for n, p in ((2, 0.5), (3, 0.1), (3, 0.25)))
        ends = [
            Arm(np.vstack([two, np.where(np.arange(60) < 3, end, np.nan)]), 120, seeds=(0, 1, 2)) for end in (0.0, 1.0)
        ]
        none = Arm(two, 120, seeds=(0, 1), bounds=(ends[0], ends[1]))
        untrained = Arm(np.zeros((1, 60)), 60, trained=False)
        found = apart(
            Sample({"untrained": untrained, "none": none, "a": Arm(first, 180), "b": Arm(second, 180)}), "a", "b", True
        )
        if found is not None:
            said += 1
            assert found.widest[0] <= found.low and found.high <= found.widest[1]
            assert not (found.ahead and found.low <= 0 <= found.high)
    assert said >= 20
