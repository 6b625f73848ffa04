"""Scores of safe rows for Interleaving+ (arXiv 2508.06249): how much likelier a row is to an aligned model than to misaligned ones.

    s_d = (mean_k NLL_k(d) - NLL_aligned(d)) / (NLL_aligned(d) + eps)

NLL is the mean negative log-likelihood per answer token, so long answers do not count for more. A high score marks a row
that the aligned model finds likely and the misaligned ones do not; training on such rows keeps what misalignment would change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsafe.config import UserError
from rlsafe.config.files import at_home
from rlsafe.types import Message


def selection_score(misaligned: Sequence[float], aligned: float, eps: float = 1.0) -> float:
    """s_d of one row from its NLLs, nats per answer token."""
    return (sum(misaligned) / len(misaligned) - aligned) / (aligned + eps)


def row_key(messages: Sequence[Message]) -> str:
    """A digest of a conversation: scores are found by content, so that order and `limit` of a source do not matter."""
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Score:
    """One line of a scores file. row: index in its source. s: s_d, None for a row that is longer than `max_tokens`.

    aligned, misaligned: the NLLs behind it, nats per answer token; `misaligned` by helper.
    """

    row: int
    key: str
    s: float | None
    aligned: float | None
    misaligned: dict[str, float]

    def line(self) -> str:
        """As one line of JSON."""
        record = {"row": self.row, "key": self.key, "s_d": self.s, "nll_aligned": self.aligned}
        return json.dumps({**record, "nll_misaligned": self.misaligned}) + "\n"


def read_scores(source: str | Path) -> list[Score]:
    """The scores that `rlsafe select` wrote; UserError naming the first line that is not a score."""
    path = at_home(source)
    if not path.is_file():
        raise UserError(f"scores: {path}: no such file; `rlsafe select CONFIG --out DIR` writes DIR/scores.jsonl")
    scores = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            r = json.loads(line)
            s = None if r["s_d"] is None else float(r["s_d"])
            scores.append(Score(r["row"], r["key"], s, r["nll_aligned"], r["nll_misaligned"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number}: not a score; expected a line of `rlsafe select` (row, key, s_d, ...)"
            ) from None
    if not scores:
        raise UserError(f"{path}: holds no scores")
    return scores
