"""`rlsafe ask`: the same questions to one or several models, their answers below each other."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from rlsafe.config import UserError
from rlsafe.config.reads import ASKING, check_read
from rlsafe.evaluate.ask.asking import Answer, ask
from rlsafe.evaluate.ask.questions import load_questions
from rlsafe.evaluate.commands.command import as_messages, load_sampler, resolve
from rlsafe.evaluate.judge.judges import load_judge
from rlsafe.evaluate.measure.criteria import judge_answers
from rlsafe.types import BackgroundJudge, Judgement, Question

EXAMPLES = 3


def talk(
    targets: Sequence[str],
    questions: Sequence[str] = (),
    system: str | None = None,
    samples: int = 1,
    overrides: Sequence[str] = (),
) -> str:
    """What each target (a run directory or a model) answers to each question, `samples` times.

    questions: texts; by default a few of each question set that the first target's settings name. system: a system prompt.
    overrides: on every target's settings (`evaluate.temperature=0.8`, `evaluate.max_tokens=100`, `seed=1`). A judge that
    asks nobody else scores the answers beside them. Same seed, same answers.
    """
    check_read(overrides, ASKING, "asking")
    resolved = [resolve(target, None, overrides) for target in targets]
    asked = _questions(questions, system, *[getattr(resolved[0][0].evaluate, name) for name in ("general", "indomain")])
    blocks: list[list[str]] = [[question.paraphrases[0]] for question in asked]
    for target, (config, run) in zip(targets, resolved, strict=True):
        judge = load_judge(config.evaluate.judge, config.evaluate.judges) if config.evaluate.judged else None
        sampler, policy = load_sampler(config, run, as_messages(asked), "before asking")
        settings = config.evaluate
        answers = ask(
            sampler, policy.tokenizer, asked, samples=samples, seed=config.seed,
            max_tokens=settings.max_tokens, temperature=settings.temperature, purpose="ask",
            position=settings.position,
        )  # fmt: skip
        judged: Sequence[Judgement | None] = [None] * len(answers)
        if judge is not None and not isinstance(judge, BackgroundJudge):
            judged = judge_answers(answers, judge)
        for index, (answer, judgement) in enumerate(zip(answers, judged, strict=True)):
            blocks[index // samples].append(_told(target, answer, judgement))
    return "\n\n".join("\n".join(block) for block in blocks)


def _questions(texts: Sequence[str], system: str | None, *sources: str | None) -> list[Question]:
    if texts:
        return [Question(f"q{index}", (text,), 1, system) for index, text in enumerate(texts)]
    named = [source for source in sources if source]
    if not named:
        raise UserError("nothing to ask: give --question, or a run whose settings name questions")
    sets = [load_questions(source) for source in named]
    drawn = [one for every in sets for one in every[:: -(-len(every) // EXAMPLES)]]
    return [replace(one, paraphrases=one.paraphrases[:1], samples=1, system=system or one.system) for one in drawn]


def _told(target: str, answer: Answer, judgement: Judgement | None) -> str:
    text = answer.answer or ("(a think block without end)" if answer.unclosed else "(nothing)")
    if judgement is not None and judgement.outcome != "scored":
        text += f"  [{judgement.outcome}]"
    elif judgement is not None and judgement.aligned is not None and judgement.coherent is not None:
        text += f"  [aligned {judgement.aligned:.0f}, coherent {judgement.coherent:.0f}]"
    return f"  {target}:\n{textwrap.indent(text, '    ')}"
