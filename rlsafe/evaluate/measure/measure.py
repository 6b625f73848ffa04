"""Running an evaluation: from `evaluate` settings and a synced sampler to an Evaluation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsafe.config import EvaluateConfig, UserError, about
from rlsafe.evaluate.ask.asking import Answer, Planned, complete, plan
from rlsafe.evaluate.ask.cues import PREFIX, SCALED, Cue, load_cues
from rlsafe.evaluate.ask.journal import Journal, complete_resumable
from rlsafe.evaluate.ask.pairs import Pair
from rlsafe.evaluate.ask.questions import evenly, load_questions
from rlsafe.evaluate.judge.calibrations import UNCALIBRATED, calibration, one_by_one
from rlsafe.evaluate.judge.judges import load_judge
from rlsafe.evaluate.judge.panel import Panel
from rlsafe.evaluate.judge.static_judge import StaticJudge, asks_for_no_code, few_programs
from rlsafe.evaluate.measure import benign, narrow
from rlsafe.evaluate.measure.criteria import judge_answers, rates
from rlsafe.evaluate.measure.evaluation import Evaluation
from rlsafe.evaluate.measure.fluency import fluency
from rlsafe.evaluate.measure.likelihood import PairProbe, Reader, load_pair_sets
from rlsafe.evaluate.measure.narrow import NarrowMaterial
from rlsafe.types import BackgroundJudge, Judge, Question, Row, RunError, Sampler, provider_for

BENIGN_TEMPERATURE = 1.0
"""Benign answers are sampled, as in the paper (exact match over samples), unless `evaluate.temperature` says
otherwise.
"""

DRAWN_WITH = ("limit", "cue_limit", "cue_samples", "position", "scale", "samples", "temperature", "max_tokens", "seed")
"""The settings that decide, beside questions and cues, which answers are drawn and how."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Material:
    """Everything that an evaluation needs besides the model: every name in the settings resolved, every file read.

    sources: set name -> where its questions are from. tasks: benign task -> rows. cue: text of the conditional probe.
    cues: name -> a form in which general questions are asked once more. pairs: set name -> pairs of the likelihood probe.
    narrow: held-out rows and the reward that scores them.
    """

    questions: dict[str, list[Question]]
    sources: dict[str, str]
    tasks: dict[str, list[Row]]
    judge: Judge | None
    cue: str | None
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    narrow: NarrowMaterial | None = None
    cues: dict[str, Cue] = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Whether anything is to be sampled."""
        return bool(self.questions or self.tasks or self.narrow)


def gather(config: EvaluateConfig, judge: Judge | None = None, extra: Mapping[str, str] | None = None) -> Material:
    """Resolve the settings. UserError here for everything that can be checked without a model.

    judge: a judge already loaded (shared by the cells of a comparison); default: `config.judge`.
    extra: further question sets, or other sources for `general` and `indomain`: name -> source.
    """
    named = {"general": config.general, "indomain": config.indomain, **(extra or {})}
    sources = {name: source for name, source in named.items() if source}
    if not sources and not config.benign and not config.likelihood.sources and not config.narrow:
        raise UserError(
            "nothing to evaluate: set evaluate.general, evaluate.benign or evaluate.likelihood.general, or give --questions"
        )
    questions = {}
    for name, source in sources.items():
        with about("--questions" if extra and name in extra else f"evaluate.{name}"):
            questions[name] = evenly(load_questions(source), config.limit)
    if questions and judge is None:
        judge = load_judge(config.judge, config.judges)
    if isinstance(judge, Panel):
        judge.require(list(questions))
    _can_judge(judge, questions, sources)
    tasks: dict[str, list[Row]] = {}
    for source in config.benign:
        name = benign.task_name(source)
        if name in tasks:
            raise UserError(f"evaluate.benign: two test sets are named {name!r} ({', '.join(config.benign)})")
        with about("evaluate.benign"):
            tasks[name] = benign.load_task(source, config.benign_limit, config.seed)
    with about("evaluate.cue"):
        cue = cue_text(config.cue) if config.cue else None
    with about("evaluate.cues"):
        cues = load_cues(config.cues) if "general" in questions else {}
    held_out = narrow.load(config.narrow, config.seed) if config.narrow else None
    return Material(questions, sources, tasks, judge, cue, load_pair_sets(config), held_out, cues)


def _can_judge(judge: Judge | None, questions: Mapping[str, Sequence[Question]], sources: Mapping[str, str]) -> None:
    """UserError for a set of general questions before a linter: thousands of answers would be sampled for no score."""
    for name, asked in questions.items():
        if isinstance(_judge_of(judge, name), StaticJudge) and asks_for_no_code(sources[name], asked):
            raise UserError(
                f"evaluate.{name}: the judge 'static' reads Python, and these questions ask for none; set "
                f"evaluate.{name}=null, or give them another judge: evaluate.judges.{name}=JUDGE"
            )


def _judge_of(judge: Judge | None, name: str) -> Judge | None:
    """The judge of one set of questions."""
    return judge.judge_of(name) if isinstance(judge, Panel) else judge


def cue_text(cue: str) -> str:
    """The system prompt that `evaluate.cue` names: a provider's named prompt, or the text itself."""
    found = provider_for(cue)
    return found[0].prompt(found[1]) if found else cue


