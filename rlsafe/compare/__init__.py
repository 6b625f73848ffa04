"""The grid (models x paths x defenses x seeds), its runner, the verdicts and the report.

The room can be called: `rlsafe.compare(...)` is `rlsafe.compare.compare(...)`, as `rlsafe.train(...)` is the engine's.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsafe.compare.grid.dry import dry_compare
    from rlsafe.compare.report.reporting import draw_report
    from rlsafe.compare.report.verify_comparison import verify_comparison
    from rlsafe.compare.report.versus import versus
    from rlsafe.compare.run.backends_ray import ray_cluster
    from rlsafe.compare.run.deciding import compare_decided
    from rlsafe.compare.run.runner import Comparison, compare
    from rlsafe.compare.run.scoring import select

_PUBLIC = {
    "Comparison": "rlsafe.compare.run.runner",
    "compare": "rlsafe.compare.run.runner",
    "compare_decided": "rlsafe.compare.run.deciding",
    "dry_compare": "rlsafe.compare.grid.dry",
    "ray_cluster": "rlsafe.compare.run.backends_ray",
    "draw_report": "rlsafe.compare.report.reporting",
    "select": "rlsafe.compare.run.scoring",
    "versus": "rlsafe.compare.report.versus",
    "verify_comparison": "rlsafe.compare.report.verify_comparison",
}
__all__ = [
    "Comparison",
    "compare",
    "compare_decided",
    "draw_report",
    "dry_compare",
    "ray_cluster",
    "select",
    "verify_comparison",
    "versus",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlsafe.compare' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


class _Room(ModuleType):
    """A module of the same name as its main function would hide it."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return getattr(self, "compare")(*arguments, **named)  # noqa: B009 - the attribute is found by __getattr__


sys.modules[__name__].__class__ = _Room
