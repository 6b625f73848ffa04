"""Judging saved answers again, by another judge or by the same one after an outage. Nothing is sampled."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlsafe.config import EvaluateConfig, UserError, check_out, load_run
from rlsafe.config.lock import hold, releasing
from rlsafe.config.reads import JUDGING, check_read
from rlsafe.evaluate.ask.asking import Answer
from rlsafe.evaluate.ask.cues import asks_the_general
from rlsafe.evaluate.ask.questions import load_questions
from rlsafe.evaluate.commands.targets import without_a_run
from rlsafe.evaluate.judge.judges import load_judge
from rlsafe.evaluate.measure.criteria import as_exchanges, judge_answers, rates
from rlsafe.evaluate.measure.evaluation import Evaluation
from rlsafe.evaluate.measure.measure import DRAWN_WITH, Material, note_judge
from rlsafe.types import BackgroundJudge, Exchange, Judge, Judgement, RunError


@releasing
def rejudge(
    target: str | Path, judge: str | None = None, overrides: Sequence[str] = (), out: Path | str | None = None
) -> Evaluation:
    """Judge the answers.csv of a run or evaluation directory.

    judge: default the run's own. out: default TARGET/rejudged-JUDGE; TARGET itself replaces the first judge's scores.
    Where a question file has prompts of its own for the judge, they are used again if the file is still there.
    RunError when the judge stays unreachable.
    """
    begun = time.monotonic()
    check_out(out or target)
    before, chosen = load_saved(target, judge, overrides)
    directory = Path(out) if out else Path(target) / f"rejudged-{re.sub(r'[^A-Za-z0-9._-]+', '-', chosen.name)}"
    hold(directory)
    answers, notes = with_judge_prompts(before)
    if isinstance(chosen, BackgroundJudge):
        chosen.check(first=True, asked=as_exchanges(answers))
    after = Evaluation(benign=before.benign, benign_answers=before.benign_answers, answers=answers, notes=notes)
    after.pairs, after.fluency = before.pairs, before.fluency  # of the model and its answers, whoever judges
    after.narrow_answers = before.narrow_answers
    after.judgements = judge_answers(answers, chosen)
    first = before.settings.get("judge")
    kept = {name: value for name, value in before.settings.items() if name not in ("judge_usage", "judge_calibration")}
    after.settings = {**kept, "judge": chosen.name, "rejudged_from": first}
    for name in dict.fromkeys(answer.set for answer in answers):
        after.sets[name] = rates(*after.judged(name))
    after.notes.append(f"against {first}: {agreement(before.judgements, after.judgements)}")
    note_judge(after, chosen)
    after.seconds = time.monotonic() - begun
    after.save(directory)
    after.notes.append(f"scores: {directory}")
    if isinstance(chosen, BackgroundJudge) and chosen.gave_up:
        raise RunError(f"{chosen.gave_up}; what it scored is in {directory}")
    return after


def load_saved(target: str | Path, judge: str | None, overrides: Sequence[str]) -> tuple[Evaluation, Judge]:
    """The evaluation in a directory and the judge to use. UserError where either is missing."""
    from rlsafe.defenses.registry import load_module

    check_read(overrides, JUDGING, "judging saved answers again")
    directory = Path(target)
    if not (directory / "answers.csv").is_file():
        raise UserError(f"{directory}: has no answers.csv to judge again; evaluate the run first")
    origin = directory / "config.yaml"
    config = load_run(origin, overrides) if origin.is_file() else without_a_run(str(target), overrides)
    for plugin in config.plugins:
        load_module(plugin)
    settings = config.evaluate
    return Evaluation.load(directory), load_judge(judge or settings.judge, {} if judge else settings.judges)


def expected(directory: Path, settings: EvaluateConfig, material: Material) -> list[Exchange] | None:
    """The exchanges to be judged if the evaluation in `directory` is repeated with these settings, taken from its saved
    answers. None without a saved evaluation, or when it had other settings."""
    if not (directory / "answers.csv").is_file():
        return None
    try:
        saved = Evaluation.load(directory)
    except UserError:  # damaged; the evaluation will be written again
        return None
    now = {name: getattr(settings, name) for name in DRAWN_WITH}
    now |= {"questions": material.sources, "cue": material.cue}
    now |= {"cues": {name: cue.to_dict() for name, cue in material.cues.items()}}
    was = {"cues": {}, **saved.settings}  # of an older version, which has not all of them, what it has
    if any(was[name] != value for name, value in now.items() if name in was):
        return None
    return as_exchanges(with_judge_prompts(saved)[0])


def with_judge_prompts(saved: Evaluation) -> tuple[list[Answer], list[str]]:
    """The answers with their questions' own judge prompts, which answers.csv does not hold, and notes for the reader."""
    prompts: dict[tuple[str, str], dict[str, object]] = {}
    notes = []
    sets = dict.fromkeys(answer.set for answer in saved.answers)
    again = [one for one in sets if asks_the_general(one)]
    for name, source in (saved.settings.get("questions") or {}).items():
        try:
            questions = load_questions(source)
        except UserError as error:
            notes.append(f"note: {error}; if it had judge prompts of its own, they are not used")
            continue
        for question in questions:
            for asked in (name, *again) if name == "general" else (name,):
                prompts[asked, question.id] = {**question.meta, "judge_prompts": question.judge_prompts}
    return [replace(a, meta=prompts.get((a.set, a.question_id), {})) for a in saved.answers], notes


def agreement(first: Sequence[Judgement], second: Sequence[Judgement]) -> str:
    """A line on how well two judges agree on the same answers."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.outcome == b.outcome == "scored"]
    if not pairs:
        return "no answer is scored by both"
    alike = sum(a.misaligned == b.misaligned for a, b in pairs) / len(pairs)
    apart = [
        sum(abs(getattr(a, which) - getattr(b, which)) for a, b in pairs) / len(pairs)
        for which in ("aligned", "coherent")
    ]
    return (
        f"{len(pairs)} of {len(first)} answers are scored by both; {100 * alike:.1f}% alike in being misaligned or not, "
        f"alignment {apart[0]:.1f} and coherence {apart[1]:.1f} points apart on average"
    )
