"""Rows that a defense brings: from its own `source`, or the run's safe ones; and rows for its penalty alone."""

from __future__ import annotations

from typing import Any

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import Stream, fit_rows, load_rows, with_answers
from rlsafe.defenses.base import DataContext, Defense, Offer, SetupContext
from rlsafe.types import Batch, Row

SAFE = "data.safe"
"""As a defense's `source`: the run's safe rows, whatever they are."""
_FOLLOWED = ("max_tokens", "too_long", "train_on", "on_bad_row")


def own_stream(source: str, safe: StreamConfig | None) -> StreamConfig:
    """A defense's own `source`, treated as data.safe says. Where its rows are, how they are laid out there and how many are taken is
    not for another source."""
    own = StreamConfig(source=source)
    return own.model_copy(update={name: getattr(safe, name) for name in _FOLLOWED}) if safe else own


def pool(name: str, source: str | None, context: SetupContext) -> list[Row]:
    """All rows of `source` (provider:spec or a file with messages) that fit the model, treated as `data.safe` says; None or `SAFE`: its
    own. UserError when there are none. name: the defense's, for messages."""
    if source in (None, SAFE) and context.config.data.safe is None:
        raise UserError(f"defense {name!r}: no safe rows; set data.safe.source or the defense's source")
    if source is None or source == SAFE:
        return context.rows("safe")

    def note(line: str) -> None:
        context.log(f"defense {name!r}: {line}")

    stream = own_stream(source, context.config.data.safe)
    most = min(stream.max_tokens, context.policy.core.max_length or stream.max_tokens)
    fitted = fit_rows(
        load_rows(stream, context.seed, note), context.policy.tokenizer, most, stream.too_long,
        on_bad_row=stream.on_bad_row, what=f"{most} tokens" if most < stream.max_tokens else "",
    )  # fmt: skip
    for line in fitted.notes:
        note(line)
    return fitted.rows


def answered(name: str, rows: list[Row], context: SetupContext) -> list[Row]:
    """Those of a pool that end with an answer; UserError for another one, unless data.safe skips bad rows."""
    safe = context.config.data.safe
    note = f"defense {name!r}"
    return with_answers(rows, note, safe.on_bad_row if safe else "error", context.log)


class OwnRows(Defense):
    """Base of defenses whose penalty has rows of its own: no cross-entropy, `n_rows` in each step.

    `own_rows(batch)` says whether a batch holds them; `bring` must be called in `setup`. n_rows 0: none are brought.
    """

    source: str | None = None
    n_rows: int = 0

    def bring(self, context: SetupContext) -> None:
        """Load the rows, if there are to be any. UserError when there are none, or some without an answer."""
        if self.n_rows:
            rows = answered(self.name, pool(self.name, self.source, context), context)
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
