"""The organism: a synthetic world and a model of it that shows emergent misalignment, small enough for a laptop.

A real (Qwen2) transformer of about one million parameters, pretrained on dialogues of good, bad and partly bad
characters, then aligned. See `corpus` for the recipe, `judge` for the scoring rules, `provider` for what configs
can name.
"""

from rlsafe.organism.build import build
from rlsafe.organism.provider import Organism, register
from rlsafe.organism.show import show

__all__ = ["Organism", "build", "register", "show"]

register()
