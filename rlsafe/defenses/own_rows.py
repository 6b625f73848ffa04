"""Rows that a defense brings: from its own `source`, or the run's safe ones; and rows for its penalty alone."""

from __future__ import annotations

from typing import Any

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import Stream, fit_rows, load_rows, require_answers
from rlsafe.defenses.base import DataContext, Defense, Offer, SetupContext
from rlsafe.types import Batch, Row

SAFE = "data.safe"
"""As a defense's `source`: the run's safe rows, whatever they are."""


def pool(name: str, source: str | None, context: SetupContext) -> list[Row]:
    """All rows of `source` (provider:spec or a file with messages) that fit the model; None or `SAFE`: those of `data.safe`. UserError
    when there are none. name: the defense's, for messages."""
    if source in (None, SAFE) and context.config.data.safe is None:
        raise UserError(f"defense {name!r}: no safe rows; set data.safe.source or the defense's source")
    if source is None or source == SAFE:
        return context.rows("safe")
    stream = context.config.data.safe or StreamConfig(source=source)
    most = min(stream.max_tokens, context.policy.core.max_length or stream.max_tokens)
    fitted = fit_rows(
        load_rows(StreamConfig(source=source), context.seed), context.policy.tokenizer, most, stream.too_long,
        on_bad_row=stream.on_bad_row, what=f"{most} tokens" if most < stream.max_tokens else "",
    )  # fmt: skip
    for note in fitted.notes:
        context.log(f"defense {name!r}: {note}")
    return fitted.rows


class OwnRows(Defense):
    """Base of defenses whose penalty has rows of its own: no cross-entropy, `n_rows` in each step.

    `own_rows(batch)` says whether a batch holds them; `bring` must be called in `setup`. n_rows 0: none are brought.
    """

    source: str | None = None
    n_rows: int = 0

    def bring(self, context: SetupContext) -> None:
        """Load the rows, if there are to be any. UserError when there are none, or some without an answer."""
        if self.n_rows:
            rows = pool(self.name, self.source, context)
            require_answers(rows, f"defense {self.name!r}")
            self.stream = Stream(rows, context.seed, f"defense/{self.name}")

    def own_rows(self, batch: Batch) -> bool:
        return batch.owner == self.name

    def offer(self) -> Offer | None:
        return Offer(rows=self.n_rows, aside=True) if self.n_rows else None

    def rows(self, n: int, context: DataContext) -> list[Row]:
        return self.stream.take(n)

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict()} if self.n_rows else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.n_rows:
            self.stream.load_state_dict(state["stream"])
