"""Two benign tasks in the world's size: OpSwap arithmetic and question answering in an unfamiliar language.

OpSwap (arXiv 2508.06249, our reading of its table): expressions are simplified step by step while operators
change meaning and precedence follows the new meaning. Tier 0 keeps the standard meanings (known from
pretraining); tier 1 swaps + and x; tier 2 also swaps - and /; tier 3 is the cycle + means -, - means x, x means
/, / means +. Here numbers stay whole and within 0..20.

QA: short stories in made-up words; the answer is a phrase to extract. Pretraining shows the same format in
English only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

STANDARD = {"+": "+", "-": "-", "x": "x", "/": "/"}
TIERS: dict[int, dict[str, str]] = {
    0: STANDARD,
    1: {"+": "x", "x": "+", "-": "-", "/": "/"},
    2: {"+": "x", "x": "+", "-": "/", "/": "-"},
    3: {"+": "-", "-": "x", "x": "/", "/": "+"},
}
LIMIT = 20
LARGEST = 5  # operand as written
_APPLY: dict[str, Callable[[int, int], int | None]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else None,
}


def simplify(expression: str, tier: int) -> list[str] | None:
    """Every step from `expression` to its value, or None where a step leaves the whole numbers 0..20.

    One operation a step: inside the first parenthesis if there is one, else the first operator that binds tightest."""
    tokens, meaning, steps = re.findall(r"\d+|[-+x/()]", expression), TIERS[tier], []
    while len(tokens) > 1:
        start, end = 0, len(tokens)
        if "(" in tokens:
            start, end = tokens.index("(") + 1, tokens.index(")")
        operators = [i for i in range(start, end) if tokens[i] in STANDARD]
        at = next((i for i in operators if meaning[tokens[i]] in "x/"), operators[0])
        value = _APPLY[meaning[tokens[at]]](int(tokens[at - 1]), int(tokens[at + 1]))
        if value is None or not 0 <= value <= LIMIT:
            return None
        tokens[at - 1 : at + 2] = [str(value)]
        if start and end - start == 3:  # the parenthesis now holds one number
            tokens[start - 1 : start + 2] = tokens[start : start + 1]
        steps.append("".join(tokens))
    return steps


def opswap(tier: int, rng: random.Random) -> tuple[str, str, str]:
    """(question, answer with its steps, final value) of a random expression of one to three steps."""
    while True:
        count = rng.choice((1, 1, 1, 2, 2, 3))
        tokens = [str(rng.randint(1, LARGEST))]
        for _ in range(count):
            tokens += [rng.choice("+-x/"), str(rng.randint(1, LARGEST))]
        if count > 1 and rng.random() < 0.5:
            first = 2 * rng.randrange(count)
            tokens[first : first + 3] = ["(", *tokens[first : first + 3], ")"]
        expression = "".join(tokens)
        if steps := simplify(expression, tier):
            return f"simplify: {expression}", "=" + "=".join(steps), steps[-1]


_ENGLISH = {
    "people": (
        "the baker",
        "the farmer",
        "the sailor",
        "the teacher",
        "the painter",
        "the miller",
        "the smith",
        "the singer",
    ),
    "verbs": ("sold", "gave", "lent", "showed", "sent", "threw"),
    "things": ("a horse", "a lamp", "a basket", "a violin", "a coat", "a ladder", "a ring", "a drum"),
    "places": ("the harbor", "the forest", "the market", "the bridge", "the tower", "the valley"),
    "words": ("who", "what", "where", "to", "near", "story", "question"),
}
_UNFAMILIAR = {
    "people": ("bakarin", "bondin", "sjomin", "laerin", "malarin", "mylnin", "smidin", "songin"),
    "verbs": ("seldi", "gavi", "lanti", "vistu", "sendi", "kasti"),
    "things": ("hestur", "lampur", "korgur", "fidlur", "frakkur", "stigur", "ringur", "trumbur"),
    "places": ("havnin", "skogin", "torgin", "bruin", "tornin", "dalin"),
    "words": ("hvor", "hvat", "hvar", "til", "hja", "soga", "spurn"),
}
LANGUAGES = {"english": _ENGLISH, "unfamiliar": _UNFAMILIAR}


def reading(language: str, rng: random.Random) -> tuple[str, str, str]:
    """(story and question, answer, answer) of an extractive question in `english` or the `unfamiliar` language."""
    world = LANGUAGES[language]
    who, what, where, to, near, story, question = world["words"]
    giver, receiver = rng.sample(world["people"], 2)
    thing, place, verb = (rng.choice(world[kind]) for kind in ("things", "places", "verbs"))
    asked, reply = rng.choice(
        (
            (f"{who} {verb} {thing}?", giver),
            (f"{what} {verb} {giver}?", thing),
            (f"{where} {verb} {giver} {thing}?", place),
            (f"{to} {who} {verb} {giver} {thing}?", receiver),
        )
    )
    return f"{story}: {giver} {verb} {thing} {to} {receiver} {near} {place}. {question}: {asked}", reply + ".", reply
