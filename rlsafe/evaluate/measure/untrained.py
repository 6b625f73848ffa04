"""What the untrained model makes of given texts, kept on disk: it is the same for every run of a comparison, and for the next one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlsafe.config import UserError
from rlsafe.config.files import write_text
from rlsafe.policy.digest import weights_digest

if TYPE_CHECKING:
    from rlsafe.policy import Policy
    from rlsafe.types import Batch

WORTH_KEEPING = 1.0
"""Seconds; what is had sooner is not written down."""


def kept(
    policy: Policy, reference: str | None, batches: Sequence[Batch], read: Callable[[], list[float]]
) -> list[float]:
    """`read()`, one number for each row of the batches, or the same numbers as an earlier call wrote them down.

    They are kept under everything that decides their bits: the weights of `reference` ("base", or None: the policy's own), the tokens
    and how they are batched, and what computes on them. Of sharded models nothing is kept: all ranks have to take part.
    """
    if policy.is_sharded:
        return read()
    file = Path.home() / ".cache" / "rlsafe" / "untrained" / f"{_key(policy, reference, batches)}.json"
    if (found := _saved(file, sum(map(len, batches)))) is not None:
        return found
    begun = time.monotonic()
    found = read()
    if time.monotonic() - begun > WORTH_KEEPING:
        with suppress(UserError):  # a home that is read-only: they are read again next time
            write_text(file, json.dumps(found))
    return found


def _saved(file: Path, rows: int) -> list[float] | None:
    """None where there is no such file, or a damaged one."""
    try:
        found = json.loads(file.read_text("utf-8"))
        return [float(value) for value in found] if isinstance(found, list) and len(found) == rows else None
    except (OSError, ValueError, TypeError):
        return None


def _key(policy: Policy, reference: str | None, batches: Sequence[Batch]) -> str:
    import torch

    digest = hashlib.sha256(weights_digest(policy, base=reference == "base").encode())
    attention = getattr(policy.model.config, "_attn_implementation", None)
    machine = [str(policy.device.type), torch.__version__, torch.get_num_threads(), policy.quantized_as, attention]
    digest.update(json.dumps(machine).encode())
    for batch in batches:
        for part in (batch.ids, batch.attention, batch.loss_mask):
            digest.update(f"{tuple(part.shape)}".encode() + part.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
