"""Interleaving++: Interleaving+ without refusals. arXiv 2508.06249, section 5.

Refusals have high scores, because misaligned models do not refuse; a model trained on many of them refuses, or stops early,
where it should answer.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field

from rlsafe.config import UserError
from rlsafe.data import REFUSALS, is_refusal, split_prompt
from rlsafe.defenses.interleaving import Count
from rlsafe.defenses.interleaving_plus import AUTO, InterleavingPlus
from rlsafe.defenses.registry import defense
from rlsafe.types import Row, pick


@defense("interleaving++")
class InterleavingPlusPlus(InterleavingPlus):
    """Adds the safe rows with the highest s_d whose answers do not begin as refusals.

    languages: word lists of `rlsafe.data.REFUSALS` (en, de, fr, es). patterns: further regular expressions over the
    lower-cased first ten words. A share in `top` is one of the whole pool, refusals included, so that `+` and `++` choose
    equally many rows. The other settings are those of `interleaving+`.
    """

    def __init__(
        self,
        scores: str = AUTO,
        top: Count | Annotated[float, Field(gt=0, le=1)] | None = None,
        languages: list[str] = ["en"],  # noqa: B006 - read only; shown as the default in configs
        patterns: list[str] = [],  # noqa: B006 - as above
        **interleaving: Any,
    ):
        super().__init__(scores, top, **interleaving)
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"defense 'interleaving++': patterns: {pattern!r} is no regular expression: {error}"
                ) from None
        lists = [REFUSALS[pick("language of refusals", language, REFUSALS)] for language in languages]
        self.patterns = (*(pattern for words in lists for pattern in words), *patterns)
        if not self.patterns:
            raise UserError(
                "defense 'interleaving++': neither languages nor patterns say what a refusal is; see interleaving+"
            )

    def drops(self, row: Row) -> bool:
        return is_refusal(split_prompt(row)[1] or "", self.patterns)
