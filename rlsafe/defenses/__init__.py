"""In-training defenses against emergent misalignment: the hook interface, the registry, and one file per defense."""

from rlsafe.defenses.base import DataContext, Defense, Gradients, Offer, Rollouts, SetupContext
from rlsafe.defenses.registry import build, defense, find, load_module, names
from rlsafe.defenses.stack import DefenseStack

__all__ = [
    "DataContext",
    "Defense",
    "DefenseStack",
    "Gradients",
    "Offer",
    "Rollouts",
    "SetupContext",
    "build",
    "defense",
    "find",
    "load_module",
    "names",
]
