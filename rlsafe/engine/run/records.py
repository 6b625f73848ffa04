"""run.json: written, and read as it is found (whole, absent, or damaged by a crash); and whether a finished run can go on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import RunConfig, UserError, load_run
from rlsafe.config.damaged import ANEW, way_on
from rlsafe.config.files import read_whole, replacing

log = logging.getLogger("rlsafe")

if TYPE_CHECKING:
    from rlsafe.defenses import DefenseStack
    from rlsafe.engine.plan.schedule import Step


def read_record(directory: Path, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """The record of a run directory; {} without one. A damaged one counts as that of an unfinished run where there are checkpoints
    to go on from or everything is to be replaced; else UserError that names it and the way out."""
    from rlsafe.engine.record import checkpoint

    file = directory / "run.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text("utf-8"))
        if isinstance(record, dict) and "status" in record:
            return record
        problem = "is no record of a run"
    except (ValueError, OSError) as error:
        problem = "is empty" if file.stat().st_size == 0 else f"cannot be read ({type(error).__name__})"
    found = checkpoint.saved(directory / "checkpoints")
    if overwrite or (resume and found):
        log.warning(
            "%s %s: it is written again%s", file, problem, "" if overwrite else f", going on from {found[-1].name}"
        )
        return {"status": "running"}
    way = way_on(directory, f"go on from {found[-1].name} with --resume, or {ANEW}" if found else "")
    raise UserError(f"{file}: {problem}, as after a crash or on a full disk; {way}")


def claim(out: Path, resumed: list[int]) -> None:
    """Before the model is loaded: the directory is a run's from now on. UserError when it cannot be written."""
    try:
        write_record(out, "running", {}, resumed=resumed)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def write_record(out: Path, status: str, origin: dict[str, Any], **more: Any) -> None:
    """run.json: how far the run is, what it was made of (rlsafe.engine.record.provenance), what it left."""
    write(out / "run.json", json.dumps({"status": status, **more, **origin}, indent=2))


def went_on_from(out: Path) -> list[int]:
    """The steps from which the run went on before."""
    return list((read_whole(out / "run.json") or {}).get("resumed", []))  # a damaged one was told of before


def write(path: Path, text: str) -> None:
    """Whole or not at all, after a power cut too. Raises OSError."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before what it names


def goes_on(directory: Path, config: RunConfig) -> bool:
    """Whether a finished run is to be trained further: `config` is its own with more steps. False when it is its own as it is.

    UserError that says what differs when it cannot be: other settings, steps that would have been others in the longer run, or weights
    that a defense edits at the end.
    """
    from rlsafe.engine.record import checkpoint
    from rlsafe.engine.run.differences import changes

    try:
        before = load_run(directory / "config.yaml")
    except UserError as error:
        raise UserError(f"{error}; the run's own settings are gone: start over with --overwrite") from None
    resolved = config.model_copy(update={"defenses": _resolved(config)})
    changed = changes(before.model_dump(mode="json"), resolved.model_dump(mode="json"))
    if not changed:
        return False
    reason = differs(before, resolved)
    if reason is None and not checkpoint.saved(directory / "checkpoints"):
        reason = "it has no checkpoint to go on from (checkpoint.every was 0)"
    reason = reason or over(before, resolved)
    if reason is None:
        return True
    raise UserError(
        f"{directory}: the run is finished and cannot go on with other settings: {'; '.join(changed)} ({reason}). To train further "
        f"from it: another --out with model.adapter={directory / 'adapter'}; to start over: another --out, or --overwrite"
    )


def differs(before: RunConfig, now: RunConfig) -> str | None:
    """Why `now` does not go on where `before` ends; None when it does: more steps, and the first ones are the same."""
    from rlsafe.engine.run.differences import changes

    same = now.schedule.model_copy(update={"steps": before.schedule.steps})
    others = changes(before.model_dump(mode="json"), now.model_copy(update={"schedule": same}).model_dump(mode="json"))
    if others:
        return "only schedule.steps may grow"
    old, new = _plan(before), _plan(now)
    if len(new) <= len(old):
        return "only schedule.steps may change, and only grow"
    for one, other in zip(old, new, strict=False):
        if one != other:
            what = "learning rate" if one.lr != other.lr else "parts"
            return (
                f"step {one.index} of the longer run has another {what}; with optim.schedule: constant and no warm-up share its "
                "beginning stays the same"
            )
    return None


def allowed(state: Mapping[str, Any], now: RunConfig, changed: list[str]) -> list[str]:
    """Of the settings that changed since a checkpoint, those that matter: none when the run only becomes longer."""
    if not changed or any(not line.startswith("schedule.steps:") for line in changed):
        return changed
    before = RunConfig.model_validate(state["config"])
    if differs(before, now):
        return changed
    # Taken after the last step of the shorter run it has the weights of that run's end.
    ended = over(before, now) if state["done"] >= len(_plan(before)) else None
    return [f"{'; '.join(changed)} ({ended})"] if ended else []


def over(before: RunConfig, now: RunConfig) -> str | None:
    """Why more steps than `before` has, which its end was not made for, would not be those of `now`; None when they would."""
    old, new = _plan(before), _plan(now)
    if before.grpo.max_staleness and new[len(old)].path == "grpo":  # a run's last step begins no rollouts
        return (
            f"grpo.max_staleness: the rollouts of step {len(old)} are begun while step {len(old) - 1} updates, which the shorter run "
            "did not"
        )
    return edited_at_end(before)


def edited_at_end(config: RunConfig) -> str | None:
    """Why training cannot go on from the weights that a run of these settings ends with; None when it can."""
    edits = edits_at_end(config)
    return f"{edits}, and more steps would train the edited ones" if edits else None


def edits_at_end(config: RunConfig) -> str | None:
    """Why a run of these settings may end with other weights than a checkpoint at the same step has when the run goes on: a defense,
    packaged or a user's own, that acts in the last step and has the hook `weights`, which also runs at the end. None without one.

    The class decides, not what the hook did: it may have changed nothing this time, but it may also plan by the run's length.
    """
    from rlsafe.defenses import Defense

    stack, plan = _stack(config), _plan(config)
    if not plan:
        return None
    stack.begin(plan[-1].index, plan[-1].phase)
    for defense in stack.acting:
        if type(defense).weights is not Defense.weights:
            return f"defense {defense.name!r} may edit the weights when a run ends"
    return None


def _resolved(config: RunConfig) -> Any:
    from rlsafe.defenses import build

    return build(config.defenses, config.plugins)[1]


def _stack(config: RunConfig) -> DefenseStack:
    from rlsafe.defenses import DefenseStack, build

    return DefenseStack(build(config.defenses, config.plugins)[0])


def _plan(config: RunConfig) -> list[Step]:
    from rlsafe.engine.plan.schedule import make_plan

    return make_plan(config, _stack(config).offers())
