"""One process at a time writes an output directory: a lock file beside it, held by the kernel for as long as its owner lives."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from rlsafe.config.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class _Held:
    path: Path
    handle: int


_held: dict[Path, _Held] = {}


def is_first_rank() -> bool:
    """Whether this is the only process of a run or the first of several, as the launcher said: before they have met."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def lock_file(directory: Path) -> Path:
    """Where the lock of a directory is: beside it, so that the directory may be replaced or not be there yet."""
    whole = Path(directory).resolve()
    return whole.with_name(f".{whole.name}.lock")


def hold(directory: str | Path) -> None:
    """Lock `directory` for this process until the function under `releasing` returns. UserError that names host
    and pid of the process that holds it.

    The lock of a process that died is free. Only the first of several ranks holds it. A file system without locks has none.
    """
    path = lock_file(Path(directory))
    if path in _held or not is_first_rank():
        return
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:  # what is wrong with the directory is said where it is written
            return
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = _owner(handle)
            os.close(handle)
            raise UserError(
                f"--out {directory}: {owner} is writing there; wait for it, stop it, or choose another --out"
            ) from None
        except OSError:
            os.close(handle)
            return
        if path.exists() and os.stat(path).st_ino == os.fstat(handle).st_ino:
            break
        os.close(handle)  # its owner removed it between opening and locking
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(record).encode(), 0)
    _held[path] = _Held(path, handle)


def _owner(handle: int) -> str:
    try:
        record = json.loads(os.pread(handle, 4096, 0))
        return f"process {record['pid']} on {record['host']} (since {record['since']})"
    except (ValueError, KeyError, TypeError, OSError):  # just about to write it
        return "another process"


def releasing(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: when `function` returns or raises, the directories that it locked with `hold` are free again."""

    @wraps(function)
    def inner(*arguments: P.args, **named: P.kwargs) -> R:
        before = set(_held)
        try:
            return function(*arguments, **named)
        finally:
            for path in set(_held) - before:
                held = _held.pop(path)
                with suppress(OSError):
                    path.unlink()
                os.close(held.handle)

    return inner
