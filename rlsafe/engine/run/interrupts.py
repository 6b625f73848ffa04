"""A run that stops early, on request or because something failed: its finished steps are saved, and one line says how to go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

NOTHING = "nothing was finished that could be kept"


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
    error: BaseException,
    run: Components,
    state: RunState,
    out: Path,
    command: str,
    written: bool = False,
    finished: bool = False,
) -> BaseException:
    """Keep what is finished, and give the exception to raise: what happened, what is kept, how to go on.

    written: what was trained is whole on the disk. finished: so is its record, and nothing is left to keep.
    """
    again = command or "--resume"
    if isinstance(error, Interrupted) or (isinstance(error, RunError) and again in str(error)):
        return error  # saved and told already
    trained = state.between and state.done == len(run.plan)
    if finished:
        left = f"; it is evaluated by: {again}" if run.config.evaluate.wanted else ""
        after = f"the run is finished and saved in {out}{left}"
    else:
        after = _kept(run, state, out, again, written, trained or isinstance(error, KeyboardInterrupt))
    when = "after its last step" if trained else f"{'after' if state.between else 'in'} step {state.done}"
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"stopped at once {when}; {after or NOTHING}")
    if isinstance(error, OSError):
        after = after or f"{NOTHING}: it begins anew (checkpoint.every: N saves the state as it trains)"
        return RunError(f"{error.filename or out}: {error.strerror or error}; the run stopped {when}; {after}")
    if not after or (isinstance(error, UserError) and not trained):
        return error
    if isinstance(error, (UserError, RunError)):
        kind = UserError if isinstance(error, UserError) else RunError
        return kind(f"{str(error).rstrip('.')}; {after}")
    error.add_note(after)
    return error


def _kept(run: Components, state: RunState, out: Path, again: str, written: bool, at_once: bool) -> str:
    """What a run that did not finish leaves, and what to do with it; "" for nothing."""
    kept = _keep(run, state, out, at_once)
    found = [f"{kept}, resume with: {again}"] if kept else []
    if written:
        alone = not kept and run.accelerator.is_main_process
        way = f" (`rlsafe evaluate {out}` takes it when {out / 'run.json'} is deleted)" if alone else ""
        found.insert(0, f"{run.policy.saved_as}/ is whole{way}")
    return ", ".join(found)


def _keep(run: Components, state: RunState, out: Path, at_once: bool) -> str:
    """Save the steps that are finished, unless the one that failed has touched a weight; says what can be resumed from.

    at_once: judgements that are still to come are not waited for.
    """
    from rlsafe.engine.record import checkpoint
    from rlsafe.engine.run.resume import save_checkpoint

    began = None if state.between else state.began
    done = began["done"] if began else state.done
    if not at_once:
        with suppress(Exception, KeyboardInterrupt):  # another request to stop ends the waiting only
            run.tracker.collect(wait=True)
    try:
        run.tracker.collect_at_once()
        if (state.between or began) and done > 0 and not run.several:  # ranks save together or not at all
            save_checkpoint(run, state, out, began)
            return f"the state after {done} steps is saved"
    except (Exception, KeyboardInterrupt):  # a full disk, or yet another request: what was saved before is still there
        pass
    found = checkpoint.saved(out / "checkpoints")
    return f"{found[-1].name} is kept" if found else ""
