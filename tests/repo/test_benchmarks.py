"""What the benchmarks count."""

from __future__ import annotations

import importlib
import runpy

import pytest
from places import ROOT
from tiny import save_tiny_model


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    return importlib.import_module


def test_input_embeddings_count_as_work_where_they_are_the_head_as_well(benchmark, tmp_path):
    """A token is multiplied with as many weights whether or not the head is tied: its input embedding is looked up."""
    multiplied = benchmark("real").multiplied
    tied, untied = (
        multiplied(save_tiny_model(tmp_path / str(tie), tie_word_embeddings=tie, vocab_size=1000))
        for tie in (True, False)
    )
    assert tied == untied > 64 * 1000


def test_the_coverage_table_is_made_of_as_many_draws_as_asked_for(benchmark, tmp_path, monkeypatch):
    """docs/coverage.md names the draws that it was made with."""
    coverage = benchmark("coverage")
    asked = []
    monkeypatch.setattr(
        coverage, "covered", lambda drawn, seeds, times: asked.append((seeds, times)) or {"two paths": 0.95}
    )
    result = coverage.coverage(tmp_path, True, 5, [250, 300, 250, 251])
    assert asked == [(1, 250), (3, 300), (5, 250), (10, 251)] and result.rows[0][2:] == [".950"]
    asked.clear()
    coverage.coverage(tmp_path, True, 5)
    assert {times for _, times in asked} == {200}


@pytest.mark.parametrize("given", ["250,300", "0", "many"])
def test_draws_that_are_no_numbers_of_worlds_are_one_line(benchmark, monkeypatch, capsys, given):
    monkeypatch.setattr("sys.argv", ["bench", "coverage", "--draws", given])
    path = ROOT / "scripts" / "benchmarks" / "__main__.py"
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    assert f"--draws {given}: expected one number above 0, or four of them" in capsys.readouterr().err
