"""What tests of comparisons share."""

from __future__ import annotations

import pytest
from synthetic_comparison import CONFIG

from rlsafe.config import load_compare


@pytest.fixture
def load(tmp_path):
    def load(text: str = CONFIG, overrides=(), quick: bool = False):
        path = tmp_path / "compare.yaml"
        path.write_text(text)
        return load_compare(path, overrides, quick)

    return load
