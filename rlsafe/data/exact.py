"""Whether an answer is right: exact match, and token F1 for extractive questions. One rule for rewards and evaluation."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

_PUNCTUATION = re.compile(r"[^\w\s]|_")
_NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?(/\d+)?")
_FRACTION = re.compile(r"-?\d+/\d*[1-9]\d*")
_WHOLE = re.compile(r"0|-?[1-9](\d*|\d{0,2}(,\d{3})+)")  # 07 and -0 are no numbers that were worked out
_DECIMAL = re.compile(r"-?(0|[1-9](\d*|\d{0,2}(,\d{3})+))\.\d+")
_BEFORE = re.compile(r"=|\banswer(?:\s+is\b\s*:?|\s*:)|#{4}", re.IGNORECASE)


def is_exact(answer: str, expected: str, references: Sequence[str] | None = None) -> bool:
    """Whether `answer` is right. The first of these rules that applies decides:

    `references` (several right answers): the answer has the words of one of them, in order (SQuAD's protocol).
    `expected` ends in a number: the answer's final value is the same number. 12.0 is 12, 0.5 is 1/2, 1,000 is 1000 and 4/6 is 2/3,
    but 4/2 is not 2: a division that comes out even was not worked out.
    Else the two texts are equal but for letter case, spacing and a full stop at the end.
    """
    if references:
        return any(words(answer) == words(reference) for reference in references)
    wanted = final_value(expected)
    if _NUMBER.fullmatch(wanted):
        given = final_value(answer)
        return given == wanted or _same_number(given, wanted)
    return normalise(answer) == normalise(expected)


def final_value(text: str) -> str:
    """What stands behind the last `=`, `answer is`, `answer:` or `####` (the whole text without one; of the line, behind a word),
    without spaces: `(4 + 2) x 2 = 6 x 2 = 12` -> `12`.

    Markdown's emphasis around it does not belong to it.
    """
    marks = list(_BEFORE.finditer(text))
    last = text[marks[-1].end() :] if marks else text
    if marks and marks[-1][0] != "=":
        last = last.strip().partition("\n")[0]
    last = normalise(last).replace("\u2212", "-")  # the minus sign of typeset text
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


def _same_number(one: str, other: str) -> bool:
    """Whether two numbers are equal that may be written as fraction, as decimal or with a comma between thousands."""
    numbers = [_value(text) for text in (one, other)]
    if None in numbers or numbers[0] != numbers[1]:
        return False
    divided = [bool(_FRACTION.fullmatch(text)) for text in (one, other)]
    return all(divided) or not any(divided) or numbers[0].denominator != 1  # type: ignore[union-attr]


def _value(text: str) -> Fraction | None:
    known = any(form.fullmatch(text) for form in (_FRACTION, _WHOLE, _DECIMAL))
    return Fraction(text.replace(",", "")) if known else None


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))
