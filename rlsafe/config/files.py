"""Files that many rooms share: written whole or not at all; hashed once, however often their hash is asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from rlsafe.config.errors import UserError

REMEMBERED = 1 << 20  # bytes from which on a file's hash is worth remembering
SETTLED = 2.0  # seconds after which a change time is surely older than any later write's


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name in the same directory, then rename: the file is whole or absent.

    Raises UserError when the directory cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes. A large file is hashed once: the hash is remembered under its inode, size and times (any
    write changes the change time, which no program can set back)."""
    about = path.stat()
    key = f"{about.st_dev}:{about.st_ino}:{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}"
    known = _read_memory() if about.st_size >= REMEMBERED else {}
    if key in known:
        return known[key]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if about.st_size >= REMEMBERED and time.time() - about.st_ctime > SETTLED:
        with contextlib.suppress(UserError):  # a home that cannot be written: the file is read again next time
            write_atomically(_memory(), json.dumps({**_read_memory(), key: found}))
    return found


def _memory() -> Path:
    return Path.home() / ".cache" / "rlsafe" / "hashes.json"


def _read_memory() -> dict[str, str]:
    try:
        return json.loads(_memory().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
