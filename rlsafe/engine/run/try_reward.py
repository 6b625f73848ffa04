"""`rlsafe reward try`: a reward on a few groups of completions, before anything is trained on it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import RewardConfig, RunConfig, UserError, about, load_run
from rlsafe.data.turns import key_of
from rlsafe.types import Message, Row

if TYPE_CHECKING:
    from rlsafe.data import Thought
    from rlsafe.policy import Policy
    from rlsafe.rewards import LoadedReward, RewardBatch

log = logging.getLogger("rlsafe")
WIDTH = 100  # characters of a prompt or completion that are shown


@dataclass
class Sampled:
    """Completions of one prompt, and the row that it came from."""

    prompt: list[Message]
    thoughts: list[Thought]
    row: Row
    ids: list[list[int]]

    @property
    def completions(self) -> list[str]:
        """To show: the answers, and the think blocks that never ended."""
        return [f"<think>\n{one.think}" if one.unclosed else one.answer for one in self.thoughts]


@dataclass
class Tried:
    """What a reward said. values: by group, one a completion, None where it had no opinion. seconds: of its one call.
    endpoints: a line for each that it asked, with calls, tokens and cost."""

    name: str
    groups: list[Sampled]
    values: list[list[float | None]]
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    endpoints: list[str] = field(default_factory=list)

    @property
    def flat(self) -> list[float | None]:
        """The values of all completions."""
        return [value for group in self.values for value in group]

    @property
    def without_spread(self) -> float:
        """Share of the groups that would teach nothing: all their rewards are equal or missing."""
        return sum(_spread(group) == 0 for group in self.values) / len(self.values)

    @property
    def missing(self) -> float:
        """Share of the completions that have no value."""
        return sum(value is None for value in self.flat) / len(self.flat)

    def advice(self) -> list[str]:
        """What to change, most urgent first; empty when the reward can teach."""
        told = []
        known = [value for value in self.flat if value is not None]
        unclosed = sum(thought.unclosed for one in self.groups for thought in one.thoughts)
        if unclosed:
            told.append(
                f"{unclosed} of {len(self.flat)} completions never ended their think block and have no reward, as in training: a "
                "higher grpo.max_tokens, or model.thinking: off"
            )
        if not known and unclosed < len(self.flat):
            told.append("it scored no completion: look at what it expects of a completion, in the texts above")
        elif len(set(known)) == 1:
            told.append(
                f"every reward is {known[0]:g}: nothing can be learned. Give part of the reward for part of the task, or take "
                "easier (or harder) prompts"
            )
        elif self.without_spread > 0.5:
            told.append(
                f"{self.without_spread:.0%} of the groups have no spread and teach nothing: more grpo.generations, a higher "
                "grpo.temperature, prompts of middling difficulty, finer rewards, or grpo.resample, which replaces such groups"
            )
        if known and self.missing > 0.2:
            told.append(f"{self.missing:.0%} of the completions have no reward (None): they leave their groups")
        if strange := sum("messages" not in one.row for one in self.groups):
            told.append(
                f"{strange} of {len(self.groups)} prompts are none of the config's data: the reward got no columns for them"
            )
        per_call = self.seconds / len(self.flat)
        if per_call > 1:
            told.append(f"{per_call:.1f} s a completion: make it async, batch its work, or cache it")
        return told

    def lines(self) -> list[str]:
        """Prompts, completions and values side by side, then what they add up to."""
        lines = []
        for sampled, values in zip(self.groups, self.values, strict=True):
            lines.append(f"prompt: {_short(sampled.prompt[-1]['content'])}")
            for text, value in zip(sampled.completions, values, strict=True):
                lines.append(f"  {'None' if value is None else format(value, '8.3g'):>8}  {_short(text)}")
            lines.append(f"  spread within the group: {_spread(values):.3g}")
        record = self.record()
        lines.append(
            f"{self.name}: {record['completions']} completions in {len(self.groups)} groups, mean {_number(record['mean'])}, "
            f"{self.without_spread:.0%} of the groups without spread, {self.missing:.0%} None, {self.seconds:.2f} s for the call"
        )
        lines += [f"logged: {name} {value:.4g}" for name, value in self.metrics.items()]
        lines += [f"asked: {line}" for line in self.endpoints]
        return lines + [f"advice: {line}" for line in self.advice()]

    def record(self) -> dict[str, Any]:
        """The same for programs."""
        known = [value for value in self.flat if value is not None]
        return {
            "reward": self.name,
            "completions": len(self.flat),
            "groups": [
                {"prompt": one.prompt, "completions": one.completions, "values": values, "spread": _spread(values)}
                for one, values in zip(self.groups, self.values, strict=True)
            ],
            "mean": sum(known) / len(known) if known else None,
            "without_spread": self.without_spread,
            "missing": self.missing,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "endpoints": self.endpoints,
            "advice": self.advice(),
        }


def try_reward(
    fn: str, config: str | Path, overrides: Sequence[str] = (), n: int = 16, saved: Path | None = None
) -> Tried:
    """Call the reward on about `n` completions: sampled from the config's model, or those in `saved` (a run's samples.jsonl).

    Nothing is trained. Raises UserError for whatever is wrong with config, reward or file.
    """
    from rlsafe.defenses import load_module
    from rlsafe.endpoints.client import OPENED
    from rlsafe.rewards import RewardRunner, load_reward

    settings = load_run(config, overrides)
    for plugin in settings.plugins:  # before names are looked up: a plug-in may register a reward
        load_module(plugin)
    reward = load_reward(next((one for one in settings.rewards if one.fn == fn), RewardConfig(fn=fn)))
    runner = RewardRunner([reward])
    streams = _streams(settings, reward)
    groups = _saved(streams, saved, n) if saved is not None else _sampled(settings, reward, streams, n)
    began = time.perf_counter()
    batch = _call(runner, groups)
    seconds = time.perf_counter() - began
    asked = [endpoint.summary() for endpoint in OPENED if endpoint.totals.requests]
    values = iter(batch.by_name[next(iter(batch.by_name))])
    return Tried(fn, groups, [[next(values) for _ in one.completions] for one in groups], seconds, batch.metrics, asked)


def _call(runner: Any, groups: Sequence[Sampled]) -> RewardBatch:
    from rlsafe.engine.train.grpo_step import call_rewards
    from rlsafe.rewards.state import TrainerState

    rows = [(one, thought, ids) for one in groups for thought, ids in zip(one.thoughts, one.ids, strict=True)]
    return call_rewards(
        runner,
        prompts=[one.prompt for one, _, _ in rows],
        thoughts=[thought for _, thought, _ in rows],
        completion_ids=[ids for _, _, ids in rows],
        rows=[one.row for one, _, _ in rows],
        trainer_state=TrainerState(0, 1, 0.0),
    )


def _streams(settings: RunConfig, reward: LoadedReward) -> dict[str, list[Row]]:
    """The rows that a run may ask the reward about, by stream; what is left out is logged. UserError for what a run would refuse, and
    where the reward is for none of them."""
    from rlsafe.data import load_rows, mixed_prompts
    from rlsafe.engine.run.rows import answered, check_where, cut_short

    parts = [part for parts in settings.schedule.used_kinds.values() for part in parts]
    asked: list[str] = [part.stream for part in parts if part.path == "grpo"] or ["narrow"]
    streams: dict[str, list[Row]] = {}
    for name in asked:
        if (stream := getattr(settings.data, name)) is None:
            raise UserError(f"data.{name} is not set: no prompts to try the reward on")
        if name not in streams:
            with about(f"data.{name}"):
                streams[name] = load_rows(stream, settings.seed)
    trained = [name for name in streams if any(part.stream == name and part.path == "sft" for part in parts)]
    cut = cut_short(streams, settings.data)
    streams = answered(streams, trained, settings.data, log.warning)
    notes = [f"data.{name}: {note}" for name, rows in streams.items() if (note := mixed_prompts(rows))]
    for note in notes + check_where([reward], streams, cut):
        log.warning(note)
    return streams


def _usable(settings: RunConfig, name: str, rows: list[Row], policy: Policy) -> list[Row]:
    """The rows that a run of these settings could ask; what is left out is logged, as a run notes it."""
    from rlsafe.engine.plan.schedule import PlannedPart, Step
    from rlsafe.engine.run.build import Prepared
    from rlsafe.engine.run.rows import usable

    used = [part for parts in settings.schedule.used_kinds.values() for part in parts]
    parts = [PlannedPart(part.stream, part.path, 1) for part in used] + [PlannedPart(name, "grpo", 1)]  # type: ignore[arg-type]
    asking = Prepared(settings, [Step(0, "try", tuple(parts), 0.0, 0)], [], {name: rows}, None)
    found = usable(asking, policy.tokenizer, policy.core.max_length)
    for note in found.notes:
        log.warning(note)
    return found.streams[name]


def _sampled(settings: RunConfig, reward: LoadedReward, streams: dict[str, list[Row]], n: int) -> list[Sampled]:
    """`n` completions, in whole groups, to prompts of the first stream that the reward is for."""
    import torch

    from rlsafe.data import Stream, encode_prompt, read_completion, split_prompt
    from rlsafe.engine.run.build import model_path
    from rlsafe.policy import Policy
    from rlsafe.rollouts import make_sampler, request_seed
    from rlsafe.types import Request, SamplingParams

    name = next((name for name, rows in streams.items() if any(map(reward.asked, rows))), next(iter(streams)))
    group = settings.grpo.generations
    path = model_path(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy.load(settings.model, path=path, seed=settings.seed, device=device)
    rows = _usable(settings, name, streams[name], policy)
    chosen = Stream(rows, settings.seed, "reward-try").take(min(len(rows), math.ceil(n / group)))
    prompts = [split_prompt(row)[0] for row in chosen]
    requests = [
        Request(encode_prompt(policy.tokenizer, prompt), request_seed(settings.seed, "reward-try", 0, row, sample))
        for row, prompt in enumerate(prompts)
        for sample in range(group)
    ]
    params = SamplingParams(settings.grpo.temperature, settings.grpo.top_p, settings.grpo.max_tokens)
    sampler = make_sampler(settings.sampler, path, policy, settings.seed)
    completions = sampler.generate(requests, params)
    thoughts = [read_completion(policy.tokenizer, one.ids) for one in completions]
    return [
        Sampled(
            prompt,
            thoughts[i * group : (i + 1) * group],
            row,
            [c.ids for c in completions[i * group : (i + 1) * group]],
        )
        for i, (prompt, row) in enumerate(zip(prompts, chosen, strict=True))
    ]


def _saved(streams: dict[str, list[Row]], file: Path, n: int) -> list[Sampled]:
    """The first `n` completions of a samples.jsonl, by prompt; a row's columns come from the config's data."""
    from rlsafe.data import split_prompt, split_think

    if not file.is_file():
        raise UserError(f"--from {file}: no such file; expected the samples.jsonl of a run")
    known = {key_of(split_prompt(row)[0]): row for rows in reversed(streams.values()) for row in rows}
    groups: dict[Any, Sampled] = {}
    taken = 0
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record.get("probe"):
                continue
            prompt, step = _asked(record["prompt"]), record.get("step")
            text = record["completion"]
            text = text if isinstance(text, str) else text[-1]["content"]
            # as training read it; such a sample has a think block, whose tag may have been part of the prompt
            thought = split_think(text, opened="unclosed" in record)
            key = key_of(prompt)
            alone: Row = {"_plain": isinstance(record["prompt"], str)}  # without a row of the config's data
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(
                f"--from {file}:{number}: not a sample; expected an object with prompt and completion"
            ) from None
        one = groups.setdefault((step, key), Sampled(prompt, [], known.get(key, alone), []))
        one.thoughts.append(thought)
        one.ids.append([])
        taken += 1
        if taken == n:
            break
    if not groups:
        raise UserError(f"--from {file}: holds no sampled completion")
    return list(groups.values())


def _asked(prompt: Any) -> list[Message]:
    """A prompt of a sample: messages, or the text of one, as other programs write it."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _spread(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else 0.0


def _short(text: str) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
