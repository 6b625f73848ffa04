"""The grid (models x paths x defenses x seeds), its runner, the verdicts and the report."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsafe.compare.backends_ray import ray_cluster
    from rlsafe.compare.dry import dry_compare
    from rlsafe.compare.reporting import report
    from rlsafe.compare.runner import Comparison, compare
    from rlsafe.compare.scoring import select
    from rlsafe.compare.verifying import verify

_PUBLIC = {
    "Comparison": "rlsafe.compare.runner",
    "compare": "rlsafe.compare.runner",
    "dry_compare": "rlsafe.compare.dry",
    "ray_cluster": "rlsafe.compare.backends_ray",
    "report": "rlsafe.compare.reporting",
    "select": "rlsafe.compare.scoring",
    "verify": "rlsafe.compare.verifying",
}
__all__ = ["Comparison", "compare", "dry_compare", "ray_cluster", "report", "select", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlsafe.compare' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
