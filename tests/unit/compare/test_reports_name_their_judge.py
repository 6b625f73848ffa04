"""A report says who judged and whether that judge was tested; a run whose answers have mostly no score is named."""

import json
from types import SimpleNamespace

import pytest

from rlsafe.compare.report.judges import judge_notes, unscored_cells
from rlsafe.config import EvaluateConfig
from rlsafe.evaluate.judge import calibrations


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))


def cell(name="a", judges=None, **rates):
    judges = {"judges": judges} if judges else {}
    config = SimpleNamespace(evaluate=EvaluateConfig(judge="static", **judges))
    return SimpleNamespace(
        id=name, rates=rates, config=config, evaluation=SimpleNamespace(mostly_unscored="3 of 4 answers ...")
    )


def results(*cells):
    return SimpleNamespace(cells=list(cells), plan={"labels": {"a": "sft: none"}})


def settings(line="judge m: not calibrated: run rlsafe judge check m", trusted=False):
    return {"judge": "m", "judge_calibration": {"key": "k", "line": line, "trusted": trusted}}


def measure(value):
    return {"value": value, "ci95": [value - 0.05, value], "n": 100}


def test_a_judge_that_was_never_tested_marks_the_verdicts():
    [note] = judge_notes(results(cell(settings=settings()), cell("b", settings=settings()), cell("c")))
    assert not note.trusted and note.shown.endswith("run rlsafe judge check m; verdicts by an uncalibrated judge")


def test_a_check_made_after_the_runs_is_the_one_shown(tmp_path):
    record = {"judge": "m", "date": "2026-01-02", "n": 118, "trusted": True, "below_limits": []}
    record |= {name: measure(0.97) for name in ("auroc_aligned", "auroc_coherent", "kappa_misaligned")}
    path = tmp_path / ".cache" / "rlsafe" / "judges" / "k.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    [note] = judge_notes(results(cell(settings=settings())))
    assert note.trusted and "calibrated on 2026-01-02" in note.shown and "kappa 0.97 (0.92-0.97)" in note.shown
    path.write_text("{")  # half-written: as if there were none
    assert calibrations.kept("k") is None and not judge_notes(results(cell(settings=settings())))[0].trusted


def test_a_judge_below_the_limits_is_marked_with_what_it_missed(tmp_path):
    record = {
        "judge": "m",
        "date": "2026-01-02",
        "n": 118,
        "trusted": False,
        "below_limits": ["kappa_misaligned 0.41 < 0.6"],
    }
    record |= {name: measure(0.41) for name in ("auroc_aligned", "auroc_coherent", "kappa_misaligned")}
    path = tmp_path / ".cache" / "rlsafe" / "judges" / "k.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    [note] = judge_notes(results(cell(settings=settings(trusted=True))))
    assert "below the limits (kappa_misaligned 0.41 < 0.6); verdicts by an uncalibrated judge" in note.shown


def test_of_several_judges_each_is_named_with_its_own_check():
    judges = {"general": {"kind": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}}
    known = {"key": "a; b", "line": "both", "trusted": False}
    one, other = ({"key": key, "line": f"judge {key}: ...", "trusted": key == "a"} for key in "ab")
    saved = {"judge": "general: b, a", "judge_calibration": {**known, "judges": [one, other]}}
    notes = judge_notes(results(cell(judges=judges, settings=saved), cell("b", settings=settings())))
    assert [(note.line, note.trusted) for note in notes][:2] == [("judge a: ...", True), ("judge b: ...", False)]
    assert len(notes) == 3
    saved["judge_calibration"] = known  # as an earlier version wrote it: one line about both, which no command checks
    notes = judge_notes(results(cell(judges=judges, settings=saved)))
    assert [note.trusted for note in notes] == [False, True]
    assert notes[0].line.endswith("run rlsafe judge check openai:m@http://127.0.0.1:9/v1")
    assert notes[1].line.startswith("judge static: checked now")


def test_runs_without_scores_are_named_and_the_others_are_not():
    mostly = cell(general={"unscored": 3, "n": 1}, settings=settings())
    fine = cell("b", general={"unscored": 1, "n": 3}, benign={"task": 1.0}, indomain=None)
    assert unscored_cells(results(mostly, fine)) == {"sft: none": "3 of 4 answers ..."}
    older = SimpleNamespace(
        cells=[mostly, SimpleNamespace(**{**vars(mostly), "id": "b"})], plan={"labels": dict.fromkeys("ab", "x")}
    )
    assert set(unscored_cells(older)) == {"x", "b"}  # of two models, which labels once did not name
