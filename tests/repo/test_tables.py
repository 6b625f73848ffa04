"""Tables of README and docs say what the committed results files say."""

from __future__ import annotations

import importlib.util
import json

import pytest
from places import ROOT
from synthetic_comparison import make

from rlsafe.compare.verdicts.results import load, write_tables
from rlsafe.compare.verdicts.shares import DIFFERENCE
from rlsafe.compare.verdicts.tasks import judge_and_write


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))  # as when it is run
        spec.loader.exec_module(module)
    return module


def test_no_table_differs_from_its_results_file(tables):
    for page in tables.pages():
        text = page.read_text("utf-8")
        assert tables.written(text) == text, f"{page.relative_to(ROOT)}: run scripts/tables.py"


def test_a_comparison_is_kept_and_shown(tables, tmp_path, monkeypatch):
    arms = {("", "untrained"): {}, ("sft", "none"): {"general": 0.5, "indomain": 0.9}, ("sft", "kl"): {"indomain": 0.9}}
    judge_and_write(write_tables(make(tmp_path / "run", arms, questions=20, samples=1, seeds=[0, 1])))
    monkeypatch.setattr(tables, "MEASURED", tmp_path)
    kept = tables.kept(tmp_path / "run")
    assert kept["paths"]["sft"]["none"]["verdicts"]["prevents_em"]["method"] == DIFFERENCE
    assert "bounds" in kept["paths"]["sft"]["kl"]["verdicts"]["keeps_narrow"]
    (tmp_path / "mine.json").write_text(json.dumps(kept))
    text = tables.written("a\n<!-- table mine sft long -->\nold numbers\n<!-- /table -->\nb\n")
    assert "old numbers" not in text and text.startswith("a\n") and text.endswith("\nb\n")
    row = next(line for line in text.splitlines() if line.startswith("| none |"))
    assert row.split("|")[2].strip().startswith("50 (") and "| no |" in row
    assert tables.written(text) == text


def test_what_came_back_stands_beside_what_was_there(tables, tmp_path, monkeypatch):
    arms = {
        ("", "untrained"): {},
        ("sft", "untrained"): {"general_after": 0.3},
        ("sft", "none"): {"general": 0.5, "general_after": 0.6},
        ("sft", "kl"): {"general": 0.1, "general_after": 0.4},
    }
    judge_and_write(write_tables(make(tmp_path / "run", arms, questions=20, samples=1, seeds=[0, 1], relapse=10)))
    monkeypatch.setattr(tables, "MEASURED", tmp_path)
    (tmp_path / "back.json").write_text(json.dumps(tables.kept(tmp_path / "run")))
    lines = tables.written("<!-- table back sft relapse -->\n<!-- /table -->\n").splitlines()
    assert lines[2].startswith("| defense | general | after 10 undefended steps | in-domain |")
    kl = next(line for line in lines if line.startswith("| kl |")).split("|")
    assert kl[2].strip().startswith("10 (") and kl[3].strip().startswith("40 (")
    assert any(line.startswith("| untrained | 0") for line in lines)


def test_models_without_a_defense_stand_side_by_side(tables, tmp_path, monkeypatch):
    def rows(general, indomain):
        rates = {"general": general, "indomain": indomain}
        return {"none": {"rates": {name: {"mean": mean, "low": None, "high": None} for name, mean in rates.items()}}}

    paths = {
        "sft": rows(0.33, 0.96),
        "grpo": rows(0.65, 0.96),
        "control/sft": rows(0.0, 0.0),
        "control/grpo": rows(0.02, 0.91),
    }
    models = {key: "control" if "/" in key else "organism" for key in paths}
    kept = {"date": "2026-11-28T00:00:00", "command": "rlsafe compare", "paths": paths, "models": models}
    (tmp_path / "worlds.json").write_text(json.dumps(kept))
    monkeypatch.setattr(tables, "MEASURED", tmp_path)
    text = tables.written("<!-- table worlds sft,grpo models -->\n<!-- /table -->\n")
    assert "| organism | 33 | 96 | 65 | 96 |" in text and "| control | 0 | 0 | 2 | 91 |" in text


