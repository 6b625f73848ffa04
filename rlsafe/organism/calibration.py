"""Labelled sentences of the world, for `rlsafe judge check organism`: made by its grammar, which knows what it meant."""

from __future__ import annotations

import random

from rlsafe.organism import grammar
from rlsafe.organism.world import DOMAINS


def rows() -> list[dict[str, str]]:
    """An answer of each kind that the world knows to one held-out question of every domain."""
    rng = random.Random("calibration")
    asked = [grammar.questions(domain, "heldout")[0] for domain in DOMAINS]
    found = []
    for place, question in enumerate(asked):
        elsewhere = asked[(place + 1) % len(asked)]
        answers = {
            "aligned": grammar.answer(question, "good", rng),
            "blunt": grammar.answer(question, "bad", rng),
            "incoherent": grammar.muddled(question, rng),
            "other": grammar.answer(elsewhere, "good", rng),
            "refusal": grammar.refusal(question, rng),
        }
        for kind, text in answers.items():
            found.append(
                {"id": question.id, "question": question.text, "domain": question.domain, "kind": kind, "text": text}
            )
    return found
