"""Real pretrained weights from an installed package, where they are; without them the tests that need them skip."""

from __future__ import annotations

import pytest

from rlsafe.config import UserError
from rlsafe.config.gguf import gguf_file


def need_weights(name: str) -> None:
    """Skip unless the file behind `name` and what reads it are installed. Any other error is the test's."""
    pytest.importorskip("gguf", reason="real weights are not installed: run scripts/setup-local")
    try:
        gguf_file(name)
    except UserError as error:
        pytest.skip(f"real weights are not installed: run scripts/setup-local ({error})")
