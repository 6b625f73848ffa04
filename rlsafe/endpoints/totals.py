"""Counts of an endpoint's requests, replies, faults, tokens and cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PLAIN = ("requests", "replied", "cached", "shared", "attempts", "tokens_in", "tokens_out")


@dataclass
class Totals:
    """requests = replied + cached + shared + failed. `shared`: got the reply of an equal request under way.

    faults: failed attempts by kind, most of which a retry made up for; failures: requests without a
    reply, by kind. Tokens and cost (USD, None without prices) are of replies that were paid for.
    """

    requests: int = 0
    replied: int = 0
    cached: int = 0
    shared: int = 0
    attempts: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    faults: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    def since(self, before: Totals) -> Totals:
        """What was added after `before`, a copy taken earlier."""
        cost = None if self.cost is None else self.cost - (before.cost or 0.0)
        plain = {name: getattr(self, name) - getattr(before, name) for name in PLAIN}
        return Totals(**plain, cost=cost, faults=self.faults - before.faults, failures=self.failures - before.failures)

    def to_dict(self) -> dict[str, Any]:
        """For evaluation.json."""
        return {
            **{name: getattr(self, name) for name in (*PLAIN, "cost")},
            "failed": self.failed,
            "faults": dict(sorted(self.faults.items())),
            "failures": dict(sorted(self.failures.items())),
        }

    def line(self, name: str) -> str:
        """One line for a person."""
        parts = [f"{self.requests} calls", f"{self.cached + self.shared} from saved or equal calls"]
        parts.append(f"{self.failed} failed" + _counts(self.failures))
        if self.faults:
            parts.append(f"{sum(self.faults.values())} attempts went wrong" + _counts(self.faults))
        parts.append(f"{self.tokens_in} tokens in, {self.tokens_out} out")
        if self.cost is not None:
            parts.append(f"{self.cost:.4f} USD")
        return f"{name}: " + ", ".join(parts)


def _counts(counter: Counter[str]) -> str:
    return f" ({', '.join(f'{n} {kind}' for kind, n in counter.most_common())})" if counter else ""
