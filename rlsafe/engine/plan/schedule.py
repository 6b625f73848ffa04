"""From the schedule section of a config to the exact list of steps: a pure function of (config, seed, offers).

The whole plan is known before the first step, so a run is reproducible, resumable by step index, and can be shown by --dry-run.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rlsafe.config import RunConfig, UserError
from rlsafe.config.schema import Part, PhaseConfig
from rlsafe.defenses import Offer
from rlsafe.types import LossPath, Origin


@dataclass(frozen=True)
class PlannedPart:
    """Rows of one stream on one path in one step. `rows`: SFT rows or GRPO prompts over all ranks.

    defense: the name of the defense that supplies the rows; None = the run's data stream. place: "KIND/part N", as the config
    counts the parts of a kind: the same in every step, whatever `every` leaves out. Rollouts that teach several steps are kept by it.
    """

    stream: Origin
    path: LossPath
    rows: int
    weight: float = 1.0
    defense: str | None = None
    place: str = ""


@dataclass(frozen=True)
class Step:
    """One optimizer step. `lr` is the learning rate, `path` its name in metrics.jsonl (grpo if any part is)."""

    index: int
    kind: str
    parts: tuple[PlannedPart, ...]
    lr: float
    phase: int

    @cached_property
    def path(self) -> LossPath:
        return "grpo" if any(part.path == "grpo" for part in self.parts) else "sft"


def make_plan(config: RunConfig, offers: Mapping[str, Offer] | None = None) -> list[Step]:
    """Every step of the run in order. Steps that a defense adds as its own come on top of schedule.steps."""
    offers = offers or {}
    drafts = list(_drafts(config))
    with_safe = list(_with_offers(config, drafts, offers))
    rates = _learning_rates(config, [phase for phase, _, _ in with_safe])
    steps = [
        Step(index, kind, parts, rate, phase)
        for index, ((phase, kind, parts), rate) in enumerate(zip(with_safe, rates, strict=True))
    ]
    _check_streams(config, steps)
    return steps


Draft = tuple[int, str, tuple[PlannedPart, ...]]


def _phase_lengths(config: RunConfig) -> list[int]:
    phases, left = config.schedule.phases, config.schedule.steps
    open_phases = [i for i, phase in enumerate(phases) if phase.steps is None]
    if open_phases and open_phases != [len(phases) - 1]:
        raise UserError(
            "schedule.phases: only the last phase may leave out 'steps' (it takes what is left of schedule.steps)"
        )
    lengths = []
    for phase in phases:
        length = left if phase.steps is None else min(phase.steps, left)
        lengths.append(length)
        left -= length
    if left:
        raise UserError(
            f"schedule: the phases cover {config.schedule.steps - left} of {config.schedule.steps} steps; "
            "leave out 'steps' of the last phase or lower schedule.steps"
        )
    return lengths


def _drafts(config: RunConfig):
    """(phase, kind, parts) of each scheduled step, before any defense adds rows."""
    kinds = config.schedule.all_kinds
    rng = random.Random(f"{config.seed}/schedule")
    seen: Counter[str] = Counter()
    for number, (phase, length) in enumerate(zip(config.schedule.phases, _phase_lengths(config), strict=True)):
        for position in range(length):
            kind = _kind(phase, position, rng)
            seen[kind] += 1
            parts = [(n, part) for n, part in enumerate(kinds[kind]) if seen[kind] % part.every == 0]
            yield number, kind, tuple(_planned(config, part, f"{kind}/part {n}") for n, part in parts)


def _kind(phase: PhaseConfig, position: int, rng: random.Random) -> str:
    if phase.cycle:
        return phase.cycle[position % len(phase.cycle)]
    assert phase.mix
    return rng.choices(list(phase.mix), weights=list(phase.mix.values()))[0]


def _planned(config: RunConfig, part: Part, place: str) -> PlannedPart:
    default = config.batch.sft_rows if part.path == "sft" else config.batch.grpo_prompts
    return PlannedPart(part.stream, part.path, part.rows or default, part.weight, place=place)


def _with_offers(config: RunConfig, drafts: Sequence[Draft], offers: Mapping[str, Offer]):
    """Spread each defense's rows evenly over steps: fractions of a row add up until they make a whole one."""
    owed: Counter[str] = Counter()
    index = 0  # of the step in the plan, which has the steps that defenses add too
    for number, (phase, kind, parts) in enumerate(drafts, start=1):
        units = sum(
            part.rows * (config.grpo.generations if part.path == "grpo" else 1)
            for part in parts
            if part.stream != "safe"
        )
        own: list[Draft] = []
        for name, offer in offers.items():
            if (index, phase) not in offer.when:
                continue
            owed[name] += offer.fraction * units + (offer.rows if units else 0)  # type: ignore[assignment]
            if number % offer.every:
                continue
            rows = int(owed[name] + 1e-9)
            if rows == 0:
                continue
            owed[name] -= rows
            added = PlannedPart("aside" if offer.aside else "safe", "sft", rows, offer.weight, name)
            if offer.own_step:
                own.append((phase, f"defense/{name}", (added,)))
            else:
                parts = (*parts, added)
        index += 1 + len(own)
        yield phase, kind, parts
        yield from own


