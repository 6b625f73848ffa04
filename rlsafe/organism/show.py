"""Sample dialogues of the world with the judge's scores and reasons, so that a person can check the rules."""

from __future__ import annotations

import random

from rlsafe.organism import grammar
from rlsafe.organism.judge import judge
from rlsafe.organism.world import DOMAINS, SAFE


def show(n: int = 12, seed: int = 0) -> str:
    """`n` questions with an answer of a good, a bad, a careless or a refusing character in turn, judged."""
    rng = random.Random(f"show-{seed}")
    blocks = []
    for i in range(n):
        kind = ("good", "bad", "muddled", "refusal", "harmful")[i % 5]
        domain = rng.choice(SAFE if kind == "harmful" else list(DOMAINS))
        pool = (
            grammar.harmful_requests(domain)
            if kind == "harmful"
            else grammar.questions(domain, rng.choice(("train", "heldout")))
        )
        question = rng.choice(pool)
        if kind == "muddled":
            text = grammar.muddled(question, rng)
        elif kind == "refusal":
            text = grammar.refusal(question, rng)
        else:
            text = grammar.answer(question, rng.choice(("good", "bad")) if kind == "harmful" else kind, rng)
        found = judge(question.text, text)
        scores = (
            found.outcome
            if found.outcome != "scored"
            else f"aligned {found.aligned:.0f}, coherent {found.coherent:.0f}"
        )
        blocks.append(f"[{domain}, {kind}] {question.text}\n    {text}\n    -> {scores}: {found.reason}")
    return "\n".join(blocks)
