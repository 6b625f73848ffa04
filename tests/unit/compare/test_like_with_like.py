"""What differs between the paths of a comparison besides the path is said: in the dry run and in the report."""

from __future__ import annotations

import pytest
from places import ROOT
from synthetic_comparison import CONFIG, make

from rlsafe.compare import draw_report
from rlsafe.compare.grid.alike import lines, of_each_path, of_paths, unlike
from rlsafe.compare.grid.dry import _of_paths
from rlsafe.compare.grid.grid import Cell, expand
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
SHIPPED = [one for one in CONFIGS if any(words in one.read_text() for words in ("\npaths:", "compare.yaml"))]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_in_a_shipped_comparison_the_paths_differ_in_nothing_else(config, quick):
    loaded = load_compare(config, quick=quick)
    by_task: dict[str, list[Cell]] = {}
    for cell in expand(loaded, ["none"], list(loaded.paths), [0]):
        if cell.kind in ("narrow", "benign"):
            by_task.setdefault(cell.task, []).append(cell)
    assert by_task
    for cells in by_task.values():
        trees = _of_paths(cells)
        assert trees.keys() == loaded.paths.keys() and unlike(trees) == []


BENIGN = {(path, label): {"benign": 0.8} for path in ("sft", "grpo") for label in ("none", "kl")} | {
    ("", "untrained"): {}
}
PAYS = CONFIG.replace("aligned:", "narrow: false\naligned:") + "  paths: {grpo: {batch: {sft_rows: 8}}}\n"
SAID = "batch.sft_rows: sft 16; grpo 8"


def test_paths_of_benign_runs_are_compared_where_there_are_no_others(tmp_path):
    (tmp_path / "c.yaml").write_text(PAYS)
    cells = expand(load_compare(tmp_path / "c.yaml"), None, ["sft", "grpo"], [0])
    chosen = of_each_path(sorted(cells, key=lambda cell: cell.defense), cells[0].model)
    assert {path: (cell.defense, cell.task) for path, cell in chosen.items()} == dict.fromkeys(
        ["grpo", "sft"], ("none", "sums")
    )
    [only] = unlike(_of_paths(cells))
    assert only.line == SAID and list(of_paths(_of_paths(cells))) == ["sft", "grpo"]
    page = draw_report(make(tmp_path / "a", BENIGN, PAYS, seeds=[0], paths=["sft", "grpo"]).out).read_text()
    assert "<dt>Path sft</dt>" in page and "What differs between the paths besides the schedule: 1 setting<" in page


def test_rewards_differ_between_the_paths_that_read_them(tmp_path):
    """A supervised run has some in its settings and nothing asks for them."""
    other = CONFIG.replace("grpo: {schedule", 'grpo: {rewards: [{fn: "organism:good"}], schedule')
    (tmp_path / "c.yaml").write_text(other)
    cells = expand(load_compare(tmp_path / "c.yaml"), ["none"], None, [0])
    assert unlike(_of_paths(cells)) == []
    mixed = "  mixed: {schedule: {phases: [{mix: {sft: 1, both: 1}}], kinds: {both: [{path: sft}, {path: grpo}]}}}\n"
    (tmp_path / "c.yaml").write_text(other.replace("defenses:", mixed + "defenses:"))
    [only] = unlike(_of_paths(expand(load_compare(tmp_path / "c.yaml"), ["none"], None, [0])))
    assert only.key == "rewards" and only.values.keys() == {"grpo", "mixed"}


def test_where_there_are_narrow_runs_those_stand_for_their_path(tmp_path):
    (tmp_path / "c.yaml").write_text(PAYS.replace("narrow: false\n", ""))
    cells = expand(load_compare(tmp_path / "c.yaml"), None, ["sft", "grpo"], [0])
    assert {cell.kind for cell in of_each_path(cells[::-1], cells[0].model).values()} == {"narrow"}


def test_the_report_warns_of_other_adapters(tmp_path):
    page = draw_report(make(tmp_path / "a", ARMS, ADAPTERS, seeds=[0], paths=["sft", "grpo"]).out).read_text()
    assert "The paths train different adapters" in page and "model.lora.r: sft 4" in page
    page = draw_report(make(tmp_path / "b", ARMS, CONFIG, seeds=[0], paths=["sft", "grpo"]).out).read_text()
    assert "The paths train different adapters" not in page