def _learning_rates(config: RunConfig, phases: Sequence[int]) -> list[float]:
    """The learning rate of each step: a phase with its own `lr` has a curve of its own, neighbouring ones without share one that peaks
    at `optim.lr`."""
    own = [phase.lr for phase in config.schedule.phases]
    rates: list[float] = []
    position = 0
    while position < len(phases):
        peak = own[phases[position]] or config.optim.lr
        end = position + 1
        while end < len(phases) and (
            phases[end] == phases[end - 1] or own[phases[end]] is own[phases[end - 1]] is None
        ):
            end += 1
        rates += [peak * scale for scale in _curve(config, end - position)]
        position = end
    return rates


def _curve(config: RunConfig, length: int) -> list[float]:
    """Transformers' own schedule, sampled at each step; the first step of a warm-up already moves (1/warmup, not 0)."""
    warmup = config.optim.warmup
    warmup_steps = int(warmup) if warmup >= 1 else round(warmup * length)
    shift = 1 if warmup_steps else 0
    return [_scale(config.optim.schedule, step + shift, warmup_steps, length + shift) for step in range(length)]


def _scale(kind: str, step: int, warmup: int, total: int) -> float:
    """The bits of `transformers.get_scheduler`, without the seconds that its import takes (it brings PEFT and bitsandbytes)."""
    if step < warmup:
        return step / max(1, warmup)
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if kind == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0


def _check_streams(config: RunConfig, steps: Sequence[Step]) -> None:
    for part in {part for step in steps for part in step.parts if part.defense is None}:
        if getattr(config.data, part.stream) is None:
            raise UserError(
                f"schedule: a {part.path} part uses the stream {part.stream!r}, but data.{part.stream} is not set"
            )
    if any(part.path == "grpo" for step in steps for part in step.parts) and not config.rewards:
        raise UserError("schedule: GRPO steps need a reward; set rewards: [{fn: ...}]")


def describe(steps: Sequence[Step]) -> list[str]:
    """A few lines for --dry-run: runs of equal kinds, rows per stream and path."""
    lines, start = [], 0
    for position in range(1, len(steps) + 1):
        if position == len(steps) or steps[position].kind != steps[start].kind:
            parts = " + ".join(f"{p.stream}/{p.path} x{p.rows}" for p in steps[start].parts) or "nothing"
            span = f"{start}" if position - start == 1 else f"{start}-{position - 1}"
            rates = [step.lr for step in steps[start:position]]
            peak = f"lr {'up to ' if max(rates) > min(rates) else ''}{max(rates):.2g}"
            lines.append(f"step {span}: {steps[start].kind} ({parts}), {peak}")
            start = position
    if len(lines) > 12:
        lines = [*lines[:8], f"... {len(lines) - 10} more runs of steps ...", *lines[-2:]]
    totals: Counter[str] = Counter()
    for step in steps:
        for part in step.parts:
            totals[f"{part.stream}/{part.path}{' from ' + part.defense if part.defense else ''}"] += part.rows
    return [
        *lines,
        "rows in all: " + (", ".join(f"{name} {count}" for name, count in sorted(totals.items())) or "none"),
    ]
