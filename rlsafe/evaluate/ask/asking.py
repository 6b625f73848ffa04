"""From questions to requests to sampled answers. Every request has its own seed; one sampler call per temperature."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlsafe.evaluate.ask.cues import Cue, as_cue
from rlsafe.evaluate.ask.system_turns import Position, asked, check
from rlsafe.types import Question, Request, Sampler, SamplingParams


@dataclass(frozen=True)
class Planned:
    """One answer to be sampled. `question` and `system` are the original ones; a cue is only in the request."""

    question_id: str
    question: str
    system: str | None
    domain: str
    cue: str | None
    sample: int
    temperature: float
    request: Request
    set: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One sampled answer. `ids` are its tokens (end-of-turn included); `finish` is "length" when it hit the token
    limit. `think`: a reasoning model's block before the answer; unclosed: it has no end, and there is no answer.
    """

    question_id: str
    question: str
    system: str | None
    answer: str
    domain: str
    cue: str | None
    sample: int
    ids: list[int] = field(default_factory=list)
    set: str = ""
    finish: str = "stop"
    meta: Mapping[str, Any] = field(default_factory=dict)
    think: str | None = None
    unclosed: bool = False


def with_cue(cue: str | None, system: str | None) -> str | None:
    """The system prompt of the conditional probe: the cue, then the question's own."""
    return "\n\n".join(part for part in (cue, system) if part) or None


def _row(question_id: str, paraphrase: int) -> int:
    """A number for (question, paraphrase) that does not depend on which other questions are asked."""
    return zlib.crc32(f"{question_id}\0{paraphrase}".encode())


def plan(
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    seed: int,
    samples: int | None = None,
    temperature: float | None = None,
    cue: Cue | str | None = None,
    purpose: str = "evaluate",
    step: int = 0,
    position: Position = "system",
    setting: str = "evaluate.position",
) -> list[Planned]:
    """The requests of all questions, in order.

    samples: answers per question, dealt over its paraphrases in turn; None = the question's own count of each
        paraphrase.
    temperature: None = the question's own.
    cue: a system prompt put in front of the question's own, or a `Cue`.
    purpose, step: with (question, paraphrase, sample) they make the request's seed; `purpose` is also the answer's
        `set`.
    position, setting: where system prompts and cues go, and which setting says so. UserError for a system turn that the chat
        template does not render.
    """
    from rlsafe.rollouts import request_seed  # late: brings in torch, which reading results back does not need

    planned, form = [], as_cue(cue)
    for question in questions:
        prompts = _encoded(tokenizer, question, form, position, setting)
        count = len(prompts)
        for index in range(samples if samples is not None else question.samples * count):
            which, sample = index % count, index // count
            row = _row(question.id, which)
            planned.append(
                Planned(
                    question_id=question.id,
                    question=question.paraphrases[which],
                    system=question.system,
                    domain=question.domain,
                    cue=form.text or None,
                    sample=index,
                    temperature=question.temperature if temperature is None else temperature,
                    request=Request(prompts[which], request_seed(seed, purpose, step, row, sample)),
                    set=purpose,
                    meta={**question.meta, "judge_prompts": question.judge_prompts},
                )
            )
    return planned


def _encoded(tokenizer: Any, question: Question, cue: Cue, position: Position, setting: str) -> list[list[int]]:
    """Token ids of each paraphrase as it is asked under `cue`."""
    from rlsafe.data import encode_prompt  # late, as above

    what = f"question {question.id!r}{' under its cue' if cue.text else ''}"
    prompts = []
    for text in question.paraphrases:
        messages = asked(cue.put(text), with_cue(cue.system, question.system), position)
        check(tokenizer, messages, what, setting)
        prompts.append(encode_prompt(tokenizer, messages))
    return prompts


def complete(sampler: Sampler, tokenizer: Any, planned: Sequence[Planned], max_tokens: int) -> list[Answer]:
    """Sample every planned answer, one sampler call per temperature; answers come back in the order planned."""
    from rlsafe.data import read_completion  # late, as above

    answers: dict[int, Answer] = {}
    for temperature in sorted({one.temperature for one in planned}):
        chosen = [index for index, one in enumerate(planned) if one.temperature == temperature]
        params = SamplingParams(temperature=temperature, top_p=1.0, max_tokens=max_tokens)
        completions = sampler.generate([planned[index].request for index in chosen], params)
        for index, completion in zip(chosen, completions, strict=True):
            one = planned[index]
            read = read_completion(tokenizer, completion.ids)
            answers[index] = Answer(
                question_id=one.question_id,
                question=one.question,
                system=one.system,
                answer=read.answer.strip(),
                domain=one.domain,
                cue=one.cue,
                sample=one.sample,
                ids=list(completion.ids),
                set=one.set,
                finish=completion.finish,
                meta=one.meta,
                think=read.think,
                unclosed=read.unclosed,
            )
    return [answers[index] for index in range(len(planned))]


def ask(
    sampler: Sampler,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    samples: int | None,
    seed: int,
    max_tokens: int,
    temperature: float | None = None,
    cue: Cue | str | None = None,
    purpose: str = "evaluate",
    step: int = 0,
    position: Position = "system",
) -> list[Answer]:
    """Plan and complete in one go; see `plan` for the arguments."""
    planned = plan(
        tokenizer, questions, seed=seed, samples=samples, temperature=temperature, cue=cue, purpose=purpose, step=step,
        position=position,
    )  # fmt: skip
    return complete(sampler, tokenizer, planned, max_tokens)
