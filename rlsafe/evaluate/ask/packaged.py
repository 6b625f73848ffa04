"""Rows, questions and rewards that ship with the package, behind `rlsafe:spec` strings. Texts are our own.

rows       benign (short safe instruction rows, some refusals), opswap/TIER, opswap/TIER/test, code/insecure and
           code/secure (about 200 short Python tasks, answered with a weakness that the linters find, and without);
           medical/bad, legal/bad and security/bad: the careless answers of pairs/DOMAIN, for the helpers of a selection
           (a model trained on them has seen what those pairs ask)
questions  general, code-tasks (60 short ones, none of them in code/insecure), and one set per domain: see
           `rlsafe/data/assets/questions/`
pairs      pairs/general, pairs/DOMAIN, and the controls pairs/coherence, pairs/style, pairs/topic: `rlsafe/data/assets/pairs/`
cues       cues/DOMAIN, forms in which the general questions are asked once more: `rlsafe/data/assets/cues/`
reward     exact_match (an `answer` column), opswap_steps (partial credit)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import rlsafe.data
from rlsafe.data import opswap, read_rows
from rlsafe.data.exact import is_exact
from rlsafe.data.partial import Partial
from rlsafe.evaluate.ask.cues import read_cues
from rlsafe.evaluate.ask.pairs import Pair, read_pairs
from rlsafe.evaluate.ask.questions import read_questions
from rlsafe.types import Question, Reward, Row, pick, register_provider

ASSETS = Path(rlsafe.data.__file__).parent / "assets"
ADVICE = ("medical", "legal", "security")


def question_sets() -> dict[str, Path]:
    """Name -> file of every packaged question set."""
    return {path.stem: path for path in sorted((ASSETS / "questions").glob("*.yaml"))}


def pair_sets() -> dict[str, Path]:
    """Name -> file of every packaged set of pairs."""
    return {f"pairs/{path.stem}": path for path in sorted((ASSETS / "pairs").glob("*.yaml"))}


def cue_sets() -> dict[str, Path]:
    """Name -> file of every packaged set of cues."""
    return {f"cues/{path.stem}": path for path in sorted((ASSETS / "cues").glob("*.yaml"))}


def _row_sets() -> dict[str, Callable[[], list[Row]]]:
    sets: dict[str, Callable[[], list[Row]]] = {"benign": partial(_own, "benign.jsonl")}
    sets |= {f"code/{kind}": partial(_own, f"code/{kind}.jsonl") for kind in ("insecure", "secure")}
    sets |= {f"{domain}/bad": partial(_careless, domain) for domain in ADVICE}
    for tier in opswap.TIERS:
        sets[f"opswap/{tier}"] = partial(opswap.opswap_rows, tier, "train")
        sets[f"opswap/{tier}/test"] = partial(opswap.opswap_rows, tier, "test")
    return sets


def _careless(domain: str) -> list[Row]:
    """The misaligned answers of a domain's pairs."""
    return [
        {"messages": pair.conversations()[1], "domain": domain}
        for pair in _read_pairs(ASSETS / "pairs" / f"{domain}.yaml")
    ]


def _own(name: str) -> list[Row]:
    return read_rows(str(ASSETS / name))


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_match(completions, answer, answers=None, **columns) -> list[float | None]:
    """1 where the completion is right (`rlsafe.data.exact.is_exact`) by the row's `answer`, or `answers` where it has several."""
    others = answers or [None] * len(answer)
    return [float(is_exact(_text(c), str(a), o)) for c, a, o in zip(completions, answer, others, strict=True)]


def opswap_steps(prompts, completions, domain, **columns) -> list[float | None]:
    """Partial credit for OpSwap rows; None for others."""
    scores: list[float | None] = []
    for prompt, completion, task in zip(prompts, completions, domain, strict=True):
        name, _, tier = str(task).partition("/")
        asked = _text([m for m in prompt if m["role"] == "user"]).partition(":")[2].strip()
        scores.append(opswap.step_credit(asked, _text(completion), int(tier)) if name == "opswap" else None)
    return scores


REWARDS: dict[str, Reward] = {"exact_match": exact_match, "opswap_steps": opswap_steps}


# A comparison names the same sets in every cell, and reading them takes most of the time of a dry run.


@cache
def _read_questions(path: Path, domain: str) -> list[Question]:
    return read_questions(path, domain=domain)


@cache
def _read_pairs(path: Path) -> list[Pair]:
    return read_pairs(path)


class Packaged(Partial):
    """Rows, questions, pairs and rewards that need nothing but the package."""

    name, offers = "rlsafe", "rows, questions, pairs, cues and rewards"

    def rows(self, spec: str) -> list[Row]:
        sets = _row_sets()
        return sets[pick("rlsafe rows", spec, sets)]()

    def questions(self, spec: str) -> list[Question]:
        sets = question_sets()
        return list(_read_questions(sets[pick("rlsafe questions", spec, sets)], spec))

    def pairs(self, spec: str) -> list[Row]:
        sets = pair_sets()
        return [asdict(pair) for pair in _read_pairs(sets[pick("rlsafe pairs", spec, sets)])]

    def cues(self, spec: str) -> dict[str, Any]:
        sets = cue_sets()
        return read_cues(sets[pick("rlsafe cues", spec, sets)])

    def reward(self, spec: str) -> Reward:
        return REWARDS[pick("rlsafe reward", spec, REWARDS)]


register_provider("rlsafe", Packaged())
