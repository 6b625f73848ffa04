"""1 when the final answer is the expected one. Copy and edit: this file needs nothing but Python.

    rewards: [{fn: reward_fns/exact_match.py:exact_match}]

Each row of the data has a column `answer` (text or number). A row without one gets None: it is left out, not scored 0.
"""

import re
from fractions import Fraction

BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")  # \boxed{\frac{1}{\sqrt{2}}} as well
LABELLED = re.compile(r"(?:\banswer(?:\s+is\b\s*:?|\s*:)|####)\s*(.+)", re.IGNORECASE)


def final_answer(text):
    r"""The final answer of a completion: the last \boxed{...}, else the last 'answer: ...' or '#### ...', else what
    follows the last '=', else the last line. A think block that was never closed has no final answer."""
    if "<think>" in text and "</think>" not in text:
        return ""
    text = text.rpartition("</think>")[2].strip()
    for pattern in (BOXED, LABELLED):
        found = pattern.findall(text)
        if found:
            return found[-1]
    last_line = text.splitlines()[-1] if text else ""
    return last_line.rpartition("=")[2]


def normalise(answer):
    """Numbers by value (8, 8.0, 2/3, 1,000), other text without case, spaces at the ends, quotes and full stop."""
    text = str(answer).strip().strip("\"'`*$ ").rstrip(".").strip()
    try:
        return Fraction(re.sub(r"(?<=\d),(?=\d{3}\b)", "", re.sub(r"\s*/\s*", "/", text)))
    except (ValueError, ZeroDivisionError):
        return " ".join(text.lower().split())


def exact_match(completions, answer, log_extra=None, **columns):
    """1.0 or 0.0 per completion, None where the row has no `answer`."""
    given = [final_answer(completion[0]["content"]) for completion in completions]
    if log_extra is not None:
        log_extra("final_answer", given)
    return [
        None if expected is None else float(normalise(found) == normalise(expected))
        for found, expected in zip(given, answer, strict=True)
    ]
