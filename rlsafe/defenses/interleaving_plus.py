"""Interleaving+: the safe rows that are far likelier to an aligned model than to misaligned ones. arXiv 2508.06249, section 5.

The scores come from a file that `rlsafe select` makes by training misaligned helper models.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rlsafe.config import UserError
from rlsafe.config.files import at_home
from rlsafe.data.selection_scores import read_scores, row_key
from rlsafe.defenses.auto import AUTO, is_auto
from rlsafe.defenses.base import SetupContext
from rlsafe.defenses.interleaving import Count, Interleaving
from rlsafe.defenses.own_rows import answered
from rlsafe.defenses.registry import defense
from rlsafe.types import Row


@defense("interleaving+")
class InterleavingPlus(Interleaving):
    """Adds the distinct safe rows with the highest s_d (`rlsafe.data.selection_scores`), in a seeded order.

    scores: the file that `rlsafe select` writes; `auto`: a comparison with a `selection` section makes it.
    top: how many rows are chosen: a number (2 = two rows), or a share of the pool (0.1; 1.0 = all); null = as published, as many as
        the run asks for, so that each is seen once.
    The other settings are those of `interleaving`.
    """

    def __init__(
        self,
        scores: str = AUTO,
        top: Count | Annotated[float, Field(gt=0, le=1)] | None = None,
        **interleaving: Any,
    ):
        super().__init__(**interleaving)
        self.scores, self.top = scores, top
        if not is_auto(scores) and not at_home(scores).is_file():
            read_scores(scores)  # UserError when the file is missing

    def choose(self, rows: list[Row], context: SetupContext) -> list[Row]:
        """The `top` rows by score. UserError when rows have no scores."""
        if is_auto(self.scores):
            raise UserError(
                f"defense {self.name!r}: scores: {AUTO} is for comparisons with a selection section; for a single run "
                "name the file that `rlsafe select CONFIG --out DIR` writes (DIR/scores.jsonl)"
            )
        rows = answered(self.name, rows, context)
        scores = {score.key: score.s for score in read_scores(self.scores)}
        distinct = {row_key(row["messages"]): row for row in rows}
        if unknown := [key for key in distinct if key not in scores]:
            raise UserError(
                f"defense {self.name!r}: {self.scores} has no score for {len(unknown)} of {len(distinct)} safe rows; "
                "it was made for other data: run `rlsafe select` again"
            )
        wanted = context.planned.get(self.name, 0) if self.top is None else self.top
        wanted = wanted if isinstance(wanted, int) else round(wanted * len(distinct))
        scored = [(s, row) for key, row in distinct.items() if (s := scores[key]) is not None]
        kept = [(s, row) for s, row in scored if not self.drops(row)]
        chosen = sorted(kept, key=lambda pair: -pair[0])[: max(1, wanted)]  # stable: ties in the order of the pool
        if not chosen:
            raise UserError(
                f"defense {self.name!r}: none of {len(distinct)} safe rows is left to choose from; see its settings"
            )
        self.counts = {
            "rows": len(rows),
            "distinct": len(distinct),
            "too_long": len(distinct) - len(scored),
            "refusals_dropped": len(scored) - len(kept),
            "chosen": len(chosen),
            "s_d": [chosen[0][0], chosen[-1][0]],  # of the best and of the last chosen row
        }
        dropped = f", {len(scored) - len(kept)} refusals dropped" if len(scored) > len(kept) else ""
        context.log(
            f"defense {self.name!r}: {len(chosen)} of {len(distinct)} distinct safe rows chosen{dropped}; "
            f"s_d from {chosen[0][0]:.3g} down to {chosen[-1][0]:.3g}"
        )
        return [row for _, row in chosen]

    def report(self) -> dict[str, Any]:
        """How the rows were chosen."""
        return self.counts

    def drops(self, row: Row) -> bool:
        """Whether a row is left out whatever its score."""
        return False