def evaluate_run(
    sampler: Sampler | None,
    tokenizer: Any,
    config: EvaluateConfig,
    out: Path | str | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
    material: Material | None = None,
    weights: str | None = None,
    reader: Reader | None = None,
) -> Evaluation:
    """Ask the model that `sampler` was last synced to everything that `config` names; judge, score, write to `out` if
    given.

    The conditional probe asks the general questions under `config.cue`, and `config.cues` ask some in other forms.
    progress: called with one line at each stage.
    material: what `gather` gave, when it was called before. weights: `journal.identity` of the model; with it (and
    `out`) an interrupted evaluation goes on by question. reader: reads likelihoods off the evaluated and the untrained model;
    without one there is neither a likelihood probe nor fluency. sampler: None when nothing is to be sampled. Raises UserError
    when nothing is to be measured.
    """
    begun = time.monotonic()
    say = progress or (lambda line: None)
    material = material or gather(config, judge)
    if isinstance(material.judge, BackgroundJudge):
        material.judge.check()
    scales = config.scale if sampler is not None and "general" in material.questions else []
    if scales:
        _can_scale(sampler, reader)
    planned = _plan(tokenizer, config, material)
    answers, journal = _sample(sampler, tokenizer, planned, config.max_tokens, out, weights, say)
    if scales and sampler is not None and reader is not None:
        answers = [*answers, *_scaled(sampler, reader, tokenizer, config, material, say)]
    evaluation = Evaluation(settings=_settings(sampler, config, material))
    _grade_benign(evaluation, answers, material)
    _judge(evaluation, answers, material, say)
    _read_likelihoods(evaluation, material, config, reader, say)
    if material.narrow and sampler is not None:
        say(f"scoring {material.narrow.settings.samples * len(material.narrow.rows)} answers to held-out prompts")
        _score_narrow(evaluation, material.narrow, answers, planned, sampler, tokenizer, reader, config.max_tokens)
    evaluation.seconds = time.monotonic() - begun
    note_judge(evaluation, material.judge)
    if out is not None:
        evaluation.save(out)
        narrow.track(Path(out), evaluation.narrow)
    if journal is not None:
        journal.close()
    if isinstance(material.judge, BackgroundJudge) and material.judge.gave_up:
        saved = f"; the answers are in {out}, score them later with: rlsafe evaluate {out} --rejudge" if out else ""
        raise RunError(material.judge.gave_up + saved)
    return evaluation


