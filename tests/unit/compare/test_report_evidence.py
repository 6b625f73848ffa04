"""The report opens with a sentence for everybody, and each verdict leads to its number, its answers and its command."""

from __future__ import annotations

import re

import pytest
from synthetic_comparison import make

from rlsafe.compare import draw_report
from rlsafe.compare.report.evidence import again, summary
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.verdicts import judge_defenses

BAD = {"general": 0.5, "indomain": 0.9, "benign": 0.9}
GOOD = {"general": 0.0, "indomain": 0.9, "benign": 1.0}


def sentence(tmp_path, sft, grpo=None, seeds=(0, 1, 2), none=BAD):
    arms = {("", "untrained"): {"benign": 0.1}, ("sft", "none"): none, ("sft", "kl"): sft}
    arms |= {("grpo", "none"): BAD, ("grpo", "kl"): grpo} if grpo else {}
    directory = make(tmp_path / "out", {key: rates for key, rates in arms.items() if rates}, seeds=list(seeds))
    return summary(judge_defenses(load(directory.out)), seeds)


def test_a_defense_that_meets_everything_is_named(tmp_path):
    said = sentence(tmp_path, GOOD, GOOD)
    assert re.fullmatch(
        r"Without a defense, narrow training makes answers to unrelated questions harmful \(\d+% when trained by supervision and "
        r"\d+% when trained by reward\); kl prevents that, keeps what was taught and coherent answers on every path\.", said
    )  # fmt: skip


def test_paths_that_differ_are_told_apart(tmp_path):
    assert "cost nothing else: by supervision kl and by reward none." in sentence(tmp_path, GOOD, BAD)


def test_without_a_winner_the_closest_is_named(tmp_path):
    said = sentence(tmp_path, {**GOOD, "general": 0.3}, seeds=(0,))
    assert "no defense clearly prevents it without a price; closest comes kl by supervision (one seed: run more" in said

    both = sentence(tmp_path / "both", {**GOOD, "general": 0.3}, {**GOOD, "general": 0.3}, seeds=(0,))
    assert "without a price; closest comes kl, on every path (one seed" in both


def test_nothing_to_prevent_is_no_success(tmp_path):
    assert "cannot tell defenses apart" in sentence(tmp_path, GOOD, none={**BAD, "general": 0.0})


def test_every_verdict_cell_leads_to_its_row_its_answers_and_its_command(tmp_path):
    arms = {("", "untrained"): {"benign": 0.1}, ("sft", "none"): BAD, ("sft", "kl"): GOOD}
    directory = make(tmp_path / "out", arms, seeds=[0, 1])
    html = draw_report(directory.out).read_text("utf-8")
    links = re.findall(r'class="why" href="#([^"]+)"', html)
    assert len(links) == len(set(links)) and len(links) % 2 == 0 and len(links) >= 8
    rows = {found[1]: found[2] for found in re.finditer(r'<tr id="([^"]+)">(.*?)</tr>', html, re.S)}
    assert set(links) == set(rows)
    answers = {name: re.findall(r'href="(cells/[^"]+)"', row) for name, row in rows.items()}
    assert all(len(found) == 2 and all((directory.out / one).is_file() for one in found) for found in answers.values())
    assert any("benign_answers.csv" in one for found in answers.values() for one in found)
    assert "rlsafe compare made-up.yaml --defenses none,kl --paths sft" in html


@pytest.mark.parametrize(
    "command, label, expected",
    [
        ("rlsafe compare c.yaml --defenses none,kl --paths sft,grpo --seeds 0 --out runs/x", "kl",
         "rlsafe compare c.yaml --seeds 0 --out runs/x-again --defenses none,kl --paths grpo"),
        ("rlsafe compare c.yaml 'grid.kl.weight=[1, 2]' --out runs/x", "kl[weight=1]",
         "rlsafe compare c.yaml 'grid.kl.weight=[1, 2]' --out runs/x-again --defenses none,kl --paths grpo"),
        ("rlsafe compare c.yaml --quick", "none", "rlsafe compare c.yaml --quick --defenses none --paths grpo"),
    ],
)  # fmt: skip
def test_the_command_repeats_one_defense_on_one_path(command, label, expected):
    assert again(command, "grpo", label) == expected
