"""The score of a judge whose tokenizer writes 85 as "8", "5": the expectation over all 101 numbers, from a few calls.

A number is a path of digit tokens. One call gives the distribution of its first token and, along the most likely path, of
those that follow; each further call continues the reply behind another prefix ("7" -> which digit now?). Behind "8" all
that is no digit means that the number is 8. Prefixes that together hold at most TAIL of the probability of all numbers
are left out, which moves the mean by at most about 100 * TAIL points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rlsafe.endpoints import Position

TAIL = 0.01
DIGITS = re.compile(r"(\s*)([0-9]+)(\s*)", re.ASCII)
NUMBERS = frozenset(map(str, range(101)))
PREFIXES = frozenset(text[:end] for text in NUMBERS for end in range(len(text)))
"""Beginnings of longer numbers, "" among them."""


class NumberTrie:
    """What is known of the distribution over the numbers; `see` replies until `wanted` is empty."""

    def __init__(self, tail: float = TAIL):
        self.tail = tail
        self._places: dict[str, Position] = {}

    def see(self, prefix: str, positions: Sequence[Position]) -> None:
        """Take in a reply that continues `prefix`: its first place, and those behind the digits that it went on with."""
        for place in positions:
            if prefix not in PREFIXES:
                return
            self._places[prefix] = place
            found = DIGITS.fullmatch(place.token)
            if not found or found[3] or (prefix and found[1]):
                return
            prefix += found[2]

    def distribution(self) -> tuple[dict[str, float], dict[str, float]]:
        """({number: probability}, {prefix not looked behind yet: probability}); neither is normalised."""
        numbers: dict[str, float] = {}
        behind: dict[str, float] = {"": 1.0}
        unknown: dict[str, float] = {}
        for prefix in sorted(PREFIXES, key=len):  # a prefix after all those it begins with
            mass = behind.pop(prefix, 0.0)
            if not mass:
                continue
            if prefix not in self._places:
                unknown[prefix] = mass
                continue
            digits = 0.0
            for token, logprob in self._places[prefix].top:
                found = DIGITS.match(token)
                if not found or (prefix and found[1]):
                    continue  # a space behind a digit ends the number
                p, number = math.exp(logprob), prefix + found[2]
                digits += p
                if found.end() < len(token) or number not in NUMBERS:
                    continue  # "5%", "101", "007": no number of ours
                side = behind if number in PREFIXES and not found[3] else numbers
                side[number] = side.get(number, 0.0) + mass * p
            if prefix:
                numbers[prefix] = numbers.get(prefix, 0.0) + mass * max(0.0, 1.0 - digits)
        return numbers, unknown

    def wanted(self) -> list[str]:
        """The prefixes to look behind next; none when what is unknown no longer matters."""
        numbers, unknown = self.distribution()
        if "" in unknown:
            return [""]
        left = self.tail * (math.fsum(numbers.values()) + math.fsum(unknown.values()))
        for prefix in sorted(unknown, key=lambda one: unknown[one]):
            if unknown[prefix] > left:
                return sorted(one for one in unknown if unknown[one] >= unknown[prefix])
            left -= unknown[prefix]
        return []

    def grades(self) -> list[tuple[float, float]]:
        """(value, probability) of what is known."""
        return [(float(number), p) for number, p in self.distribution()[0].items()]
