"""Checking an evaluation against its answers and pairs: rates, intervals, denominators, benign scores, log-odds and their shifts,
repetition are computed again. What a model or a judge gave for one text is not: `taken_over` says what that is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlsafe.config import UserError
from rlsafe.evaluate.ask.cues import PREFIX
from rlsafe.evaluate.measure import benign, files
from rlsafe.evaluate.measure.criteria import OUTCOMES, rates
from rlsafe.evaluate.measure.evaluation import OTHER_KEYS, Evaluation
from rlsafe.evaluate.measure.fluency import repetition
from rlsafe.evaluate.measure.likelihood import FILE as PAIRS

CLOSE = 1e-9


def evaluation_differences(directory: Path) -> list[str]:
    """One line for each number of evaluation.json that answers.csv (or another file beside it) does not give."""
    try:
        tree = files.read_evaluation(directory / "evaluation.json")
        found = Evaluation.load(directory)
    except UserError as error:
        return [str(error)]
    except (TypeError, ValueError) as error:  # cells that are not numbers
        return [f"{directory / 'answers.csv'}: {error}"]
    wrong = list(_answers(found))  # rates of invalid answers are meaningless
    narrow = found.narrow.to_dict() if found.narrow else None
    return [
        *(wrong or _sets(tree, found)), *_benign(tree, found), *_differing("evaluation.json: narrow", tree.get("narrow"), narrow),
        *_likelihood(tree, found), *_fluency(tree, found),
    ]  # fmt: skip


def taken_over(directory: Path) -> list[str]:
    """What an evaluation rests on and only a judge or a model could give again."""
    try:
        found = Evaluation.load(directory)
    except (UserError, TypeError, ValueError):
        return []
    said = ["the judge's scores"] if found.judgements else []
    said += [f"the log-probabilities of {len(found.pairs)} pairs"] if found.pairs else []
    return said + (["perplexities"] if any(one.perplexity is not None for one in found.fluency.values()) else [])


def _answers(found: Evaluation) -> Iterator[str]:
    """A line for each answer that occurs twice or has an unknown outcome."""
    places = Counter((a.set, a.question_id, a.sample) for a in found.answers)
    for (name, question, sample), times in places.items():
        if times > 1:
            yield f"answers.csv: {name} {question} sample {sample} is there {times} times"
    for answer, judgement in zip(found.answers, found.judgements, strict=True):
        where = f"answers.csv: {answer.set} {answer.question_id} sample {answer.sample}"
        if judgement.outcome not in OUTCOMES:
            yield f"{where}: unknown outcome {judgement.outcome!r}"
        for score in (judgement.aligned, judgement.coherent):
            if score is None and judgement.outcome == "scored":
                yield f"{where}: scored without a score"
            elif score is not None and not 0 <= score <= 100:
                yield f"{where}: the score {score} is outside 0 to 100"


def _sets(tree: dict[str, Any], found: Evaluation) -> Iterator[str]:
    written = {name: part for name, part in tree.items() if name not in OTHER_KEYS and part is not None}
    written |= {f"{PREFIX}{name}": part for name, part in (tree.get("cues") or {}).items()}
    answered = dict.fromkeys(answer.set for answer in found.answers)
    for name in [*written, *(name for name in answered if name not in written)]:
        if name not in answered:
            yield f"evaluation.json: {name} has rates, answers.csv no answers of it"
        elif name not in written:
            yield f"evaluation.json: {name} is missing, answers.csv has answers of it"
        else:
            yield from _differing(f"evaluation.json: {name}", written[name], rates(*found.judged(name)).to_dict())


def _benign(tree: dict[str, Any], found: Evaluation) -> Iterator[str]:
    by_task: dict[str, list[benign.BenignAnswer]] = {}
    for answer in found.benign_answers:
        by_task.setdefault(answer.task, []).append(answer)
    for task in {**tree.get("benign", {}), **by_task}:
        if task not in by_task or task not in tree.get("benign", {}):
            where = "benign_answers.csv has no answers" if task not in by_task else "evaluation.json has no score"
            yield f"benign {task}: {where}"
            continue
        score = benign.score(by_task[task])
        values = {"benign": score.score, "benign_ci95": list(score.ci95), "benign_n": score.n}
        for key, value in values.items():
            yield from _differing(f"evaluation.json: {key}", {task: tree.get(key, {}).get(task)}, {task: value})


def _likelihood(tree: dict[str, Any], found: Evaluation) -> Iterator[str]:
    written = tree.get("likelihood") or {}
    if written and not found.pairs:
        yield f"{PAIRS}: missing, and evaluation.json has log-odds"
        return
    places = Counter((one.set, one.question_id, one.pair) for one in found.pairs)
    for (name, question, pair), times in places.items():
        if times > 1:
            yield f"{PAIRS}: {name} {question} pair {pair} is there {times} times"
    computed = {name: one.to_dict() for name, one in found.likelihood.items()}
    yield from _differing("evaluation.json: likelihood", written, computed, PAIRS)


def _fluency(tree: dict[str, Any], found: Evaluation) -> Iterator[str]:
    """What the answers' texts give; the perplexity takes the untrained model."""
    for name, written in (tree.get("fluency") or {}).items():
        again, n = repetition([answer for answer in found.answers if answer.set == name])
        kept = {key: written.get(key) for key in ("repetition", "n")}
        yield from _differing(f"evaluation.json: fluency.{name}", kept, {"repetition": again, "n": n})


def _differing(where: str, written: Any, computed: Any, source: str = "the answers") -> Iterator[str]:
    """Lines for all leaves that differ between two trees of numbers."""
    if isinstance(written, dict) and isinstance(computed, dict):
        for key in {**written, **computed}:
            yield from _differing(f"{where}.{key}", written.get(key), computed.get(key), source)
    elif isinstance(written, list | tuple) and isinstance(computed, list | tuple) and len(written) == len(computed):
        for number, pair in enumerate(zip(written, computed, strict=True)):
            yield from _differing(f"{where}[{number}]", *pair, source)
    elif not _same(written, computed):
        verb = "give" if source == "the answers" else "gives"
        yield f"{where} is {_shown(written)}, {source} {verb} {_shown(computed)}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=CLOSE, abs_tol=CLOSE)
    return one == other


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "not there" if value is None else str(value)