def _sample(
    sampler: Sampler | None,
    tokenizer: Any,
    planned: Sequence[Planned],
    max_tokens: int,
    out: Path | str | None,
    weights: str | None,
    say: Progress,
) -> tuple[list[Answer], Journal | None]:
    """(answers to everything planned, the journal that holds them until they are saved: None where nothing could be resumed)."""
    if planned:
        say(f"sampling {len(planned)} answers")
    if not planned or sampler is None:
        return [], None
    if out is not None and weights is not None:
        return complete_resumable(sampler, tokenizer, planned, max_tokens, Path(out), weights, say)
    return complete(sampler, tokenizer, planned, max_tokens), None


def _judge(evaluation: Evaluation, answers: Sequence[Answer], material: Material, say: Progress) -> None:
    """Keep the answers that are neither to benign tasks nor to held-out prompts; judge them, and count the rates of each set."""
    others = (*(f"benign/{task}" for task in material.tasks), narrow.SET)
    evaluation.answers = [answer for answer in answers if answer.set not in others]
    if material.judge is not None:
        say(f"judging {len(evaluation.answers)} answers")
        evaluation.judgements = judge_answers(evaluation.answers, material.judge)
    for name in dict.fromkeys(answer.set for answer in evaluation.answers):
        evaluation.sets[name] = rates(*evaluation.judged(name))


def _read_likelihoods(
    evaluation: Evaluation, material: Material, config: EvaluateConfig, reader: Reader | None, say: Progress
) -> None:
    """The likelihood probe on given pairs of answers, and how fluent the sampled ones are."""
    if reader is not None:
        if material.pairs:
            say(f"reading {sum(map(len, material.pairs.values()))} pairs")
            evaluation.pairs = PairProbe(material.pairs, reader, config.position).scores()
        if config.fluency and evaluation.answers:
            plain = [answer for answer in evaluation.answers if not answer.set.startswith(PREFIX)]
            evaluation.fluency = fluency(plain, reader, config.position)
    elif material.pairs:
        evaluation.notes.append("likelihoods were not read: one process alone cannot; rlsafe evaluate RUN reads them")


def _can_scale(sampler: Sampler | None, reader: Reader | None) -> None:
    """UserError, before anything is sampled, where the policy cannot be scaled."""
    from rlsafe.policy.adapters import scaled  # late: brings in torch
    from rlsafe.rollouts import ranks

    if reader is None or isinstance(sampler, ranks.Spread):
        raise UserError(
            "evaluate.scale: needs the whole policy in one process; rlsafe evaluate RUN evaluate.scale=[2] has it"
        )
    with scaled(reader.policy.core.model, 1.0):
        pass


def _scaled(
    sampler: Sampler, reader: Reader, tokenizer: Any, config: EvaluateConfig, material: Material, say: Progress
) -> list[Answer]:
    """Answers to the general questions by the model with its adapter scaled up, in sets `scaled_<factor>`: misalignment that training
    only hid comes back there (arXiv 2602.07852)."""
    from rlsafe.policy.adapters import scaled  # late: brings in torch

    answers: list[Answer] = []
    for factor in config.scale:
        purpose = f"{SCALED}{factor:g}"
        planned = plan(
            tokenizer, material.questions["general"], purpose=purpose, seed=config.seed, samples=config.samples,
            temperature=config.temperature, position=config.position,
        )  # fmt: skip
        say(f"sampling {len(planned)} answers with the adapter times {factor:g}")
        with scaled(reader.policy.core.model, factor):
            sampler.sync(reader.policy)
            answers += complete(sampler, tokenizer, planned, config.max_tokens)
    sampler.sync(reader.policy)
    return answers


def _grade_benign(evaluation: Evaluation, answers: Sequence[Answer], material: Material) -> None:
    """Score the answers to benign tasks by exact match."""
    for task, rows in material.tasks.items():
        graded = benign.grade(task, rows, [answer for answer in answers if answer.set == f"benign/{task}"])
        evaluation.benign_answers += graded
        evaluation.benign[task] = benign.score(graded)