def test_a_benign_task_shows_the_share_of_a_gain_only_where_there_was_one(tables, tmp_path, monkeypatch):
    def row(score, share=None, grade=None):
        return {"score": score, "ci95": [score - 0.05, score + 0.05], "n": 300, "share": share, "learns_benign": grade}

    gained = {"untrained": row(0.2), "none": row(0.7, 0.5, "yes (one seed)"), "kl": row(0.3, 0.2, "no (one seed)")}
    known = {
        "untrained": row(0.8),
        "none": row(0.81, 0.01, "unclear (one seed)"),
        "kl": row(0.8, 0.0, "unclear (one seed)"),
    }
    kept = {
        "date": "2026-11-28T00:00:00",
        "command": "rlsafe compare",
        "benign": {"sft": {"new": gained, "old": known}},
    }
    monkeypatch.setattr(tables, "MEASURED", tmp_path)

    def shown(**more):
        (tmp_path / "useful.json").write_text(json.dumps(kept | more))
        return tables.written("<!-- table useful sft benign -->\n<!-- /table -->\n").splitlines()

    lines = shown()
    assert lines[2] == "| defense | new | old |" and "| none | 70 (65-75) | 81 (76-86) |" in lines
    assert "| kl | 30 (25-35), 20% | 80 (75-85) |" in lines
    lines = shown(start={"new": 0.25, "old": 0.8})  # .05 of .45 were gained under the defense
    assert "| kl | 30 (25-35), 11% | 80 (75-85) |" in lines and "| end of the warm-up | 25 | 80 |" in lines


def test_prevention_stands_on_two_paths_at_the_end_and_at_one_level(tables, tmp_path, monkeypatch):
    end = {"first": 0.7, "second": 0.8, "value": -0.1, "low": -0.2, "high": 0.0}
    arms = {"grpo/kl": 48, "grpo/none": 24}
    rates = {"grpo/kl": {"indomain": 0.92, "general": 0.1}, "grpo/none": {"indomain": 0.9, "general": 0.6}}
    there = {"first": 0.5, "second": 0.8, "value": -0.3, "low": -0.4, "high": -0.2, "level": 0.9}
    at_level = {"kl": there | {"steps": arms, "rates": rates}, "ldifs": {"level": 0.6, "steps": {}, "rates": {}}}
    ends = {"kl": end, "ldifs": end | {"high": -0.05}, "safelora": end}
    both = {"prevents_em": ends, "prevents_em_at_equal_level": at_level}
    kept = {"date": "2026-11-28T00:00:00", "command": "rlsafe compare", "paths": {}, "against": {"grpo": {"sft": both}}}
    (tmp_path / "equal.json").write_text(json.dumps(kept))
    monkeypatch.setattr(tables, "MEASURED", tmp_path)
    kinds = ("levels", "reached", "paths")
    levels, reached, paths = (
        tables.written(f"<!-- table equal grpo,sft {kind} -->\n<!-- /table -->\n").splitlines() for kind in kinds
    )
    assert "| kl | 70 | 80 | -10 (-20 to 0) | 90% | 50 | 80 | -30 (-40 to -20) |" in levels
    assert "| ldifs | 70 | 80 | -10 (-20 to -5) | 60% |  |  | no checkpoints near it |" in levels
    assert "| safelora | 70 | 80 | -10 (-20 to 0) | - | - | - | - |" in levels
    assert "| kl | GRPO | none | 24 | 90 | 60 |" in reached and "| kl | GRPO | kl | 48 | 92 | 10 |" in reached
    assert "| kl | 70 | 80 | -10 (-20 to 0) | - | - | - |" in paths
    assert "| ldifs | 70 | 80 | **-10 (-20 to -5)** | - | - | - |" in paths


