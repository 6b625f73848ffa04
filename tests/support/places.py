"""Where things are: the repository's root, its shipped files, and public research data if it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
INTEGRATION = TESTS / "integration"
CONFIGS = ROOT / "configs"


def _shared_data() -> Path:
    places = [Path(p) for p in [os.environ.get("RLSAFE_SHARED_DATA")] if p]
    places += [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]
    return next((place for place in places if (place / "sft").is_dir()), places[0])


SHARED = _shared_data()
"""Public research data, no part of the project: RLSAFE_SHARED_DATA, or shared/data in or beside the checkout. May be absent."""
