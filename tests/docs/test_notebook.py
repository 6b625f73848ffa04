"""The notebook runs from its first cell to its last, with tiny budgets (its code cells, in order, in one namespace)."""

from __future__ import annotations

import json

import pytest
from places import ROOT

pytestmark = pytest.mark.docs
NOTEBOOK = ROOT / "docs" / "tutorials" / "notebook.ipynb"
TINY = """steps = 2
settings = ["evaluate.limit=2", "evaluate.samples=1", "sampler.kind=transformers", "track.check_after=0"]
"""


def test_the_notebook_runs(tmp_path, monkeypatch):
    cells = [
        "".join(cell["source"])
        for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    (budget,) = [number for number, text in enumerate(cells) if text.startswith("steps = ")]
    cells[budget] = TINY
    for name in ("configs", "reward_fns"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    for number, text in enumerate(cells):
        *before, last = text.splitlines()
        exec(compile(text, f"{NOTEBOOK.name}, code cell {number}", "exec"), known)
        if not before and not last.startswith(("import", "run =")):  # what the notebook would show
            assert eval(last, known) is not None
    assert list(known["comparison"].verdicts["defense"]) == ["none", "interleaving"]


def test_the_notebook_holds_no_outputs():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
