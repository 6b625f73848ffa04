"""From a run's config to its components: each room builds its own section, once."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from rlsafe.config import DataConfig, RunConfig, UserError, about, nearest
from rlsafe.data import Stream, load_rows, mixed_prompts
from rlsafe.defenses import Defense, DefenseStack, SetupContext
from rlsafe.defenses import build as build_defenses
from rlsafe.defenses.stack import NAMED
from rlsafe.defenses.steering import Steering
from rlsafe.engine.plan.schedule import Step, make_plan
from rlsafe.engine.record.trackers import BOARD, Trackers, check_trackers
from rlsafe.engine.record.tracking import Tracker
from rlsafe.engine.run.layout import check_layout
from rlsafe.engine.run.rows import answered, check_where, cut_short, usable
from rlsafe.engine.train import ahead, distributed, gradients, projection, resample
from rlsafe.engine.train.effects import EffectLog
from rlsafe.engine.train.state import Components, RunState
from rlsafe.engine.train.sync import SyncedSampler
from rlsafe.evaluate import PairProbe, Probe, Reader, gather, load_judge, load_pair_sets, load_questions
from rlsafe.evaluate.measure.measure import Material
from rlsafe.policy import Policy
from rlsafe.policy.adapters import read_adapter_config
from rlsafe.policy.source import model_source
from rlsafe.rewards import RewardRunner, load_reward
from rlsafe.rollouts import CANNOT_STEER, make_sampler
from rlsafe.types import Judge, Row, Sampler, Where


@dataclass
class Resources:
    """What the runs of one process share: judges, and the sampler engines that `rlsafe.rollouts` keeps by model.

    on_start: told in words when something slow begins (an engine's warm-up).
    """

    judges: dict[str, Judge] = field(default_factory=dict)
    on_start: Callable[[str], None] | None = None

    def judge(self, config: RunConfig) -> Judge:
        """The judge that the config names, one for all runs. UserError when it names none, or one that cannot be had."""
        settings = config.evaluate
        if not settings.judged:
            raise UserError("evaluate.judge is not set and something needs a judge")
        key = repr((settings.judge, settings.judges))
        if key not in self.judges:
            self.judges[key] = load_judge(settings.judge, settings.judges)
        return self.judges[key]

    def sampler(
        self, config: RunConfig, policy: Policy, steerable: bool = False, warn: Callable[[str], None] | None = None
    ) -> Sampler:
        """The run's sampler; `steerable` when a defense steers rollouts too. warn: told when another one takes over."""
        return make_sampler(
            config.sampler, model_path(config), policy, config.seed, steerable=steerable, progress=self.on_start,
            warn=warn,
        )  # fmt: skip


def model_path(config: RunConfig) -> str:
    """The directory or hub id behind `model.name`."""
    return model_source(config.model)


LoadStreams = Callable[[DataConfig, int, Callable[[str], None]], dict[str, list[Row]]]
"""(data settings, seed, note) -> rows by stream."""


@dataclass
class Prepared:
    """What can be checked before any model is loaded: --dry-run stops here."""

    config: RunConfig  # resolved: defenses with every setting written out
    plan: list[Step]
    defenses: list[Defense]
    rows: dict[str, list[Row]]
    rewards: RewardRunner | None
    notes: list[str] = field(default_factory=list)  # what was left out of the data
    material: Material | None = None  # what the evaluation will ask


def prepare(config: RunConfig, load: LoadStreams | None = None) -> Prepared:
    """Resolve every name in the config and load the data. UserError for all that is wrong and can be known without the model.

    load: reads the streams in another way (a dry run leaves out what would have to be downloaded).
    """
    with about("defenses"):
        defenses, resolved = build_defenses(config.defenses, config.plugins)
    config = config.model_copy(update={"defenses": resolved})
    model_path(config)
    projection.check(config)
    ahead.check(config)
    resample.check(config)
    check_trackers(config.track.to)
    stack = DefenseStack(defenses)
    plan = make_plan(config, stack.offers())
    _check_when(stack, plan, len(config.schedule.phases))
    sampled = {part.stream for step in plan for part in step.parts if part.path == "grpo"}
    if config.sampler.kind == "server" and any(stack.steers(Where(stream, "grpo", "rollout")) for stream in sampled):
        raise UserError(CANNOT_STEER)
    notes: list[str] = []
    rows = (load or _load_streams)(config.data, config.seed, notes.append)
    trained = {p.stream for step in plan for p in step.parts if p.path == "sft" and p.defense is None}
    cut = cut_short(rows, config.data)
    rows = answered(rows, trained, config.data, notes.append)
    uses_grpo = any(step.path == "grpo" for step in plan)
    with about("rewards"):  # in a run without GRPO steps too, so that a wrong name is found
        loaded = [load_reward(reward) for reward in config.rewards]
    rewards = None
    _check_adapter(config.model.adapter, uses_grpo)
    if uses_grpo:
        rewards = RewardRunner(loaded, config.grpo.on_error)
        notes += [f"data.{name}: {note}" for name in sorted(sampled) if (note := mixed_prompts(rows[name]))]
        notes += check_where(loaded, {name: rows[name] for name in sorted(sampled)}, cut)
    material = gather(config.evaluate) if config.evaluate.wanted else None
    return Prepared(config, plan, defenses, rows, rewards, notes, material)


def _check_when(stack: DefenseStack, plan: list[Step], phases: int) -> None:
    """UserError for a defense that acts in no step."""
    for one in stack:
        if unknown := [number for number in one.when.phases or () if number >= phases]:
            raise UserError(f"defense {one.name!r}: phases: {unknown[0]}: the schedule has {phases}, 0 to {phases - 1}")
        if plan and not any((step.index, step.phase) in one.when for step in plan):
            raise UserError(
                f"defense {one.name!r}: from_step: {one.when.from_step}: acts in no step; the run has {len(plan)}"
            )


def _check_adapter(adapter: str | None, uses_grpo: bool) -> None:
    """UserError when the adapter to go on with is more than LoRA, or drops out on GRPO: see `RunConfig`, which checks a new one."""
    if not adapter or not Path(adapter, "adapter_config.json").is_file():
        return  # loading says why; in a dry run it may be an adapter that another cell will leave
    dropout = read_adapter_config(adapter, "model.adapter").lora_dropout
    if dropout and uses_grpo:
        raise UserError(
            f"model.adapter: {adapter}: lora_dropout in its adapter_config.json is {dropout}; must be 0 when the schedule has "
            "GRPO steps"
        )


def _load_streams(data: DataConfig, seed: int, note: Callable[[str], None]) -> dict[str, list[Row]]:
    rows = {}
    for name in ("narrow", "safe", "benign"):
        if (stream := getattr(data, name)) is not None:
            with about(f"data.{name}"):
                rows[name] = load_rows(stream, seed, note)
    return rows


def build_run(
    prepared: Prepared, out: Path, resources: Resources, log: Callable[[str], None], **tracking: Any
) -> tuple[Components, RunState]:
    """Load the model, wrap it, set the defenses up; the state is that of a run before its first step.

    tracking: offset and first step of a resumed run.
    """
    config = prepared.config
    accelerator = distributed.start(cpu=not torch.cuda.is_available())
    check_layout(prepared, model_path(config), accelerator, log)
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # rlsafe draws from neither of these; a reward may
    np.random.seed(config.seed % 2**32)
    policy = _load_policy(config, accelerator)
    optimizer = distributed.wrap(policy, accelerator, config.optim, log)
    backward, clip = distributed.gradient_functions(policy, accelerator, optimizer)
    fitted = usable(prepared, policy.tokenizer, policy.core.max_length, resources.on_start)
    for note in [*prepared.notes, *fitted.notes]:
        log(note)
    streams = {name: Stream(rows, config.seed, name) for name, rows in fitted.streams.items()}
    stack = DefenseStack(prepared.defenses)
    gradients.check(stack, policy)
    probe = _probe(config, policy, resources)
    run = Components(
        config=config,
        plan=prepared.plan,
        accelerator=accelerator,
        policy=policy,
        optimizer=optimizer,
        backward=backward,
        clip=clip,
        stack=stack,
        streams=streams,
        row_limits=fitted.limits,
        rewards=prepared.rewards,
        sampler=_sampler(prepared, policy, stack, streams, resources, log),
        make_judge=lambda: resources.judge(config),
        probe=probe,
        direction=projection.direction(config, policy) if probe else None,
        tracker=_tracker(config, out, accelerator.is_main_process, **tracking),
        effects=EffectLog(stack, prepared.plan, config.track.check_after, log),
        log=log,
        look_ahead=ahead.look_ahead if config.grpo.max_staleness else None,
    )
    state = RunState(config.batch.micro_tokens)
    if run.look_ahead:
        run.sampler.wait_first = partial(ahead.settle, run, state)
    _set_up_defenses(run)
    return run, state


def _tracker(config: RunConfig, out: Path, write: bool, **resumed: Any) -> Tracker:
    others = partial(Trackers, config, out) if set(config.track.to) - {BOARD} else None
    return Tracker(out, write=write, board=BOARD in config.track.to, others=others, **resumed)


def _load_policy(config: RunConfig, accelerator: Accelerator) -> Policy:
    policy = Policy.load(
        config.model,
        path=model_path(config),
        seed=config.seed,
        device=accelerator.device,
        in_host_memory=distributed.shards(accelerator),
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(training_threads(sum(p.numel() for p in policy.core.parameters())))
    if not policy.trainable():
        raise UserError("model: nothing is trainable; set model.lora or leave it null for full fine-tuning")
    return policy


def _sampler(
    prepared: Prepared,
    policy: Policy,
    stack: DefenseStack,
    streams: dict[str, Stream],
    resources: Resources,
    log: Callable[[str], None],
) -> SyncedSampler:
    config = prepared.config
    sampled = {part.stream for step in prepared.plan for part in step.parts if part.path == "grpo"}
    merges = [one.name for one in stack if isinstance(one, Steering) and one.merges and (sampled or one.judges)]
    if merges:
        if config.sampler.sync == "adapter":
            raise UserError(
                f"defense {merges[0]!r}: the sampler gets two adapters at once, which it can take as merged weights only; expected "
                "sampler.sync: auto or merged"
            )
        config = config.model_copy(update={"sampler": config.sampler.model_copy(update={"sync": "merged"})})
    steered = any(stack.steers(Where(stream, "grpo", "rollout")) for stream in sampled)
    return SyncedSampler(
        lambda: resources.sampler(config, policy, steerable=steered, warn=log),
        policy,
        streams,
        seed=config.seed,
        test=config.sampler.self_test,
        test_always=config.sampler.kind == "server",
        max_gap=config.sampler.max_gap,
    )


def _set_up_defenses(run: Components) -> None:
    """Each defense's `setup`, then the references that it names: a wrong one fails before the first step."""
    context = SetupContext(
        config=run.config,
        policy=run.policy,
        seed=run.config.seed,
        cache=Path.home() / ".cache" / "rlsafe",
        rows=lambda name: run.streams[name].rows,
        sampler=run.sampler.synced,
        judge=run.make_judge,
        log=run.log,
        planned=Counter(
            name for step in run.plan for part in step.parts if (name := part.defense) for _ in range(part.rows)
        ),
        steps=len(run.plan),
    )
    for defense in run.stack:
        with about(f"defense {defense.name!r}"):
            defense.setup(context)
    run.references |= run.stack.references()
    steps = [(step.phase, step.path) for step in run.plan]
    run.stack.check_references(steps, from_adapter=run.config.model.adapter is not None)
    if run.config.grpo.beta and (reference := run.config.grpo.reference) not in NAMED and reference[:5] != "path:":
        expected = nearest(reference, [*NAMED, "path:DIR"])
        raise UserError(f"grpo.reference: unknown reference {reference!r}{expected}")
    for reference in run.references:
        if reference != "grpo_start" and not reference.startswith("step:"):
            run.policy.check_reference(reference)


def training_threads(parameters: int) -> int:
    """CPU threads for training: one per 4 M parameters, OMP_NUM_THREADS (or the cores) at most.

    A small model's kernels are too short to share: threads then wait for each other, and on a machine that does other work as
    well they wait for the scheduler (1 M parameters: 0.07 s a step with one thread, 20 s with four on a loaded machine).
    """
    most = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    return max(1, min(most, parameters // 4_000_000))


def _probe(config: RunConfig, policy: Policy, resources: Resources) -> Probe | None:
    """The curves need questions and a judge, or pairs; without them the run has none."""
    settings = config.evaluate
    judged = settings.judged and bool(settings.general or settings.indomain)
    if not config.track.every or not (judged or settings.likelihood.sources):
        return None
    pairs = load_pair_sets(settings, config.track.pairs)
    reader = Reader(policy, config.batch.micro_tokens, config.batch.micro_rows)
    return Probe(
        load_questions(settings.general) if judged and settings.general else [],
        load_questions(settings.indomain) if judged and settings.indomain else [],
        resources.judge(config) if judged else None,
        policy.tokenizer,
        config.track.questions,
        config.track.samples,
        settings.max_tokens,
        config.seed,
        PairProbe(pairs, reader, settings.position) if pairs else None,
        settings.temperature,
        settings.position,
    )
