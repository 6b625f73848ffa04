"""In-training defenses against emergent misalignment: the hook interface, the registry, and one file per defense."""

from rlsafe.defenses.base import DataContext, Defense, Gradients, Offer, SetupContext
from rlsafe.defenses.registry import build, defense, find, load_module, names
from rlsafe.defenses.stack import DefenseStack

__all__ = [
    "DataContext",
    "Defense",
    "DefenseStack",
    "Gradients",
    "Offer",
    "SetupContext",
    "build",
    "defense",
    "find",
    "load_module",
    "names",
]
