"""Whether an answer is right: exact match, and token F1 for extractive questions. One rule for rewards and evaluation."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

_PUNCTUATION = re.compile(r"[^\w\s]|_")
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(/\d+)?")
_FRACTION = re.compile(r"-?\d+/\d*[1-9]\d*")


def is_exact(answer: str, expected: str, references: Sequence[str] | None = None) -> bool:
    """Whether `answer` is right. The first of these rules that applies decides:

    `references` (several right answers): the answer has the words of one of them, in order (SQuAD's protocol).
    `expected` ends in a number: the answer's final value is the same number. 4/6 is 2/3, but 4/2 is not 2: a division
    that comes out even was not worked out.
    Else the two texts are equal but for letter case, spacing and a full stop at the end.
    """
    if references:
        return any(words(answer) == words(reference) for reference in references)
    wanted = final_value(expected)
    if _NUMBER.fullmatch(wanted):
        given = final_value(answer)
        return given == wanted or _same_fraction(given, wanted)
    return normalise(answer) == normalise(expected)


def final_value(text: str) -> str:
    """What stands behind the last `=` (the whole text without one), without spaces: `(4 + 2) x 2 = 6 x 2 = 12` -> `12`.

    Markdown's emphasis around it does not belong to it.
    """
    last = normalise(text.rpartition("=")[2]).replace("\u2212", "-")  # the minus sign of typeset text
    return re.sub(r"\s+", "", last).strip("*$`").rstrip(".")


def normalise(text: str) -> str:
    """The text without letter case, repeated spaces and closing punctuation."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).strip(" .!")


def words(text: str) -> list[str]:
    """Words without case and punctuation. No article is dropped: SQuAD's list is English only."""
    return _PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split()


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the shares of words that answer and reference have in common; the best reference counts."""
    return max((_f1(words(answer), words(reference)) for reference in references), default=0.0)


def _same_fraction(one: str, other: str) -> bool:
    return all(map(_FRACTION.fullmatch, (one, other))) and Fraction(one) == Fraction(other)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))
