"""What cannot work on this launch's processes and devices is refused here, before any model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import Accelerator

from rlsafe.engine.train.distributed import check_moments

if TYPE_CHECKING:
    from rlsafe.engine.run.build import Prepared


def check_layout(prepared: Prepared, accelerator: Accelerator) -> None:
    """UserError for settings that these processes cannot train or sample with."""
    check_moments(prepared.config.optim, accelerator)
