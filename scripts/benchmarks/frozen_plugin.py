"""A defense that needs one frozen forward and does nothing with it, to measure the cost of that forward alone."""

import rlsafe
from rlsafe.types import Need


@rlsafe.defense("frozen-forward")
class FrozenForward(rlsafe.Defense):
    """Its penalty is constant zero; its need makes the engine run the reference on every batch.

    logprobs: through the head as well, to the log-probability of every token, as a model's own forward goes.
    """

    def __init__(self, weight: float = 1.0, logprobs: bool = True):
        self.weight = weight
        self.needs = {Need("logprobs", "base", mask="all") if logprobs else Need("hidden_states", "base", layers=())}

    def penalty(self, view):
        return {}