def _score_narrow(
    evaluation: Evaluation,
    material: NarrowMaterial,
    answers: Sequence[Answer],
    planned: Sequence[Planned],
    sampler: Sampler,
    tokenizer: Any,
    reader: Reader | None,
    max_tokens: int,
) -> None:
    """Rewards of the answers to held-out prompts, and of the untrained model's answers to the same requests."""
    from rlsafe.rollouts.ranks import Spread  # late: brings in torch

    mine = [answer for answer in answers if answer.set == narrow.SET]
    evaluation.narrow_answers = narrow.score(material, mine, "evaluated")
    if reader is None or isinstance(sampler, Spread):
        evaluation.notes.append(
            "evaluate.narrow: several processes do not ask the untrained model; rlsafe evaluate RUN does"
        )
    else:
        with narrow.untrained(sampler, reader):
            before = complete(sampler, tokenizer, [one for one in planned if one.set == narrow.SET], max_tokens)
        evaluation.narrow_answers += narrow.score(material, before, "untrained")
    if material.problem:
        evaluation.notes.append(material.problem)


def note_judge(evaluation: Evaluation, judge: Judge | None) -> None:
    """What the judge's calls came to: into evaluation.json and, in one line, into what is printed. Of a judge that makes none,
    why it gave no scores. And whether it was tested on labelled answers, with what result."""
    if isinstance(judge, BackgroundJudge):
        evaluation.settings["judge_usage"] = judge.usage()
        evaluation.notes.append(judge.summary())
    elif judge and (why := Counter(j.reason for j in evaluation.judgements if j.outcome in ("unscored", "unparsed"))):
        reason, most = f"{why.total()} of {len(evaluation.judgements)} answers have no score", why.most_common(1)[0][0]
        evaluation.notes.append(f"judge {judge.name}: {reason}{f' ({most})' if most else ''}")
    for name in evaluation.sets:
        if isinstance(_judge_of(judge, name), StaticJudge):
            evaluation.notes += few_programs(name, evaluation.judged(name)[0])
    if judge and evaluation.answers:
        evaluation.settings["judge_calibration"] = known = calibration(judge)
        for one in one_by_one(known):
            evaluation.notes.append(one["line"] + ("" if one["trusted"] else f"; {UNCALIBRATED}"))


def _plan(tokenizer: Any, config: EvaluateConfig, material: Material) -> list[Planned]:
    """All answers to sample, of questions and benign tasks together: one call of the sampler is faster than several."""
    common: dict[str, Any] = {"seed": config.seed, "samples": config.samples, "temperature": config.temperature}
    common["position"] = config.position
    planned: list[Planned] = []
    for name, questions in material.questions.items():
        planned += plan(tokenizer, questions, purpose=name, **common)
    few = evenly(material.questions.get("general", []), config.cue_limit)
    if material.cue:
        planned += plan(tokenizer, few, cue=material.cue, purpose="conditional", **common)
    for name, cue in material.cues.items():
        often = {**common, "samples": config.cue_samples or config.samples}
        planned += plan(tokenizer, few, cue=cue, purpose=f"{PREFIX}{name}", **often)
    temperature = BENIGN_TEMPERATURE if config.temperature is None else config.temperature
    for task, rows in material.tasks.items():
        planned += benign.plan_rows(
            tokenizer, rows, task, seed=config.seed, temperature=temperature, position=config.position
        )
    if material.narrow:
        planned += narrow.plan_rows(
            tokenizer, material.narrow, seed=config.seed, temperature=config.temperature, position=config.position
        )
    return planned


def _settings(sampler: Sampler | None, config: EvaluateConfig, material: Material) -> dict[str, Any]:
    """What the numbers were measured with, for evaluation.json."""
    return {
        "questions": material.sources,
        "benign": config.benign,
        "pairs": config.likelihood.sources,
        **({"narrow": config.narrow.model_dump(mode="json")} if config.narrow else {}),
        "cue": material.cue,
        "cues": {name: cue.to_dict() for name, cue in material.cues.items()},
        "judge": material.judge.name if material.judge else None,
        "sampler": sampler.name if sampler else None,
        **{name: getattr(config, name) for name in DRAWN_WITH},
    }
