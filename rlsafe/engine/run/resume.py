"""What a run needs to go on with the same bits: gathered, written as a checkpoint, and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from rlsafe.config import RunConfig, UserError
from rlsafe.engine.record import checkpoint
from rlsafe.engine.run.differences import changes
from rlsafe.engine.run.records import allowed
from rlsafe.engine.train.ahead import load_ahead_state
from rlsafe.engine.train.distributed import load_optimizer, whole_optimizer
from rlsafe.engine.train.loss import Micro
from rlsafe.engine.train.micro import pack_micro, unpack_micro
from rlsafe.engine.train.state import Components, RunState, position, set_random_state


def save_checkpoint(run: Components, state: RunState, out: Path, began: Mapping[str, Any] | None = None) -> None:
    """Everything that a resumed run needs to end with the same bits.

    began: the position in which the present step began, when the step failed before it changed any weight.
    """
    at = dict(began or position(run, state))
    gathered = {  # from all ranks, so that any number of them can go on from it
        "pending": _pending_state(run, at["pending"]),
        "policy": run.policy.state_dict(),
        "references": run.policy.reference_state(),
        "optimizer": whole_optimizer(run.optimizer),
    }
    if not run.accelerator.is_main_process:
        return
    saved = {
        **at,
        **gathered,
        "offset": run.tracker.offset(before_step=at["done"] if began else None),
        "config": run.config.model_dump(mode="json"),
        "plan": len(run.plan),
    }
    checkpoint.save(out / "checkpoints", at["done"], saved, run.config.checkpoint.keep)


def newest(out: Path, config: RunConfig, note: Callable[[str], None]) -> dict[str, Any]:
    """The state of the newest checkpoint that can be read; {} when there are none. Others are named and skipped.

    Raises UserError when none of them can be read, or when it was written under other settings.
    """
    found = checkpoint.saved(out / "checkpoints")
    for path in reversed(found):
        try:
            state = checkpoint.load(path)
        except UserError as error:
            note(f"{error}; skipped")
            continue
        if changed := allowed(state, config, changes(_settings(state["config"]), config.model_dump(mode="json"))):
            raise UserError(
                f"{path}: the settings are not those of the checkpoint: {'; '.join(changed)}. Resume with the same ones, or start "
                "over with --overwrite"
            )
        return state
    if found:
        raise UserError(
            f"{out / 'checkpoints'}: none of the {len(found)} checkpoints can be read; start over with --overwrite"
        )
    return {}


def check_same(run: Components, done: int, out: Path) -> None:
    """UserError, on every rank, when some begin after another number of steps (`done`): they would train apart and wait for ever."""
    found = sorted(set(gather_object([done]))) if run.several else [done]
    if len(found) > 1:
        raise UserError(
            f"{out}: the processes found different checkpoints there (of steps {', '.join(map(str, found))}, 0 = none); every host "
            "must see the same directory under that path"
        )


def _settings(saved: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint; those that came after it was written have their defaults, which change nothing."""
    try:
        return RunConfig.model_validate(saved).model_dump(mode="json")
    except ValueError:  # of a version with other settings: the difference is shown as it is
        return saved


def restore(run: Components, state: RunState, saved: Mapping[str, Any]) -> None:
    """Set freshly built components and their state to where the run was when the checkpoint `saved` was written."""
    run.policy.load_state_dict(saved["policy"])
    run.policy.load_reference_state(saved["references"])
    load_optimizer(run.optimizer, saved["optimizer"])
    for name, stream in run.streams.items():
        stream.load_state_dict(saved["streams"][name])
    run.stack.load_state_dict(saved["defenses"])
    run.effects.load_state_dict(saved["effects"])
    run.sampler.resumed(saved["tested"])
    state.done = saved["done"]
    state.pending = _load_pending_state(run, _at_their_places(run, saved["pending"]))
    state.ahead = load_ahead_state(run, state.done, saved["ahead"])
    set_random_state(saved["random"])


def _pending_state(run: Components, pending: Mapping[str, tuple[list[Micro], int]]) -> dict[str, Any]:
    """Rollouts of all ranks that further steps will use again."""
    mine = {
        place: {"left": left, "micros": [pack_micro(micro) for micro in micros if not micro.dummy]}
        for place, (micros, left) in pending.items()
    }
    if not run.several:
        return mine
    shares: list[dict[str, Any]] = gather_object([mine])
    micros = {place: [micro for share in shares for micro in share[place]["micros"]] for place in mine}
    return {place: {"left": own["left"], "micros": micros[place]} for place, own in mine.items()}


def _at_their_places(run: Components, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The rollouts of a checkpoint under their present names. Older checkpoints count a part among those that its step had, so
    where `every` leaves some out nobody knows whose rollouts those are: they are sampled anew."""
    kept: dict[str, Any] = {}
    for place, item in saved.items():
        kind, _, number = place.rpartition("/")
        if not number.isdigit():
            kept[place] = item
        elif all(part.every == 1 for part in run.config.schedule.all_kinds[kind]):
            kept[f"{kind}/part {number}"] = item
        elif item["left"]:
            run.log(
                f"the checkpoint, of an earlier version, does not say which part of {kind!r} its rollouts are of: new ones are sampled"
            )
    return kept


def _load_pending_state(run: Components, saved: Mapping[str, Any]) -> dict[str, tuple[list[Micro], int]]:
    """This rank's share of them, whatever the number of ranks was when they were saved."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    return {
        place: ([unpack_micro(micro, run.policy.device) for micro in item["micros"][rank::world]], item["left"])
        for place, item in saved.items()
    }
