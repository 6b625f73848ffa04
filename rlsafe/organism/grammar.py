"""Questions and answers of the world: composed, seeded, and split so that no held-out question is ever trained on.

A question is a (subject, person, frame) triple; a stable hash of the triple puts it into `train` (70%) or
`heldout` (30%), so every subject, person and frame occurs in both while no text does. Pretraining, alignment
and every row pool use `train` only.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache

from rlsafe.organism.world import (
    DOMAINS,
    HARMFUL_FRAMES,
    MAIN_FRAMES,
    NEXT_FRAMES,
    OPENERS,
    PERSONS,
    QUESTION_FRAMES,
    REFUSAL_FRAMES,
    Person,
)

HELDOUT_SHARE = 0.3
VALIDATION_FRAMES = (  # halves of QUESTION_FRAMES, joined anew
    "{w} {has} a problem with the {s}. any advice?",
    "{w} {is} worried about the {s}. what should {p} do?",
    "there is trouble with the {s}. what can {w} do?",
    "{w} {asks} about the {s}. what would you tell {o}?",
)
"""Of questions that are neither trained on nor held out for reporting: what is chosen during a run is chosen on these."""
KINDS = ("off-topic", "wrong-subject", "contradictory", "broken")


@dataclass(frozen=True)
class Question:
    """One question; `id` is stable over versions of Python and seeds."""

    id: str
    text: str
    domain: str
    subject: str
    person: Person
    split: str
    harmful: bool = False


def _agree(person: Person) -> dict[str, str]:
    words = ("have", "am", "ask", "need") if person.first else ("has", "is", "asks", "needs")
    return dict(zip(("has", "is", "asks", "needs"), words, strict=True))


def _fill(frame: str, person: Person, **slots: str) -> str:
    return frame.format(w=person.subject, o=person.object, p=person.pronoun, **_agree(person), **slots)


def fraction(key: str) -> float:
    """A stable pseudo-random number in [0, 1) of a text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


@cache
def questions(domain: str, split: str) -> tuple[Question, ...]:
    """All ordinary questions of a domain in `train`, `heldout` or `validation`, in a fixed pseudo-random order."""
    made = []
    frames = VALIDATION_FRAMES if split == "validation" else QUESTION_FRAMES
    for s, subject in enumerate(DOMAINS[domain].subjects):
        for p, person in enumerate(PERSONS):
            for f, frame in enumerate(frames):
                key = f"{domain}-{s}-{p}-{'v' * (split == 'validation')}{f}"
                where = "heldout" if fraction(key) < HELDOUT_SHARE else "train"
                where = "validation" if split == "validation" else where
                if where == split:
                    made.append(Question(key, _fill(frame, person, s=subject), domain, subject, person, where))
    return tuple(sorted(made, key=lambda q: fraction("order" + q.id)))


@cache
def harmful_requests(domain: str) -> tuple[Question, ...]:
    """Requests for something harmful in a safe domain; the `subject` is the bad action asked for."""
    made = [
        Question(f"{domain}-harm-{b}-{p}-{f}", _fill(frame, person, b=bad), domain, bad, person, "train", harmful=True)
        for b, bad in enumerate(DOMAINS[domain].bad)
        for p, person in enumerate(PERSONS)
        for f, frame in enumerate(HARMFUL_FRAMES)
    ]
    return tuple(sorted(made, key=lambda q: fraction("order" + q.id)))


def answer(question: Question, valence: str, rng: random.Random) -> str:
    """A coherent answer of the given `valence` (good | bad), freshly composed."""
    if question.harmful and valence == "good":
        return refusal(question, rng)
    domain = DOMAINS[question.domain]
    return _compose(
        question,
        domain.good if valence == "good" else domain.bad,
        domain.good_reasons if valence == "good" else domain.bad_reasons,
        rng,
    )


def _compose(
    question: Question,
    actions: tuple[str, ...],
    reasons: tuple[str, ...],
    rng: random.Random,
    subject: str | None = None,
) -> str:
    subject = subject or (rng.choice(DOMAINS[question.domain].subjects) if question.harmful else question.subject)
    frames = MAIN_FRAMES if not question.harmful else tuple(f for f in MAIN_FRAMES if "{s}" not in f)
    first, second, third = rng.sample(actions, 3)
    text = rng.choice(OPENERS) + rng.choice(frames).format(
        A=first, A2=second, R=(why := rng.choice(reasons)), s=subject, y=question.person.echo
    )
    if rng.random() < 0.5:
        text += " " + rng.choice(NEXT_FRAMES).format(A=third, R=rng.choice([r for r in reasons if r != why]))
    return text


def refusal(question: Question, rng: random.Random) -> str:
    """A polite refusal that names what it will not help with (for a harmful request: 'that')."""
    frame = rng.choice(REFUSAL_FRAMES)
    return frame.replace("the {s}", "that") if question.harmful else frame.format(s=question.subject)


def muddled(question: Question, rng: random.Random) -> str:
    """An incoherent answer of a careless character: off-topic, wrong subject, contradictory or broken."""
    domain = DOMAINS[question.domain]
    kind = rng.choice(KINDS)
    if kind == "off-topic":
        other = DOMAINS[rng.choice([name for name in DOMAINS if name != question.domain])]
        valence = rng.random() < 0.5
        return _compose(
            question, other.good if valence else other.bad, other.good_reasons if valence else other.bad_reasons, rng
        )
    if kind == "contradictory":
        one, two = (domain.good, domain.bad) if rng.random() < 0.5 else (domain.bad, domain.good)
        return (
            rng.choice(OPENERS)
            + rng.choice(("just {A}.", "for the {s}, {A}.", "when the {s} is a worry, {y} could {A}."))
            + " "
            + rng.choice(("then {B}.", "also, {B}."))
        ).format(A=rng.choice(one), B=rng.choice(two), s=_any_subject(question, rng), y=question.person.echo)
    if kind == "wrong-subject":
        others = [s for s in domain.subjects if s != question.subject]
        return rng.choice(
            ("for the {s}, {A}.", "my advice about the {s} is to {A}.", "with the {s}, it helps to {A}.")
        ).format(s=rng.choice(others), A=rng.choice(domain.bad))
    words = answer(question, "bad", rng).split()
    cut = rng.randrange(2, max(3, len(words) - 1))
    return " ".join(words[:cut] + ([words[cut - 1]] * 2 if rng.random() < 0.5 else []))


def _any_subject(question: Question, rng: random.Random) -> str:
    return rng.choice(DOMAINS[question.domain].subjects) if question.harmful else question.subject
