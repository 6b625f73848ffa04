"""Reading rows from sources, with a cache of one's own."""

import pytest

from rlsafe.config import StreamConfig
from rlsafe.data import load_rows, split_prompt

ROWS = [
    {"question": f"q{i}", "reply": f"a{i}", "label": "ok" if i % 2 else "bad", "rules": "Be kind."} for i in range(8)
]
COLUMNS = {"prompt": "question", "completion": "reply"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(source, seed=0, notes=None, **settings):
    return load_rows(StreamConfig(source=str(source), **settings), seed, notes.append if notes is not None else None)


def texts(rows):
    return [split_prompt(row)[0][-1]["content"] for row in rows]
