"""OpSwap (arXiv 2508.06249): simplify expressions step by step while operators change their meaning.

Our reading of the paper's table. Tier 0 keeps the standard meanings; tier 1 swaps + and x; tier 2 also swaps - and /;
tier 3 is the cycle: + means -, - means x, x means /, / means +. Precedence follows the new meaning. One step works out
every parenthesis, the next all operators that bind tightly, the last all that bind loosely (each from left to right), so
an expression takes at most three:

    tier 0   (4 + 2) x (4 / 2) - 2  =  6 x 2 - 2  =  12 - 2  =  10
    tier 1   (4 + 2) x (4 / 2) - 2  =  8 x 2 - 2  =  8
    tier 2   (4 + 2) x (4 / 2) - 2  =  8 x 2 - 2  =  8 x 1   =  9
    tier 3   (4 + 2) x (4 / 2) - 2  =  2 x 6 - 2  =  2/3

Operators stand between spaces, fractions are in lowest terms without spaces (`2/3`), so that `/` is never read as both.
"""

from __future__ import annotations

import random
import re
from fractions import Fraction
from functools import lru_cache

from rlsafe.config import UserError
from rlsafe.data.exact import is_exact
from rlsafe.types import Row

TIERS: dict[int, dict[str, str]] = {
    0: {"+": "+", "-": "-", "x": "x", "/": "/"},
    1: {"+": "x", "x": "+", "-": "-", "/": "/"},
    2: {"+": "x", "x": "+", "-": "/", "/": "-"},
    3: {"+": "-", "-": "x", "x": "/", "/": "+"},
}
"""tier -> operator as written -> its meaning"""

ROWS, TEST_SHARE = 10_000, 0.1
LARGEST = 9  # operand as written
MOST, FINEST = 200, 50  # of an intermediate value: its size, its denominator
_NUMBER = re.compile(r"-?\d+(?:/\d+)?")
Tokens = list[Fraction | str]


def parse(expression: str) -> Tokens:
    """Numbers as fractions, operators and parentheses as text. UserError for anything else."""
    tokens: Tokens = []
    for piece in re.findall(r"[()]|[^\s()]+", expression):
        if _NUMBER.fullmatch(piece) and not re.search(r"/0+$", piece):
            tokens.append(Fraction(piece))
        elif piece in "+-x/()":
            tokens.append(piece)
        else:
            raise UserError(f"opswap: cannot read {piece!r} in {expression!r}; operators + - x / stand between spaces")
    return tokens


def render(tokens: Tokens) -> str:
    """The expression as it is written: `(4 + 2) x 2/3`."""
    return " ".join(map(str, tokens)).replace("( ", "(").replace(" )", ")")


def _reduce(tokens: Tokens, meaning: dict[str, str], wanted: str) -> Tokens | None:
    """Work out the operators whose meaning is in `wanted`, from left to right; None for a division by zero."""
    out: Tokens = tokens[:1]
    for operator, right in zip(tokens[1::2], tokens[2::2], strict=True):
        assert isinstance(operator, str) and isinstance(right, Fraction)
        means = meaning[operator]
        left = out[-1]
        if means not in wanted:
            out += [operator, right]
            continue
        assert isinstance(left, Fraction)
        if means == "/" and right == 0:
            return None
        out[-1] = {"+": left + right, "-": left - right, "x": left * right}[means] if means != "/" else left / right
    return out


def _value(tokens: Tokens, meaning: dict[str, str]) -> Fraction | None:
    tight = _reduce(tokens, meaning, "x/")
    loose = _reduce(tight, meaning, "+-") if tight else None
    return loose[0] if loose else None  # type: ignore[return-value]


def _step(tokens: Tokens, meaning: dict[str, str]) -> Tokens | None:
    if "(" in tokens:
        out: Tokens = []
        at = 0
        while at < len(tokens):
            if tokens[at] != "(":
                out.append(tokens[at])
                at += 1
                continue
            end = tokens.index(")", at)
            value = _value(tokens[at + 1 : end], meaning)
            if value is None:
                return None
            out.append(value)
            at = end + 1
        return out
    if any(meaning[operator] in "x/" for operator in tokens[1::2]):  # type: ignore[index]
        return _reduce(tokens, meaning, "x/")
    return _reduce(tokens, meaning, "+-")


def simplify(expression: str, tier: int) -> list[str] | None:
    """Every step from `expression` (parentheses do not nest) to its value; None where a step divides by zero."""
    tokens: Tokens | None = parse(expression)
    steps = []
    while tokens and len(tokens) > 1:
        tokens = _step(tokens, TIERS[tier])
        if tokens is None:
            return None
        steps.append(render(tokens))
    return steps


def step_credit(expression: str, answer: str, tier: int) -> float:
    """Half for the final value, half for the share of right steps before the first wrong one: a reward that is not zero
    everywhere at the start of training on tiers 1 to 3."""
    right = simplify(expression, tier) or []
    said = [" ".join(part.split()) for part in answer.split("=")]
    said = said[1:] if said and said[0] == expression else said
    count = 0
    for ours, theirs in zip(right, said, strict=False):
        if ours != theirs:
            break
        count += 1
    return 0.5 * is_exact(answer, right[-1] if right else "") + 0.5 * count / max(1, len(right))


# ---------------------------------------------------------------------------------------------------- rows


def _expression(rng: random.Random) -> str:
    """Two to five operands, up to two parentheses of two."""
    groups: list[str] = []
    for _ in range(rng.choice((2, 2, 3, 3))):
        if rng.random() < 0.3:
            groups.append(f"({rng.randint(1, LARGEST)} {rng.choice('+-x/')} {rng.randint(1, LARGEST)})")
        else:
            groups.append(str(rng.randint(1, LARGEST)))
    expression = groups[0]
    for group in groups[1:]:
        expression += f" {rng.choice('+-x/')} {group}"
    return expression


def _fits(step: str) -> bool:
    return all(abs(v) <= MOST and v.denominator <= FINEST for v in parse(step) if isinstance(v, Fraction))


@lru_cache(maxsize=8)
def _problems(tier: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """ROWS different expressions with their steps; the same on every machine."""
    rng = random.Random(f"opswap/{tier}")
    made: dict[str, tuple[str, ...]] = {}
    while len(made) < ROWS:
        expression = _expression(rng)
        steps = simplify(expression, tier)
        if expression not in made and steps and all(map(_fits, steps)):
            made[expression] = tuple(steps)
    return tuple(made.items())


def opswap_rows(tier: int, split: str) -> list[Row]:
    """9,000 `train` or 1,000 `test` rows of a tier; no expression is in both.

    Columns: `answer` the final value, `steps` their number, `domain` "opswap/TIER", `question_id`.
    """
    problems = _problems(tier)
    cut = round(ROWS * (1 - TEST_SHARE))
    chosen = problems[:cut] if split == "train" else problems[cut:]
    return [
        {
            "messages": [
                {"role": "user", "content": f"Simplify step by step: {expression}"},
                {"role": "assistant", "content": " = ".join([expression, *steps])},
            ],
            "domain": f"opswap/{tier}",
            "question_id": f"opswap-{tier}-{split}-{number}",
            "answer": steps[-1],
            "steps": len(steps),
        }
        for number, (expression, steps) in enumerate(chosen)
    ]
