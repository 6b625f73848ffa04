"""What the benchmarks count."""

from __future__ import annotations

import importlib

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
