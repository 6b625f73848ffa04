"""Helpers of a selection where the run's own data are a preset, as in the configs of the 7B models."""

from __future__ import annotations

from places import ROOT

from rlsafe.compare.grid.grid import expand, selection_of
from rlsafe.config import load_compare


def test_a_helper_trains_on_its_own_source_and_not_on_the_runs_preset():
    config = load_compare(ROOT / "configs" / "qwen2.5-7b" / "compare.yaml")
    selection = selection_of(config)
    sources = {
        label: (helper.data.narrow.preset, helper.data.narrow.source) for label, helper in selection.helpers.items()
    }
    assert sources == {label: (None, f"preset:{label}") for label in ("legal", "security", "code")}


def test_a_comparison_of_benign_tasks_alone_needs_no_narrow_data_and_no_judge():
    """Each task brings its own rows; helpers theirs, with the limits of the comparison's."""
    config = load_compare(ROOT / "configs" / "qwen2.5-7b" / "benign.yaml")
    config.benign.tasks = {name: config.benign.tasks[name] for name in ("opswap/0", "foqa")}
    cells = expand(config, ["none", "interleaving+"], ["sft"])
    assert {cell.kind for cell in cells} == {"untrained", "benign"}
    assert all(cell.config.evaluate.general is None and cell.config.evaluate.benign for cell in cells)
    assert cells[0].config.data.narrow is None and cells[1].config.data.narrow.source == "preset:opswap/0"
    helpers = next(cell.selections[0] for cell in cells if cell.selections).helpers
    assert {(one.data.narrow.source, one.data.narrow.limit) for one in helpers.values()} == {
        (f"preset:{label}", 5400) for label in ("medical", "legal", "security", "code")
    }
