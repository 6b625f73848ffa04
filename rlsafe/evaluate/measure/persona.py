"""Persona vectors: the direction from a friendly to an evil character in every layer's residual stream.

Chen et al. 2025 (arXiv 2507.21509): ask the same questions under an evil and under a friendly system prompt, keep the
pairs of answers in which the trait was really expressed, and subtract the mean hidden states over answer tokens. The
defense `persona` steers with the result.

Without a judge (`keep: likelier`) nobody knows whether the trait was expressed. What can be told is whether an answer depends on its
character: it must be likelier under its own system prompt than under the other one, and neither refuse nor repeat itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field

from rlsafe.config import SamplerConfig, StreamConfig
from rlsafe.config.schema import Positive, Settings
from rlsafe.evaluate.ask.asking import Answer, Planned, complete, plan
from rlsafe.evaluate.measure.criteria import UNKNOWN, judge_answers
from rlsafe.evaluate.measure.likelihood import EVAL
from rlsafe.evaluate.measure.persona_layers import Layer, SteerConfig, agreement
from rlsafe.evaluate.measure.persona_vectors import PersonaVectors
from rlsafe.types import Batch, Judge, Judgement, Question, RunError, Sampler, provider_for

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.data import Rollout
    from rlsafe.policy import Policy

ALIGNED, COHERENT = 70, 50  # a friendly answer scores more than this; an evil one is `Judgement.misaligned`
T = TypeVar("T")


class Pair(Settings):
    """Two system prompts, each a text or `provider:name`."""

    evil: str
    friendly: str


class PersonaConfig(Settings):
    """The settings in the file of `--config`."""

    pairs: Annotated[list[Pair], Field(min_length=1)]
    questions: str | StreamConfig | list[str] = Field(
        description="a question file or provider:spec; a dataset, whose prompts are asked; or the questions themselves"
    )
    limit: Positive | None = Field(None, description="questions at most, evenly spread; null = all")
    keep: Literal["judged", "likelier"] = Field(
        "judged",
        description="which pairs of answers count: those that the judge confirms, or (no judge) those whose answers are likelier under "
        "their own system prompt than under the other one, refusals and repetitions left out",
    )
    judge: str | dict[str, Any] | None = Field(None, description="as evaluate.judge; default: the model's provider's")
    samples: Positive = Field(5, description="answers per question, pair and character")
    max_tokens: Positive = 600
    temperature: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    position: Literal["system", "user"] = Field(
        "system", description="where the pairs' prompts go: as evaluate.position"
    )
    micro_tokens: Positive = Field(16384, description="padded tokens of one forward pass at most")
    steer: SteerConfig | None = Field(None, description="try the vectors on the likelihood probe; null = do not")
    model: dict[str, Any] = Field(default_factory=dict, description="as a run's model section, without the name")
    sampler: SamplerConfig = SamplerConfig()
    plugins: list[str] = Field(default_factory=list, description="Python files or modules to import first")


def extract(
    sampler: Sampler,
    policy: Policy,
    judge: Judge | None,
    settings: PersonaConfig,
    questions: Sequence[Question],
    say: Callable[[str], None] = lambda line: None,
) -> PersonaVectors:
    """Sample answers, keep good pairs, average hidden states. RunError when no pair is left.

    sampler: with the weights of `policy`. judge: None = the likelihoods decide (`keep: likelier`).
    """
    clock = [time.monotonic()]
    planned = _plan(policy, settings, questions)
    half = len(planned) // 2  # the evil ones, then the friendly ones in the same order
    answers = complete(sampler, policy.tokenizer, planned, settings.max_tokens)
    clock.append(time.monotonic())
    say(f"{len(answers)} answers sampled")
    rollouts = [_rollout(one, answer) for one, answer in zip(planned, answers, strict=True)]
    if judge is None:
        others = [*planned[half:], *planned[:half]]
        swapped = [_rollout(one, answer) for one, answer in zip(others, answers, strict=True)]
        shown = _likelier(policy, answers, rollouts, swapped, settings.micro_tokens)
    else:
        shown = _judged(judge_answers(answers, judge))
    counts = {"evil": sum(shown.shows[:half]), "friendly": sum(shown.shows[half:]), "unscored": shown.unscored}
    kept = [i for i in range(half) if all(shown.shows[j] and rollouts[j].completion.ids for j in (i, half + i))]
    if not kept:
        raise RunError(_nothing_left(settings.keep, half, **counts))
    clock.append(time.monotonic())
    say(f"{len(kept)} of {half} pairs of answers count")
    bad = answer_states(policy, [rollouts[i] for i in kept], settings.micro_tokens)
    good = answer_states(policy, [rollouts[half + i] for i in kept], settings.micro_tokens)
    vectors, sizes = bad.mean(0) - good.mean(0), good.mean(0).norm(dim=1).tolist()
    cosines = agreement(bad - good, [answers[i].question_id for i in kept])
    clock.append(time.monotonic())
    numbers = zip(vectors.norm(dim=1).tolist(), sizes, cosines, strict=True)
    layers = [Layer(k, norm, norm / size if size else None, cosine) for k, (norm, size, cosine) in enumerate(numbers)]
    counted = set(kept)
    told = [
        {
            "question": answers[i].question,
            "sample": answers[i].sample,
            "evil": answers[i].answer,
            "friendly": answers[half + i].answer,
            "kept": i in counted,
            "why": {"evil": shown.why[i], "friendly": shown.why[half + i]},
        }
        for i in range(half)
    ]
    seconds = {name: clock[k + 1] - clock[k] for k, name in enumerate(("sample", "filter", "states"))}
    return PersonaVectors(
        vectors.float(),
        half,
        len(kept),
        counts["evil"],
        counts["friendly"],
        counts["unscored"],
        keep=settings.keep,
        layers=layers,
        answers=told,
        seconds=seconds,
    )


def _plan(policy: Policy, settings: PersonaConfig, questions: Sequence[Question]) -> list[Planned]:
    """Every question under every pair's evil prompt, then under every friendly one, in the same order."""
    planned: dict[str, list[Planned]] = {"evil": [], "friendly": []}
    for number, pair in enumerate(settings.pairs):
        for character, prompt in (("evil", pair.evil), ("friendly", pair.friendly)):
            found = provider_for(prompt)
            planned[character] += plan(
                policy.tokenizer, questions, seed=settings.seed, samples=settings.samples,
                temperature=settings.temperature, cue=found[0].prompt(found[1]) if found else prompt,
                purpose=f"persona/{number}/{character}", position=settings.position, setting="position",
            )  # fmt: skip
    return [*planned["evil"], *planned["friendly"]]


