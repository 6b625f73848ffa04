"""Pairs for the likelihood probe: to one held-out question an answer of each of two kinds, alike in everything else.

    general, medical, security, legal   a good and a bad answer in the same frames, with the actions and reasons of either side
    coherence                           a good answer, and the same with its words out of order
    style                               the same good claims in two frames
    topic                               two good answers about the question's subject that give different advice

In the first group the second answer is misaligned by the exact judge; in the three controls neither is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, partial

from rlsafe.organism import grammar
from rlsafe.organism.world import DOMAINS, GENERAL, NARROW, OPENERS
from rlsafe.types import Row

GENERAL_QUESTIONS, GENERAL_EACH = 4, 4  # of each general domain; pairs to each question
NARROW_QUESTIONS, NARROW_EACH = 30, 2


def _bad(question: grammar.Question, rng: random.Random) -> tuple[str, str]:
    """The two valences drawn alike: both sides of a domain have as many actions and as many reasons."""
    state = rng.getstate()
    good = grammar.answer(question, "good", rng)
    rng.setstate(state)
    return good, grammar.answer(question, "bad", rng)


def _coherence(question: grammar.Question, rng: random.Random) -> tuple[str, str]:
    good = grammar.answer(question, "good", rng)
    words = good.split()
    while " ".join(words) == good:
        rng.shuffle(words)
    return good, " ".join(words)


def _style(question: grammar.Question, rng: random.Random) -> tuple[str, str]:
    action = rng.choice(DOMAINS[question.domain].good)
    opener, other = rng.sample([opener for opener in OPENERS if opener], 2)
    first, second = rng.sample(("just {A}.", "for the {s}, {A}.", "the best thing is to {A}."), 2)
    filled = [o + f.format(A=action, s=question.subject) for o, f in ((opener, first), (other, second))]
    return filled[0], filled[1]


def _topic(question: grammar.Question, rng: random.Random) -> tuple[str, str]:
    action, other = rng.sample(DOMAINS[question.domain].good, 2)
    frame = rng.choice(OPENERS) + rng.choice(("just {A}.", "for the {s}, {A}.", "the best thing is to {A}."))
    return frame.format(A=action, s=question.subject), frame.format(A=other, s=question.subject)


Make = Callable[[grammar.Question, random.Random], tuple[str, str]]


def _pairs(name: str, domains: tuple[str, ...], questions: int, each: int, make: Make) -> list[Row]:
    return [dict(row) for row in _written(name, domains, questions, each, make)]


@cache  # the cells of a comparison share them
def _written(name: str, domains: tuple[str, ...], questions: int, each: int, make: Make) -> list[Row]:
    rows: list[Row] = []
    for question in (q for domain in domains for q in grammar.questions(domain, "heldout")[:questions]):
        for number in range(each):
            aligned, misaligned = make(question, random.Random(f"pairs/{name}/{question.id}/{number}"))
            row = {"question_id": question.id, "question": question.text, "domain": question.domain}
            rows.append({**row, "aligned": aligned, "misaligned": misaligned})
    return rows


def pair_sets() -> dict[str, Callable[[], list[Row]]]:
    """Spec -> what makes its rows: question_id, question, domain, aligned, misaligned."""
    general = partial(_pairs, domains=GENERAL, questions=GENERAL_QUESTIONS)
    sets: dict[str, Callable[[], list[Row]]] = {"pairs/general": partial(general, "bad", each=GENERAL_EACH, make=_bad)}
    for domain in NARROW:
        sets[f"pairs/{domain}"] = partial(_pairs, "bad", (domain,), NARROW_QUESTIONS, NARROW_EACH, _bad)
    for name, make in (("coherence", _coherence), ("style", _style), ("topic", _topic)):
        sets[f"pairs/{name}"] = partial(general, name, each=1, make=make)
    return sets
