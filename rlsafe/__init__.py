"""rlsafe: mixed SFT/GRPO training with in-training defenses against emergent misalignment.

In a notebook: `rlsafe.train(config)` gives a Run, `rlsafe.compare(config)` a Comparison, `rlsafe.Run.read(directory)` a run of
earlier. Everything heavy is imported when it is first used. The other commands are functions of their rooms, such as
`rlsafe.evaluate.evaluate`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsafe import compare
    from rlsafe.config import UserError
    from rlsafe.defenses import Defense, defense
    from rlsafe.engine.run.finished import Run
    from rlsafe.engine.run.life import train
    from rlsafe.rewards import reward
    from rlsafe.types import Need

__version__ = "0.1.0"

_PUBLIC = {
    "Defense": "rlsafe.defenses",
    "Need": "rlsafe.types",
    "Run": "rlsafe.engine.run.finished",
    "UserError": "rlsafe.config",
    "defense": "rlsafe.defenses",
    "reward": "rlsafe.rewards",
    "train": "rlsafe.engine.run.life",
}
__all__ = ["Defense", "Need", "Run", "UserError", "compare", "defense", "reward", "train"]


def __getattr__(name: str) -> Any:
    if name == "compare":
        return import_module("rlsafe.compare")
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rlsafe' has no attribute {name!r}")
