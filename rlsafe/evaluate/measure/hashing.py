"""Content hashes of everything that a run depends on: settings, data files, weights, and what a provider gives.

A result is reused only while its fingerprint is the same, and the fingerprint must change when a model is rebuilt under its
old name. So files are hashed by content, not by size and time. Large files are hashed once: the hash is stored under the
file's inode, size and times (any write changes the change time, which no program can set back).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlsafe.config import UserError
from rlsafe.config.files import at_home
from rlsafe.config.files import file_hash as file_hash
from rlsafe.config.gguf import gguf_file, is_gguf
from rlsafe.config.steady import printed
from rlsafe.types import provider_for

_MODEL_FILES = (".safetensors", ".bin", ".pt", ".json", ".jinja", ".model", ".txt")
_WEIGHTS = ("config.json", "adapter_config.json")
_ROWS = ("source", "benign")
"""Keys of settings whose texts name rows, which a directory may hold too. Other keys may name a directory that runs write into."""


def is_model(directory: Path) -> bool:
    """Whether a directory holds a model or an adapter."""
    return directory.is_dir() and (
        any((directory / name).is_file() for name in _WEIGHTS) or any(directory.glob("*.safetensors"))
    )


def model_hash(directory: Path) -> str:
    """Hash of the weights, settings, tokenizer and template in a model's or adapter's directory."""
    files = sorted(file for file in directory.iterdir() if file.suffix in _MODEL_FILES and file.is_file())
    return _joined(f"{file.name}:{file_hash(file)}" for file in files)


def named_model_hash(name: str) -> str:
    """`model_hash` of what `model.name` stands for (of a GGUF file: its own), or "" where nothing of it is on this machine."""
    known = provider_for(name)
    try:
        if is_gguf(name):
            return file_hash(gguf_file(name))
        path = Path(known[0].model(known[1]) if known else at_home(name))
    except UserError:
        return ""
    return model_hash(path) if is_model(path) else ""


def _joined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def dataset_hash(directory: Path) -> str:
    """Hash of every file that `datasets` may read in a directory of rows: it skips hidden ones, and its own caches are no data."""
    files = sorted(
        file
        for file in directory.rglob("*")
        if file.is_file()
        and not file.name.startswith("cache-")
        and not any(part.startswith((".", "__")) for part in file.relative_to(directory).parts)
    )
    return _joined(f"{file.relative_to(directory).as_posix()}:{file_hash(file)}" for file in files)


def contents(text: str, rows: bool = False) -> list[str]:
    """Hashes of what a setting's text stands for: a file, `file.py:name`, a model directory, `path:DIR`, `provider:spec`.

    rows: it names rows, so it may be a directory of them. [] when it is a plain word.
    """
    if len(text) >= 1024 or "\n" in text or not text.strip():
        return []
    first, _, rest = text.partition(":")
    if is_gguf(text):
        return [of_file] if (of_file := named_model_hash(text)) else []
    if rows and (directory := at_home(text)).is_dir():
        from rlsafe.data.hub import is_dataset_directory  # late: few configs name a directory

        if is_dataset_directory(directory):
            return [dataset_hash(directory)]
    found = []
    for path in {at_home(text), at_home(first), *([at_home(rest)] if first == "path" and rest else [])}:
        if path.suffix and path.is_file():
            found.append(file_hash(path))
        elif is_model(path):
            found.append(model_hash(path))
    return sorted(found) or _provided(text)


def _provided(text: str) -> list[str]:
    """Hashes of the weights, vectors, rows, questions, prompts and cues that a provider has under a spec. Not of its pairs: they were
    left out when the first comparisons were made, whose finished runs would all be trained again."""
    found = provider_for(text) if ":" in text else None
    if found is None:
        return []
    provider, spec = found
    hashes = []
    for kind in ("model", "vectors"):
        try:
            path = Path(getattr(provider, kind)(spec))
        except (UserError, AttributeError):  # a provider may lack some kinds of things
            continue
        if path.exists():
            hashes.append(f"{kind}:{model_hash(path) if path.is_dir() else file_hash(path)}")
    return [*hashes, *_texts(text)]


@lru_cache(maxsize=256)
def _texts(text: str) -> tuple[str, ...]:
    """A provider's rows, questions, prompts and cues as texts. Cached: code makes them, so they do not change within a process."""
    found = provider_for(text)
    assert found is not None
    hashes = []
    for kind in ("rows", "questions", "prompt", "cues"):
        try:
            hashes.append(f"{kind}:{_joined([printed(getattr(found[0], kind)(found[1]))])}")
        except (UserError, AttributeError):
            continue
    return tuple(hashes)


def digest(tree: Any) -> str:
    """Hash of settings and of the contents of everything that they name."""
    found = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    named = set(strings(tree))
    for text, rows in sorted((text, (text, True) in named) for text in {text for text, _ in named}):
        for content in contents(text, rows):
            found.update(f"{text}={content}\n".encode())
    return found.hexdigest()[:24]


def strings(tree: Any, rows: bool = False) -> Iterable[tuple[str, bool]]:
    """(text, whether its key says that it names rows) of every text in a tree of settings."""
    if isinstance(tree, str):
        yield tree, rows
    elif isinstance(tree, dict):
        yield from itertools.chain.from_iterable(strings(value, key in _ROWS) for key, value in tree.items())
    elif isinstance(tree, list):
        yield from itertools.chain.from_iterable(strings(value, rows) for value in tree)
