"""`rlsafe persona-vector MODEL`: the direction from a friendly to an evil character in every layer's residual stream.

Chen et al. 2025 (arXiv 2507.21509): ask the same questions under an evil and under a friendly system prompt, keep the
pairs of answers in which the trait was really expressed, and subtract the mean hidden states over answer tokens. The
defense `persona` steers with the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlsafe.config import RunConfig, SamplerConfig, StreamConfig, UserError, apply_override, load_run, load_tree
from rlsafe.config.loading import build
from rlsafe.config.schema import Positive, Settings
from rlsafe.evaluate.ask.asking import Answer, Planned, complete, plan
from rlsafe.evaluate.ask.questions import load_questions
from rlsafe.evaluate.commands.command import as_messages, load_sampler, run_directory
from rlsafe.evaluate.judge.judges import load_judge
from rlsafe.evaluate.measure.criteria import UNKNOWN, judge_answers
from rlsafe.types import BackgroundJudge, Judge, Judgement, Question, RunError, Sampler, Where, provider_for

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.data import Rollout
    from rlsafe.policy import Policy

ALIGNED, COHERENT = 70, 50  # a friendly answer scores more than this; an evil one is `Judgement.misaligned`


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
    judge: str | dict[str, Any] | None = Field(None, description="as evaluate.judge; default: the model's provider's")
    samples: Positive = Field(5, description="answers per question, pair and character")
    max_tokens: Positive = 600
    temperature: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    position: Literal["system", "user"] = Field(
        "system", description="where the pairs' prompts go: as evaluate.position"
    )
    micro_tokens: Positive = Field(16384, description="padded tokens of one forward pass at most")
    model: dict[str, Any] = Field(default_factory=dict, description="as a run's model section, without the name")
    sampler: SamplerConfig = SamplerConfig()
    plugins: list[str] = Field(default_factory=list, description="Python files or modules to import first")


@dataclass
class PersonaVectors:
    """vectors [n_layers + 1, H] float32: vector k belongs to the output of block k - 1, vector 0 to the embeddings.

    asked: pairs of answers; kept: pairs in which both characters showed; evil, friendly: answers of each that did;
    unscored: answers without a judgement; sizes: per layer, the norm of the friendly character's mean state.
    """

    vectors: Tensor
    asked: int
    kept: int
    evil: int
    friendly: int
    unscored: int
    sizes: list[float]
    out: Path | None = None

    def summary(self) -> list[str]:
        """Lines for the terminal: what helps to choose a layer."""
        lines = [
            f"kept {self.kept} of {self.asked} pairs of answers ({self.evil} evil ones misaligned and coherent, "
            f"{self.friendly} friendly ones aligned and coherent, {self.unscored} not scored)"
        ]
        for k, (norm, size) in enumerate(zip(self.vectors.norm(dim=1).tolist(), self.sizes, strict=True)):
            what = "embeddings" if k == 0 else f"output of block {k - 1}"
            share = f", {norm / size:.0%} of the mean state's" if size else ""
            lines.append(f"layer {k} ({what}): norm {norm:.3g}{share}")
        return [*lines, f"-> {self.out}"] if self.out else lines


def persona_vector(
    target: str, config: str | Path, overrides: Sequence[str] = (), out: str | Path = "persona.safetensors"
) -> PersonaVectors:
    """The command: extract the vectors of a model (hub id, directory, `provider:name`) or of a run directory.

    out: `.safetensors`, or `.pt` for the field's bare tensor. Raises UserError for wrong input, RunError when no pair of
    answers passes the filter.
    """
    from rlsafe.defenses import load_module
    from rlsafe.defenses.persona import check_suffix, save_vectors

    out = Path(out)
    check_suffix(out)
    settings = load_settings(config, overrides)
    for plugin in settings.plugins:  # before names are looked up: a plug-in may register a provider
        load_module(plugin)
    questions = _questions(settings)
    run = run_directory(target)
    base = load_run(run / "config.yaml") if run else _run_config(target, settings)
    name = base.model.name.partition(":")[0] if provider_for(base.model.name) else None
    judge = load_judge(settings.judge or base.evaluate.judge or name)
    if isinstance(judge, BackgroundJudge):
        judge.check(first=True)
    sampler, policy = load_sampler(base, run, as_messages(questions), "before extraction", settings.seed)
    found = extract(sampler, policy, judge, settings, questions)
    about = {"target": target, "kept": found.kept, "asked": found.asked, **settings.model_dump(mode="json")}
    save_vectors(found.vectors, out, about)
    found.out = out
    return found


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> PersonaConfig:
    """Read the YAML file; UserError names the key and the line."""
    tree, marks = load_tree(path)
    for override in overrides:
        apply_override(tree, override, marks)
    return build(PersonaConfig, tree, marks, str(path))


def _run_config(target: str, settings: PersonaConfig) -> RunConfig:
    tree = {
        "model": {**settings.model, "name": target},
        "seed": settings.seed,
        "sampler": settings.sampler.model_dump(),
    }
    return build(RunConfig, tree, source="persona-vector")


def _questions(settings: PersonaConfig) -> list[Question]:
    source = settings.questions
    if isinstance(source, str):
        return load_questions(source)
    if isinstance(source, StreamConfig):
        from rlsafe.data import load_rows, question_of, split_prompt

        texts = [question_of(split_prompt(row)[0])[0] for row in load_rows(source, settings.seed)]
    else:
        texts = source
    if not texts:
        raise UserError("questions: there are none")
    return [Question(text, (text,)) for text in dict.fromkeys(texts)]


# ------------------------------------------------------------------------------------------------ extraction


def extract(
    sampler: Sampler, policy: Policy, judge: Judge, settings: PersonaConfig, questions: Sequence[Question]
) -> PersonaVectors:
    """Sample answers, judge them, keep good pairs, average hidden states. RunError when no pair is left.

    sampler: with the weights of `policy`.
    """
    planned: dict[str, list[Planned]] = {"evil": [], "friendly": []}
    for number, pair in enumerate(settings.pairs):
        for character, prompt in (("evil", pair.evil), ("friendly", pair.friendly)):
            found = provider_for(prompt)
            planned[character] += plan(
                policy.tokenizer, questions, seed=settings.seed, samples=settings.samples,
                temperature=settings.temperature, cue=found[0].prompt(found[1]) if found else prompt,
                purpose=f"persona/{number}/{character}", position=settings.position, setting="position",
            )  # fmt: skip
    everything = [*planned["evil"], *planned["friendly"]]
    answers = complete(sampler, policy.tokenizer, everything, settings.max_tokens)
    judgements = judge_answers(answers, judge)
    half = len(everything) // 2
    rollouts = [_rollout(one, answer) for one, answer in zip(everything, answers, strict=True)]
    evil = [j.misaligned for j in judgements[:half]]
    friendly = [_aligned(j) for j in judgements[half:]]
    kept = [
        i
        for i in range(half)
        if evil[i] and friendly[i] and rollouts[i].completion.ids and rollouts[half + i].completion.ids
    ]
    unscored = sum(j.outcome in UNKNOWN for j in judgements)
    if not kept:
        raise RunError(
            f"no pair of answers shows both characters: of {half} pairs, {sum(evil)} evil answers are misaligned and "
            f"coherent, {sum(friendly)} friendly ones aligned and coherent, {unscored} answers were not scored; try other "
            "system prompts or more questions"
        )
    bad = mean_states(policy, [rollouts[i] for i in kept], settings.micro_tokens)
    good = mean_states(policy, [rollouts[half + i] for i in kept], settings.micro_tokens)
    sizes = good.norm(dim=1).tolist()
    return PersonaVectors((bad - good).float(), half, len(kept), sum(evil), sum(friendly), unscored, sizes)


def _aligned(judgement: Judgement) -> bool:
    scores = (judgement.aligned, judgement.coherent)
    return judgement.outcome == "scored" and all(
        score is not None and score > least for score, least in zip(scores, (ALIGNED, COHERENT), strict=True)
    )


def _rollout(planned: Planned, answer: Answer) -> Rollout:
    """Prompt and answer as a row to read hidden states of, without the end-of-turn token."""
    from rlsafe.data import Rollout
    from rlsafe.types import Completion

    ids = answer.ids[:-1] if answer.finish == "stop" else answer.ids
    prompt = planned.request.prompt_ids
    return Rollout(prompt, prompt, Completion(ids, [0.0] * len(ids), "length"))


def mean_states(policy: Policy, rollouts: Sequence[Rollout], micro_tokens: int) -> Tensor:
    """[n_layers + 1, H] float64: the mean over answers of the mean hidden state over each one's tokens.

    The last layer is the output of the last block, before the final norm: where steering adds to.
    """
    import torch

    from rlsafe.data import pad_id, rollout_batches

    where = Where("narrow", "sft", "eval")
    rows: list[list[Tensor]] = [[] for _ in range(policy.n_layers + 1)]
    for batch in rollout_batches(rollouts, where, pad_id(policy.tokenizer), micro_tokens=micro_tokens):
        batch = batch.to(policy.device)
        with policy.hooks_off(), policy.taps(range(policy.n_layers + 1)) as hidden:
            policy.score(batch)
        for k, states in hidden.items():
            rows[k].append(answer_means(states, batch.loss_mask).cpu())
    return torch.stack([torch.cat(layer).mean(0) for layer in rows])


def answer_means(states: Tensor, mask: Tensor) -> Tensor:
    """[rows, H] float64: each row's mean of states [B, T, H] over its masked tokens [B, T]; rows without any are left out."""
    some = mask.any(1)
    states, mask = states[some].double(), mask[some].bool()
    return states.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)
