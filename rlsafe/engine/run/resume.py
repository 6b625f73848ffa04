"""What a run needs to go on with the same bits: gathered, written as a checkpoint, and put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from rlsafe.config import RunConfig, UserError
from rlsafe.engine.run import checkpoint
from rlsafe.engine.run.records import allowed
from rlsafe.engine.train.ahead import ahead_state, load_ahead_state
from rlsafe.engine.train.distributed import load_optimizer, whole_optimizer
from rlsafe.engine.train.loss import Micro
from rlsafe.engine.train.micro import pack_micro, unpack_micro

if TYPE_CHECKING:
    from rlsafe.engine.train.loop import Loop

NEUTRAL = (
    *("out", "checkpoint", "batch.micro_tokens", "batch.micro_rows", "model.gradient_checkpointing"),
    *("sampler.urls", "sampler.adapter_dir", "sampler.patience", "sampler.gpu_memory", "sampler.max_num_seqs"),
    *("optim.on_nan", "grpo.on_error", "track.texts", "evaluate.judge"),
)
"""Settings that may change between a run's beginning and its end: they decide how it runs, not what it learns."""


def position(loop: Loop) -> dict[str, Any]:
    """Where a run is, apart from its weights and the lengths of its files: small, and safe from what comes after."""
    return {
        "done": loop.done,
        "streams": {name: stream.state_dict() for name, stream in loop.streams.items()},
        "defenses": copy.deepcopy(loop.stack.state_dict()),
        "effects": copy.deepcopy(loop.effects.state_dict()),
        "random": checkpoint.random_state(),
        "tested": loop.tested,
        "pending": dict(loop.pending),
        "ahead": ahead_state(loop.ahead),
    }


def save_checkpoint(loop: Loop, out: Path, began: Mapping[str, Any] | None = None) -> None:
    """Everything that a resumed run needs to end with the same bits.

    began: the position in which the present step began, when the step failed before it changed any weight.
    """
    at = dict(began or position(loop))
    gathered = {  # from all ranks, so that any number of them can go on from it
        "pending": _pending_state(loop, at["pending"]),
        "policy": loop.policy.state_dict(),
        "references": loop.policy.reference_state(),
        "optimizer": whole_optimizer(loop.optimizer),
    }
    if not loop.accelerator.is_main_process:
        return
    state = {
        **at,
        **gathered,
        "offset": loop.tracker.offset(before_step=at["done"] if began else None),
        "config": loop.config.model_dump(mode="json"),
        "plan": len(loop.plan),
    }
    checkpoint.save(out / "checkpoints", at["done"], state, loop.config.checkpoint.keep)


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
        if changed := allowed(state, config, changes(state["config"], config.model_dump(mode="json"))):
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


def changes(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 5) -> list[str]:
    """`key: old, now new` of every setting that differs and matters."""
    one, other = _flat(before), _flat(now)
    keys = [key for key in {**one, **other} if one.get(key, ...) != other.get(key, ...) and not _neutral(key)]
    lines = [f"{key}: was {_shown(one, key)}, now {_shown(other, key)}" for key in keys[:most]]
    return lines + ([f"and {len(keys) - most} more"] if len(keys) > most else [])


def _neutral(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key])[:60] if key in flat else "not set"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    if not isinstance(tree, Mapping | list) or not tree:
        return {prefix: tree}
    return {
        key: leaf
        for name, part in items
        for key, leaf in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def restore(loop: Loop, state: Mapping[str, Any]) -> None:
    """Put a freshly built loop where `state` was taken."""
    loop.policy.load_state_dict(state["policy"])
    loop.policy.load_reference_state(state["references"])
    load_optimizer(loop.optimizer, state["optimizer"])
    for name, stream in loop.streams.items():
        stream.load_state_dict(state["streams"][name])
    loop.stack.load_state_dict(state["defenses"])
    loop.effects.load_state_dict(state["effects"])
    loop.done, loop.tested, loop.dirty = state["done"], state["tested"], True
    loop.pending = _load_pending_state(loop, state["pending"])
    loop.ahead = load_ahead_state(loop, state["ahead"])
    checkpoint.set_random_state(state["random"])


def _pending_state(loop: Loop, pending: Mapping[str, tuple[list[Micro], int]]) -> dict[str, Any]:
    """Rollouts of all ranks that further steps will use again."""
    mine = {
        stream: {"left": left, "micros": [pack_micro(micro) for micro in micros if not micro.dummy]}
        for stream, (micros, left) in pending.items()
    }
    if loop.accelerator.num_processes == 1:
        return mine
    shares: list[dict[str, Any]] = gather_object([mine])
    micros = {stream: [micro for share in shares for micro in share[stream]["micros"]] for stream in mine}
    return {stream: {"left": own["left"], "micros": micros[stream]} for stream, own in mine.items()}


def _load_pending_state(loop: Loop, state: Mapping[str, Any]) -> dict[str, tuple[list[Micro], int]]:
    """This rank's share of them, whatever the number of ranks was when they were saved."""
    rank, world = loop.accelerator.process_index, loop.accelerator.num_processes
    return {
        stream: ([unpack_micro(micro, loop.policy.device) for micro in item["micros"][rank::world]], item["left"])
        for stream, item in state.items()
    }