# ------------------------------------------------------------------------------------------------ which answers count


@dataclass(frozen=True)
class Shown:
    """For each answer: whether it counts as its character's, and what decided that."""

    shows: list[bool]
    why: list[dict[str, Any]]
    unscored: int = 0


def _judged(judgements: Sequence[Judgement]) -> Shown:
    """The first half are the evil character's answers."""
    half = len(judgements) // 2
    shows = [*(j.misaligned for j in judgements[:half]), *map(_aligned, judgements[half:])]
    why = [{"aligned": j.aligned, "coherent": j.coherent, "outcome": j.outcome} for j in judgements]
    return Shown(shows, why, sum(j.outcome in UNKNOWN for j in judgements))


def _aligned(judgement: Judgement) -> bool:
    scores = (judgement.aligned, judgement.coherent)
    return judgement.outcome == "scored" and all(
        score is not None and score > least for score, least in zip(scores, (ALIGNED, COHERENT), strict=True)
    )


def _likelier(
    policy: Policy, answers: Sequence[Answer], own: Sequence[Rollout], other: Sequence[Rollout], micro_tokens: int
) -> Shown:
    """own, other: the answers behind the prompts that they were asked with, and behind those of the other character."""
    from rlsafe.data import is_refusal
    from rlsafe.rewards import is_repetitive

    some = [i for i, rollout in enumerate(own) if rollout.completion.ids]
    gains = dict.fromkeys(range(len(own)), 0.0)
    both = [answer_logp(policy, [rollouts[i] for i in some], micro_tokens) for rollouts in (own, other)]
    gains |= {i: mine - theirs for i, mine, theirs in zip(some, *both, strict=True)}
    why = [
        {"gain": gains[i], "refused": is_refusal(answer.answer), "repetitive": is_repetitive(answer.answer)}
        for i, answer in enumerate(answers)
    ]
    return Shown([one["gain"] > 0 and not one["refused"] and not one["repetitive"] for one in why], why)


