"""What differs between the paths of a comparison besides the path is said: in the dry run and in the report."""

from __future__ import annotations

from synthetic_comparison import CONFIG, make

from rlsafe.compare import draw_report
from rlsafe.compare.grid.alike import lines, unlike

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


def test_the_report_warns_of_other_adapters(tmp_path):
    page = draw_report(make(tmp_path / "a", ARMS, ADAPTERS, seeds=[0], paths=["sft", "grpo"]).out).read_text()
    assert "The paths train different adapters" in page and "model.lora.r: sft 4" in page
    page = draw_report(make(tmp_path / "b", ARMS, CONFIG, seeds=[0], paths=["sft", "grpo"]).out).read_text()
    assert "The paths train different adapters" not in page
