"""A run that stops early, on request or because something failed: its finished steps are saved, and one line says how to go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import UserError
from rlsafe.config.lock import is_one_of_several
from rlsafe.types import Interrupted, RunError

if TYPE_CHECKING:
    from rlsafe.engine.train.state import Components, RunState


ECHO = 5.0
"""Seconds within which a second signal to one of several processes is the same request: a scheduler signals each of them, and their
launcher, which passes its own on."""


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM once asks for a stop after the current step; a second one stops now."""
    asked, since = threading.Event(), 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal since
        if asked.is_set():
            if is_one_of_several() and time.monotonic() - since < ECHO:
                return
            raise KeyboardInterrupt
        since = time.monotonic()
        asked.set()
        os.write(
            2, b"interrupted: the run stops when this step is done; interrupt again to stop at once\n"
        )  # print may be at work

    with _handled(handle):
        yield asked


@contextmanager
def stops_at_once(hint: str) -> Iterator[None]:
    """Inside, Ctrl-C or SIGTERM raises Interrupted at once, with `hint` as its message."""

    def handle(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        with _handled(handle):
            yield
    except KeyboardInterrupt:
        raise Interrupted(hint) from None


@contextmanager
def _handled(handle: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def ended_early(
    error: BaseException, run: Components, state: RunState, out: Path, command: str, unsaved: bool = False
) -> BaseException:
    """Keep what is finished, and give the exception to raise: what happened, what is kept, how to go on. unsaved: every step is done,
    and what they trained is being written down."""
    if isinstance(error, Interrupted):
        return error
    trained = unsaved and isinstance(error, OSError)
    how = f"resume with: {command or '--resume'}"
    kept = _keep(run, state, out, trained)
    after = f"{kept}, {how}" if kept else "nothing was finished that could be kept"
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"stopped at once in step {state.done}; {after}")
    if isinstance(error, UserError) or not (kept or isinstance(error, OSError)):
        return error
    if isinstance(error, RunError):
        told = (command or "--resume") in str(error)
        return error if told else RunError(f"{str(error).rstrip('.')}; {after}")
    if isinstance(error, OSError):
        where, when = error.filename or out, "after its last step" if trained else f"in step {state.done}"
        after = after if kept else f"{after}: it begins anew (checkpoint.every: N saves the state as it trains)"
        return RunError(f"{where}: {error.strerror or error}; the run stopped {when}; {after}")
    error.add_note(after)
    return error


def _keep(run: Components, state: RunState, out: Path, trained: bool) -> str:
    """Save the steps that are finished, if the one that failed has not touched any weight; says what can be resumed from."""
    from rlsafe.engine.record import checkpoint
    from rlsafe.engine.run.resume import save_checkpoint

    whole = trained or state.began is not None
    if whole and state.done > 0 and not run.several:  # ranks save together or not at all
        try:
            save_checkpoint(run, state, out, None if trained else state.began)
            return f"the state after {state.done} steps is saved"
        except Exception:  # a full disk: what was saved before is still there
            pass
    found = checkpoint.saved(out / "checkpoints")
    return f"{found[-1].name} is kept" if found else ""
