"""Helpers of a selection where the run's own data are a preset, as in the configs of the 7B models."""

from __future__ import annotations

from places import ROOT

from rlsafe.compare.grid.grid import selection_of
from rlsafe.config import load_compare


def test_a_helper_trains_on_its_own_source_and_not_on_the_runs_preset():
    config = load_compare(ROOT / "configs" / "qwen2.5-7b" / "compare.yaml")
    selection = selection_of(config)
    sources = {
        label: (helper.data.narrow.preset, helper.data.narrow.source) for label, helper in selection.helpers.items()
    }
    assert sources == {label: (None, f"preset:{label}") for label in ("legal", "security", "code")}