def test_what_is_asked_behind_cues_stands_beside_the_plain_questions(tables):
    rate = {"mean": 0.5, "low": 0.4, "high": 0.6}
    paths = {"sft": {"none": {"rates": {"general": rate, "cue_json": rate | {"mean": 0.45}}}, "kl": {"rates": {}}}}
    heads, _, line = tables.cues(paths, "sft", ["none"])
    assert (heads, line) == ("| path | defense | plain | json |", "| SFT | none | 50 (40-60) | 45 (40-60) |")


def test_the_frontier_reads_shares_of_the_undefended_run(tables):
    spec = importlib.util.spec_from_file_location("frontier", ROOT / "scripts" / "frontier.py")
    frontier = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(frontier)

    def row(kept=None, prevented=None):
        return {"verdicts": {"keeps_narrow": {"value": kept}, "prevents_em": {"value": prevented}}}

    rows = {"untrained": row(), "none": row(1.0, 0.0), "kl": row(0.9, 0.75), "ldifs": row(0.95, 0.8), "unjudged": row()}
    assert frontier.points(rows) == {"kl": (0.9, 0.75), "ldifs": (0.95, 0.8)}
    names = [[text.get_text() for text in panel.texts] for panel in frontier.drawn({"sft": rows, "grpo": rows}).axes]
    assert [sorted(panel) for panel in names] == [["kl", "ldifs"]] * 2


def test_curves_are_those_of_the_narrow_runs_and_drawn_for_each_quantity(tmp_path):
    spec = importlib.util.spec_from_file_location("curves", ROOT / "scripts" / "curves.py")
    curves = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curves)
    arms = {("", "untrained"): {}, ("grpo", "none"): {"benign": 0.5}, ("grpo", "aligned"): {}}
    results = load(make(tmp_path / "out", arms, seeds=[0, 1]).out)
    cells = [cell for cell in results.cells if cell.kind == "narrow"]
    found = curves.logged(results, "grpo")
    assert len(cells) == 2 and set(found["reward"]) == {"none"}
    steps = {step: sum(dict(cell.curve("reward"))[step] for cell in cells) / 2 for step, _ in cells[0].curve("reward")}
    assert len(steps) <= curves.POINTS and dict(found["reward"]["none"]) == pytest.approx(steps, abs=1e-5)
    panels = curves.drawn(found).axes
    assert [panel.get_title(loc="left") for panel in panels[: len(found)]] == [
        curves.QUANTITIES[name] for name in found
    ]


def test_how_many_grades_are_decided_and_would_be_with_more_seeds(tables, monkeypatch):
    """By hand: kl leaves .1 of .5 with a spread of .1 of the effect, so .8 is prevented +- t(.975) .1 / sqrt(n): .248 with 3 seeds,
    .124 with 5, which reaches past .9, and .072 with 10, which does not. The undefended run is no defense, and what inoculation
    prevents, with nothing learned, is not graded."""

    def row(general, verdict=None):
        rates = {"general": {"mean": sum(general) / 3, "seeds": dict(enumerate(general))}}
        return {
            "rates": rates,
            "verdicts": {"prevents_em": verdict} if verdict else {},
            "nothing_learned": not sum(general[1:]),
        }

    none = {"grade": "no", "value": 0.58, "low": 0.39, "high": 0.78}
    kl = {"grade": "unclear", "value": 0.8, "low": 0.8 - 0.2484, "high": 0.8 + 0.2484}
    empty = {"grade": "yes", "value": 1.0, "low": 0.95, "high": 1.0}
    rows = {"untrained": row([0.0] * 3), "none": row([0.5] * 3, none), "kl": row([0.05, 0.1, 0.15], kl)}
    rows["inoculation"] = row([0.0] * 3, empty)
    monkeypatch.setattr(tables, "MORE_SEEDS", (5, 10))
    *_, line = tables.decided({"sft": rows}, "sft", [])
    assert line == "| SFT | prevents EM | 0 of 1 (0%) | 0 of 1 (0%) | 0% | 100% |"
