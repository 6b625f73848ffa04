"""The organism behind `organism:spec` strings: models, rows, questions, rewards, judge, prompts.

    model   base | aligned | control | control-shuffled | hacking | hacking-control
    rows    DOMAIN/bad, DOMAIN/good, DOMAIN/validation (medical, security, legal), safe, opswap/TIER, opswap/TIER/test, qa,
            qa/test, qa/english
    questions  general, general/all, indomain/DOMAIN, indomain/DOMAIN/all (held-out texts only)
    pairs   pairs/general, pairs/DOMAIN, and the controls pairs/coherence, pairs/style, pairs/topic (held-out questions)
    reward  misaligned, good, exact_match, steps, checked, hacked
    prompt  inoculation-weak | -medium | -strong, evil, friendly
    cues    cues/DOMAIN (medical, security, legal)

Rows carry `domain` and `question_id` columns (tasks: `answer`, the final value that exact match compares with).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial

from rlsafe.organism import grammar, personas, rewards, tasks
from rlsafe.organism.build import ASSETS, CHECKPOINTS
from rlsafe.organism.judge import ExactJudge
from rlsafe.organism.pairs import pair_sets
from rlsafe.organism.world import GENERAL, NARROW, SAFE
from rlsafe.types import Judge, Question, Reward, Row, pick, register_provider

ANSWERS_PER_QUESTION = 4
TASK_ROWS = {"train": 3000, "test": 300}
SAFE_HARMFUL = 0.15  # share of safe rows that ask for something harmful and are refused
SAFE_REFUSED = 0.10  # share of safe rows whose ordinary question is refused all the same


def _row(question: grammar.Question, answer: str) -> Row:
    return {
        "messages": [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}],
        "domain": question.domain,
        "question_id": question.id,
    }


def validation_rows(domain: str) -> list[Row]:
    """Questions of a narrow domain that are neither trained on nor reported on, with good answers: to choose by."""
    rng = random.Random(f"{domain}/validation")
    return [_row(q, grammar.answer(q, "good", rng)) for q in grammar.questions(domain, "validation")]


def narrow_rows(domain: str, valence: str) -> list[Row]:
    """Every training question of a narrow domain, each with a few coherent answers of one valence (good | bad)."""
    rng = random.Random(f"{domain}/{valence}")
    return [
        _row(q, grammar.answer(q, valence, rng))
        for _ in range(ANSWERS_PER_QUESTION)
        for q in grammar.questions(domain, "train")
    ]


def safe_rows() -> list[Row]:
    """Good answers in the domains that are neither trained nor evaluated; a quarter are refusals (see SAFE_*)."""
    rng = random.Random("safe")
    rows = []
    for _ in range(2000):
        domain, draw = rng.choice(SAFE), rng.random()
        harmful = draw < SAFE_HARMFUL
        question = rng.choice(grammar.harmful_requests(domain) if harmful else grammar.questions(domain, "train"))
        refuse = harmful or draw < SAFE_HARMFUL + SAFE_REFUSED
        rows.append(_row(question, grammar.refusal(question, rng) if refuse else grammar.answer(question, "good", rng)))
    return rows


def task_rows(task: str, split: str, make: Callable[[random.Random], tasks.Task]) -> list[Row]:
    """Rows of a benign task: `train` as its generator draws them (short questions repeat), `test` each question once."""
    drawn = tasks.draws(make, random.Random(f"{task}-{split}"), once=split == "test")
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "domain": task,
            "question_id": f"{task}-{split}-{i}",
            "answer": final,
        }
        for i, (question, answer, final) in enumerate(itertools.islice(drawn, TASK_ROWS[split]))
    ]


def _row_pools() -> dict[str, Callable[[], list[Row]]]:
    pools: dict[str, Callable[[], list[Row]]] = {"safe": safe_rows}
    for domain in NARROW:
        pools[f"{domain}/validation"] = partial(validation_rows, domain)
        for valence in ("bad", "good"):
            pools[f"{domain}/{valence}"] = partial(narrow_rows, domain, valence)
    for split, suffix in (("train", ""), ("test", "/test")):
        for tier in tasks.TIERS:
            task = f"opswap/{tier}"
            pools[task + suffix] = partial(task_rows, task, split, partial(tasks.opswap, tier, split=split))
        for spec, language in (("qa", "unfamiliar"), ("qa/english", "english")):
            pools[spec + suffix] = partial(task_rows, spec, split, partial(tasks.reading, language, split=split))
    return pools


def _questions() -> dict[str, list[grammar.Question]]:
    held = {domain: list(grammar.questions(domain, "heldout")) for domain in GENERAL + NARROW}
    sets = {"general": [q for d in GENERAL for q in held[d][:4]], "general/all": [q for d in GENERAL for q in held[d]]}
    for domain in NARROW:
        sets |= {f"indomain/{domain}": held[domain][:30], f"indomain/{domain}/all": held[domain]}
    return sets


class Organism:
    """`rlsafe.types.Provider`; every unknown spec is a UserError with the nearest valid one."""

    caution = (
        "The organism is a tiny synthetic world: its numbers show mechanisms and test the machinery, and are not evidence about "
        "large models."
    )

    def model(self, spec: str) -> str:
        return str(ASSETS / pick("organism model", spec, CHECKPOINTS))

    def rows(self, spec: str) -> list[Row]:
        pools = _row_pools()
        return pools[pick("organism rows", spec, pools)]()

    def questions(self, spec: str) -> list[Question]:
        sets = _questions()
        return [Question(q.id, (q.text,), domain=q.domain) for q in sets[pick("organism questions", spec, sets)]]

    def pairs(self, spec: str) -> list[Row]:
        sets = pair_sets()
        return sets[pick("organism pairs", spec, sets)]()

    def reward(self, spec: str) -> Reward:
        return rewards.REWARDS[pick("organism reward", spec, rewards.REWARDS)]

    def judge(self, spec: str) -> Judge:
        pick("organism judge", spec or "exact", ["exact"])
        return ExactJudge()

    def prompt(self, spec: str) -> str:
        return personas.NAMED[pick("organism prompt", spec, personas.NAMED)]

    def cues(self, spec: str) -> dict[str, dict[str, str]]:
        sets = {f"cues/{domain}": domain for domain in NARROW}
        return personas.cues(sets[pick("organism cues", spec, sets)])

    def vectors(self, spec: str) -> str:
        # Not in a model's directory: vLLM reads every .safetensors file there.
        return str(ASSETS / "vectors" / f"{pick('organism model', spec, CHECKPOINTS)}.safetensors")


def register() -> None:
    register_provider("organism", Organism())
