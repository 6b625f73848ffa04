"""A defense that asks for one frozen forward and does nothing with it: what sharing that forward cannot save."""

import rlsafe
from rlsafe.types import Need


@rlsafe.defense("frozen-forward")
class FrozenForward(rlsafe.Defense):
    """Its penalty is constant zero; its need makes the engine run the reference on every batch."""

    def __init__(self, weight: float = 1.0):
        self.weight = weight
        self.needs = {Need("hidden_states", "base", layers=())}

    def penalty(self, view):
        return {}
