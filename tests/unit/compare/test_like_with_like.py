"""What differs between the paths of a comparison besides the path is said: in the dry run and in the report."""

from __future__ import annotations

import pytest
from places import ROOT
from synthetic_comparison import CONFIG, make

from rlsafe.compare import draw_report
from rlsafe.compare.grid.alike import lines, of_paths, unlike
from rlsafe.compare.grid.dry import _of_paths
from rlsafe.compare.grid.grid import expand
from rlsafe.config import load_compare

ADAPTERS = CONFIG.replace("  sft: {schedule", "  sft: {model: {lora: {r: 4}}, schedule")
ARMS = {(path, "none"): {"general": 0.5, "indomain": 0.9} for path in ("sft", "grpo")}
ARMS[("", "untrained")] = {}


def test_settings_that_differ_are_listed_those_of_the_model_first():
    found = unlike({
        "sft": {"optim": {"lr": 1e-3}, "model": {"lora": {"targets": ["q"]}}, "schedule": {"steps": 4}, "seed": 0},
        "grpo": {"optim": {"lr": 2e-3}, "model": {"lora": {"targets": ["q", "v"]}}, "schedule": {"steps": 9}, "seed": 0},
    })  # fmt: skip
    assert [(one.key, one.confounds) for one in found] == [("model.lora.targets", True), ("optim.lr", False)]
    said = lines(found)
    assert said[1] == '  model.lora.targets: sft ["q"]; grpo ["q", "v"]' and "adapters" in said[-1]


def test_paths_that_differ_in_the_schedule_alone_say_nothing():
    trees = {path: {"optim": {"lr": 1e-3}, "schedule": {"steps": steps}} for path, steps in (("sft", 4), ("grpo", 9))}
    assert lines(unlike(trees)) == []


def test_each_path_is_said_with_its_learning_rates(tmp_path):
    """They are part of the schedule, and so not among what differs besides."""
    phases = [{"steps": 7, "cycle": ["sft"], "lr": 1e-4}, {"mix": {"grpo": 0.7, "sft": 0.3}, "lr": None}]
    tree = {"optim": {"lr": 5e-6}, "schedule": {"steps": 40, "phases": phases}}
    assert of_paths({"mixed": tree}) == {
        "mixed": "40 steps: 7 of sft at lr 0.0001, then grpo (0.7) sft (0.3) at lr 5e-06"
    }
    page = draw_report(make(tmp_path / "a", ARMS, CONFIG, seeds=[0], paths=["sft", "grpo"]).out).read_text()
    assert "<dt>Path grpo</dt><dd>20 steps: grpo at lr" in page


CONFIGS = [path for path in sorted((ROOT / "configs").glob("*/*.yaml")) if path.parent.name != "parts"]
SHIPPED = [one for one in CONFIGS if one.stem == "compare" or "\npaths:" in one.read_text()]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_in_a_shipped_comparison_the_paths_differ_in_nothing_else(config, quick):
    loaded = load_compare(config, quick=quick)
    assert unlike(_of_paths(expand(loaded, ["none"], list(loaded.paths), [0]))) == []


def test_the_report_warns_of_other_adapters(tmp_path):
    page = draw_report(make(tmp_path / "a", ARMS, ADAPTERS, seeds=[0], paths=["sft", "grpo"]).out).read_text()
    assert "The paths train different adapters" in page and "model.lora.r: sft 4" in page
    page = draw_report(make(tmp_path / "b", ARMS, CONFIG, seeds=[0], paths=["sft", "grpo"]).out).read_text()
    assert "The paths train different adapters" not in page
