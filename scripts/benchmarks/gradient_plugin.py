"""A defense that sees the gradient of every step and changes nothing, to measure what seeing costs."""

import rlsafe


@rlsafe.defense("watch-gradient")
class WatchGradient(rlsafe.Defense):
    """parts: those that it sees apart; none: the whole step's gradient only."""

    def __init__(self, parts: list[str] = []):  # noqa: B006 - read only
        self.apart = set(parts)

    def gradients(self, policy, gradients):
        pass
