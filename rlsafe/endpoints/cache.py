"""Saved replies: one small file each, named by the hash of everything that decides the reply.

Files are written to a temporary name and renamed, so several processes may share a directory, also on a network file
system; an unreadable file is a miss. Only replies are saved, never failures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsafe.config.files import replacing
from rlsafe.endpoints.replies import Reply, pack, unpack

VERSION = 1
"""Part of every key; raised when the meaning of a saved reply changes."""


def key_of(base_url: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of base_url and the whole request body: model, messages, sampling and log-prob settings, extra fields."""
    text = json.dumps([VERSION, base_url, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser()

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        try:
            return unpack(json.loads(self._path(key).read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Raises OSError when the directory cannot be written."""
        with replacing(self._path(key)) as temporary:
            temporary.write_text(json.dumps(pack(reply)), encoding="utf-8")
