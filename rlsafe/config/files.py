"""Writing files and directories so that a reader finds the old one, the new one, or none, never half of one; and their hashes.

Everything is written under a temporary name beside its place and then renamed. Nothing is forced to the disk before
that: a checkpoint, which has to survive a power cut, does so itself (rlsafe.engine.record.checkpoint).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlsafe.config.damaged import damaged_record
from rlsafe.config.errors import UserError

log = logging.getLogger("rlsafe")
REMEMBERED = 1 << 20  # bytes; hashes of larger files are stored
SETTLED = 2.0  # seconds; a younger file could be changed again without a new change time


def at_home(name: str | Path) -> Path:
    """The path that a setting names: `~/` at its beginning is the home directory. The setting itself keeps it as written."""
    return Path(os.path.expanduser(name))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; the file takes its place at `path` when the block ends without an error.

    Several threads and processes may write the same path: the last one to finish wins. Makes the parent directory.
    Raises OSError as the file system does; after any error the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary name to make a directory under; it replaces `path` when the block ends without an error.

    For one writer at a time: what an earlier, killed one left under the temporary name is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text (lone surrogates as `\\udc80`, line ends as they are). UserError when it cannot be written."""
    try:
        with (
            replacing(path) as temporary,
            open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_json(path: Path, tree: Any) -> None:
    """Strict JSON (ValueError for NaN), indented. UserError when it cannot be written."""
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_once(path: Path, text: str) -> None:
    """Write UTF-8 text unless `path` exists by then: of several processes that race, all read the first one's file.

    Raises OSError. On a file system without hard links the last one wins instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The file's value; None when there is no such file. UserError when it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_whole(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, {} when there is no such file. None when the file is damaged, as a power cut leaves one (empty, cut
    short): for readers that can do without it."""
    try:
        found = read_json(path)
    except UserError:
        return None
    return found if isinstance(found, dict) else None if path.is_file() else {}


def run_record(run: Path) -> dict[str, Any]:
    """A run's run.json, {} when there is none. UserError when it is damaged."""
    if (record := read_whole(run / "run.json")) is None:
        raise UserError(damaged_record(run))
    return record


def read_lines(path: Path, holding: str = "") -> list[Any]:
    """The values of a .jsonl file, or of those lines that hold a text; [] when there is no such file. An end that is no line (cut
    short, or NULs) is left out, with a warning; UserError that names a line that is not JSON where others follow."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    values, torn = [], 0
    for number, line in enumerate(lines, 1):
        if torn and line.strip(b"\0 \t\r"):
            raise UserError(
                f"{path}:{torn}: not valid JSON, and whole lines follow: the file was changed or its disk is damaged"
            )
        try:
            if (text := line.decode("utf-8")).strip() and holding in text:
                values.append(json.loads(text))
            elif "\0" in text:
                torn = torn or number
        except ValueError:
            torn = torn or number
    if torn:
        log.warning("%s:%d: its end was lost, as after a crash or on a full disk; read without it", path, torn)
    return values


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes. A large file is hashed once: the hash is stored under its inode, size and times (any write
    changes the change time, which no program can set back)."""
    about = path.stat()
    key = f"{about.st_dev}:{about.st_ino}:{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}"
    known = _hashes() if about.st_size >= REMEMBERED else {}
    if key in known:
        return known[key]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if about.st_size >= REMEMBERED and time.time() - about.st_ctime > SETTLED:
        with suppress(UserError):  # the home directory is read-only: the file is hashed again next time
            write_text(_memory(), json.dumps({**_hashes(), key: found}))
    return found


def _memory() -> Path:
    return Path.home() / ".cache" / "rlsafe" / "hashes.json"


def _hashes() -> dict[str, str]:
    try:
        return json.loads(_memory().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
