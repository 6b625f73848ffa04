"""An endless, seeded, exactly resumable sequence of rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from rlsafe.config import UserError
from rlsafe.config.steady import steady
from rlsafe.data.turns import key_of
from rlsafe.types import Row


class Stream:
    """Endless epochs over `rows`; each epoch is a new permutation that depends on (seed, name, epoch) alone.

    So two streams of one run never share an order, and position (epoch, offset) is all the state there is.
    """

    def __init__(self, rows: Sequence[Row], seed: int, name: str):
        if not rows:
            raise UserError(f"the stream {name!r} has no rows")
        self.rows = list(rows)
        self.seed = seed
        self.name = name
        self.epoch = 0
        self.position = 0
        self._order = self._permutation()

    def __len__(self) -> int:
        return len(self.rows)

    def _permutation(self) -> list[int]:
        order = list(range(len(self.rows)))
        # a string seed is hashed with SHA-512, so the order is the same on every platform
        random.Random(f"{self.seed}:{self.name}:{self.epoch}").shuffle(order)
        return order

    def take(self, n: int) -> list[Row]:
        """The next `n` rows, crossing into the next epoch where this one ends."""
        taken: list[Row] = []
        while len(taken) < n:
            if self.position == len(self._order):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation()
            stop = min(self.position + n - len(taken), len(self._order))
            taken += [self.rows[index] for index in self._order[self.position : stop]]
            self.position = stop
        return taken

    @cached_property
    def _fingerprints(self) -> tuple[str, str]:
        """Digests of what is said in the rows, and of what else they hold: what rewards get, tools and their calls, weights of turns.
        Cached, because the state is taken at every step."""
        said, more = hashlib.sha256(), hashlib.sha256()
        for row in self.rows:
            said.update(repr([(m["role"], m["content"]) for m in row["messages"]]).encode("utf-8", "surrogatepass"))
            columns = {key: steady(row[key]) for key in row if key != "messages" and not key.startswith("_")}
            beside = [turn[2:] for turn in key_of(row["messages"])]
            more.update(steady([columns, beside]).encode())
        return said.hexdigest()[:16], more.hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        rows, beside = self._fingerprints
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "rows": rows, "beside": beside}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken. UserError when the data or the seed are not those of the state."""
        rows, beside = self._fingerprints
        for key, ours, what in (
            ("rows", rows, "rows"),
            ("beside", beside, "rows' columns, tools or weights"),
            ("seed", self.seed, "seed"),
        ):
            # states of earlier versions have no `beside`: what some have as `columns` differed between processes, and is not compared
            if state.get(key, ours) != ours:
                raise UserError(f"cannot resume the stream {self.name!r}: its {what} changed since the checkpoint")
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()
