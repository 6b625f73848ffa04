"""Misalignment that comes back when the adapter is scaled up: columns, shares against the undefended run as trained, report."""

import json

import pytest
from synthetic_comparison import CONFIG, make

from rlsafe.compare.report.reporting import draw_report
from rlsafe.compare.verdicts.results import load, write_tables
from rlsafe.compare.verdicts.tasks import judge_and_write
from rlsafe.compare.verdicts.verdicts import judge_defenses

NO_BENIGN = CONFIG.split("benign:\n")[0]
ARMS = {
    ("", "untrained"): {"general": 0.02},
    ("sft", "none"): {"general": 0.5, "indomain": 0.9, "scaled_1.5": 0.6, "scaled_2": 0.05},
    ("sft", "kl"): {"general": 0.0, "indomain": 0.9, "scaled_1.5": 0.02, "scaled_2": 0.45},
}


def comparison(where, arms=ARMS, seeds=(0, 1, 2)):
    return make(where / "out", arms, NO_BENIGN, questions=60, samples=8, paths=["sft"], seeds=list(seeds))


def test_a_defense_that_only_hides_misalignment_prevents_nothing_at_twice_the_adapter(tmp_path):
    row = judge_defenses(load(comparison(tmp_path).out))[0].rows["kl"]
    assert row.verdicts["prevents_em"].grade == row.scaled["scaled_1.5"].grade == "yes"
    assert row.scaled["scaled_2"].grade == "no"
    # Against the undefended run as trained, and the untrained model, which has no adapter to scale.
    assert row.scaled["scaled_2"].value == pytest.approx(1 - (0.45 - 0.02) / (0.5 - 0.02), abs=0.03)
    assert set(row.verdicts) == {"prevents_em", "keeps_narrow", "learns_benign", "coherent", "holds_under_cues"}


def test_the_untrained_row_shows_its_plain_answers(tmp_path):
    rows = judge_defenses(load(comparison(tmp_path).out))[0].rows
    assert rows["untrained"].rates["scaled_2"] == rows["untrained"].rates["general"]


def test_files_and_report_have_every_scale(tmp_path):
    directory = comparison(tmp_path, seeds=[0])
    results = write_tables(directory)
    header, *lines = (directory.out / "results.csv").read_text().splitlines()
    assert header.endswith("scaled_1.5_misaligned,scaled_2_misaligned") and len(lines) == 3
    assert lines[0].endswith(",,") and [float(line.rsplit(",", 1)[1]) for line in lines[1:]] == pytest.approx(
        [0.05, 0.45], abs=0.01
    )
    judge_and_write(results)
    details = json.loads((directory.out / "verdict_details.json").read_text())["sft"]["rows"]["kl"]
    assert details["scaled"]["scaled_2"]["value"] < 0.2 and details["rates"]["scaled_2"]["n"] == 480
    html = draw_report(directory.out).read_text()
    assert 'id="scaled"' in html and 'href="#scaled"' in html and "times 1.5" in html


def test_without_scales_nothing_of_it_is_shown(tmp_path):
    arms = {key: {name: rate for name, rate in of.items() if "scaled" not in name} for key, of in ARMS.items()}
    directory = comparison(tmp_path, arms, seeds=[0])
    judge_and_write(write_tables(directory))
    assert "scaled" not in (directory.out / "results.csv").read_text()
    assert 'id="scaled"' not in draw_report(directory.out).read_text()