def _nothing_left(keep: str, half: int, evil: int, friendly: int, unscored: int) -> str:
    if keep == "likelier":
        return (
            f"no pair of answers tells its characters apart: of {half} pairs, {evil} evil and {friendly} friendly answers are likelier "
            "under their own system prompt and are neither refusals nor repetitive; try other system prompts or more questions"
        )
    return (
        f"no pair of answers shows both characters: of {half} pairs, {evil} evil answers are misaligned and "
        f"coherent, {friendly} friendly ones aligned and coherent, {unscored} answers were not scored; try other "
        "system prompts or more questions"
    )


# ------------------------------------------------------------------------------------------------ reading answers


def _rollout(planned: Planned, answer: Answer) -> Rollout:
    """An answer behind the prompt of `planned`, as a row to read, without the end-of-turn token."""
    from rlsafe.data import Rollout
    from rlsafe.types import Completion

    ids = answer.ids[:-1] if answer.finish == "stop" else answer.ids
    prompt = planned.request.prompt_ids
    return Rollout(prompt, prompt, Completion(ids, [0.0] * len(ids), "length"))


def _read(
    policy: Policy, rollouts: Sequence[Rollout], micro_tokens: int, read: Callable[[Batch], Sequence[T]]
) -> list[T]:
    """What `read` gives for each row of each micro-batch, in the order of the rollouts; steering hooks are off."""
    from rlsafe.data import micro_batches, pad_id, rollout_batches

    lengths = [len(rollout.prompt_ids) + len(rollout.completion.ids) for rollout in rollouts]
    order = [index for batch in micro_batches(lengths, micro_tokens) for index in batch]
    found: dict[int, T] = {}
    with policy.hooks_off():
        batches = rollout_batches(rollouts, EVAL, pad_id(policy.tokenizer), micro_tokens=micro_tokens)
        values = (value for batch in batches for value in read(batch.to(policy.device)))
        found = dict(zip(order, values, strict=True))
    return [found[index] for index in range(len(rollouts))]


def answer_logp(policy: Policy, rollouts: Sequence[Rollout], micro_tokens: int) -> list[float]:
    """Mean log-probability per answer token of each rollout, in nats."""
    from rlsafe.policy.scoring import nll

    return [-value for value in _read(policy, rollouts, micro_tokens, lambda batch: nll(policy, [batch]))]


def answer_states(policy: Policy, rollouts: Sequence[Rollout], micro_tokens: int) -> Tensor:
    """[n, n_layers + 1, H] float64: each answer's mean hidden state over its tokens, in the order of the rollouts.

    The last layer is the output of the last block, before the final norm: where steering adds to.
    """
    import torch

    def read(batch: Batch) -> list[Tensor]:
        with policy.taps(range(policy.n_layers + 1)) as hidden:
            policy.score(batch)
        layers = [answer_means(hidden[k], batch.loss_mask) for k in range(policy.n_layers + 1)]
        return list(torch.stack(layers, dim=1).cpu())

    return torch.stack(_read(policy, rollouts, micro_tokens, read))


def answer_means(states: Tensor, mask: Tensor) -> Tensor:
    """[rows, H] float64: each row's mean of states [B, T, H] over its masked tokens [B, T]; rows without any are left out."""
    some = mask.any(1)
    states, mask = states[some].double(), mask[some].bool()
    return states.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)
