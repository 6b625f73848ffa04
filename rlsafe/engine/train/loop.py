"""The training loop: one path from a planned step to updated weights, the same for SFT, GRPO and every mixture.
Read `Loop.run` first; each line of it is one of the methods below, in order."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlsafe.config import RunConfig
from rlsafe.data import Stream, encode_prompt, sft_batches, split_prompt
from rlsafe.defenses import DataContext, DefenseStack
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.record.tracking import Late, Tracker
from rlsafe.engine.run.resume import position
from rlsafe.engine.train.ahead import Ahead, completed, look_ahead, settle
from rlsafe.engine.train.distributed import anywhere, backward, clip, union
from rlsafe.engine.train.effects import EffectLog
from rlsafe.engine.train.faults import update
from rlsafe.engine.train.loss import Micro, NotFinite, StepLoss, engine_needs, separate_gap
from rlsafe.engine.train.micro import dummy, even_out, global_counts, reduce_sums
from rlsafe.engine.train.probing import start_probe
from rlsafe.engine.train.projection import Direction
from rlsafe.engine.train.rollout import ask, collect, sample
from rlsafe.evaluate import Probe
from rlsafe.policy import ForwardPlan, Policy
from rlsafe.rewards import RewardRunner
from rlsafe.rewards.state import TrainerState
from rlsafe.rollouts import gap_limit, self_test
from rlsafe.types import BackgroundJudge, Judge, Message, Row, RunError, Sampler, Where

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called after each step with (steps done, steps in all, the step's metrics)."""


@dataclass
class Loop:
    """Everything one run needs, built by `rlsafe.engine.run.components`; `run` trains it."""

    config: RunConfig
    plan: list[Step]
    accelerator: Accelerator
    policy: Policy
    optimizer: Any
    stack: DefenseStack
    streams: dict[str, Stream]
    rewards: RewardRunner | None
    make_sampler: Callable[[], Sampler]
    make_judge: Callable[[], Judge]
    probe: Probe | None
    direction: Direction | None  # a persona vector that sampled answers are projected on
    tracker: Tracker
    effects: EffectLog
    log: Callable[[str], None]
    done: int = 0  # steps finished
    dirty: bool = True  # the sampler does not have the current weights
    tested: int = 0  # sampler self-tests done: at the start and after the first sync that follows an update
    pending: dict[str, tuple[list[Micro], int]] = field(default_factory=dict)  # rollouts to be used again, by stream
    ahead: dict[int, Ahead] = field(default_factory=dict)  # rollouts begun for the next step, by number of its part
    began: dict[str, Any] | None = None  # where the present step began, until it changes weights
    skipped: int = 0  # steps left out in a row, see optim.on_nan
    gave_up: str | None = (
        None  # why waiting for the judge ended; `rlsafe.engine.run.life` then saves the state and stops
    )
    _sampler: Sampler | None = None

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, progress: Progress | None = None, after_step: Callable[[], None] | None = None) -> None:
        """Train from step `done` to the end of the plan."""
        while self.done < len(self.plan):
            step = self.plan[self.done]
            started = time.perf_counter()
            self.began = position(self)
            self._references(step)
            micros, metrics = self._gather(step)
            self.ahead = look_ahead(self, step)
            metrics |= update(self, step, micros)
            self.done += 1
            if self.done == len(self.plan):  # before the last effects and probe: both show the weights that are saved
                self.dirty |= self.stack.after_step(self.policy, "end")
            metrics |= self.effects.step(step.path, Counter({p.defense: p.rows for p in step.parts if p.defense}))
            late = None
            if self._probes(step):
                late, probed = self._probe(step)
                metrics |= probed
            metrics["seconds"] = time.perf_counter() - started
            record = {"step": step.index, "path": step.path, **metrics}
            self.tracker.step(record, late)
            self._take_in_judgements()
            self.effects.alive = union(self.effects.alive, self.accelerator)
            self.effects.check()
            if progress:
                progress(self.done, len(self.plan), record)
            if after_step:
                after_step()
        self.effects.check(at_end=True)

    def sampler(self) -> Sampler:
        """The sampler, holding the policy's current weights; the first two syncs are self-tested, those to a server all."""
        if self._sampler is None:
            self._sampler = self.make_sampler()
        if self.dirty:
            settle(self)
            self._sampler.sync(self.policy)
            self.dirty = False
            if self.config.sampler.self_test and (self.tested < 2 or self.config.sampler.kind == "server"):
                rows = [row for stream in self.streams.values() for row in stream.rows[:4]]
                asked = [split_prompt(row)[0] for row in rows[:4]] or [[{"role": "user", "content": "Hello"}]]
                prompts = [encode_prompt(self.policy.tokenizer, messages) for messages in asked]
                when = "at the start" if self.tested == 0 else f"after sync {self.tested}"
                self_test(self._sampler, self.policy, prompts, self.config.seed, self.config.sampler.max_gap, when)
                self.tested += 1
        return self._sampler

    # ------------------------------------------------------------------------------------------------ one step

    def _references(self, step: Step) -> None:
        """Take the snapshots that are due before this step, and let penalties wait for those that are not."""
        wanted = self.stack.references()
        if step.path == "grpo" and "grpo_start" in wanted and not self.policy.has_reference("grpo_start"):
            self.policy.snapshot("grpo_start")
        if f"step:{step.index}" in wanted:
            self.policy.snapshot(f"step:{step.index}")
        self.stack.update(self.policy.has_reference)

    def _gather(self, step: Step) -> tuple[list[Micro], dict[str, Any]]:
        """The step's micro-batches on this rank, and the rollout metrics."""
        micros: list[Micro] = []
        metrics: dict[str, Any] = {}
        for number, part in enumerate(step.parts):
            if part.path == "sft":
                micros += self._supervised(step, part)
                continue
            reused, left = self.pending.get(part.stream, ([], 0))
            if left:
                micros += reused
                self.pending[part.stream] = (reused, left - 1)
                metrics["rollout_reused"] = 1
                continue
            fresh, rollout_metrics = self._rollout(step, part, self.ahead.get(number))
            micros += fresh
            metrics |= rollout_metrics
            if self.config.grpo.iterations > 1:
                self.pending[part.stream] = (fresh, self.config.grpo.iterations - 1)
        return micros, metrics

    def _supervised(self, step: Step, part: PlannedPart) -> list[Micro]:
        rows = self._rows(step, part)
        where = Where(part.stream, "sft", "train")
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        conversations: list[list[Message]] = [self.stack.prompt(row["messages"], where) for row in rows[rank::world]]
        stream = getattr(self.config.data, part.stream)
        batches = sft_batches(
            conversations,
            self.policy.tokenizer,
            where,
            max_tokens=stream.within if stream else 2048,
            micro_tokens=self.config.batch.micro_tokens,
            micro_rows=self.config.batch.micro_rows,
            truncate=stream is not None and stream.too_long == "truncate",
        )
        return [Micro(batch.to(self.policy.device), part.weight) for batch in batches]

    def _rows(self, step: Step, part: PlannedPart) -> list[Row]:
        """The part's rows over all ranks: every rank draws the same ones and keeps its share."""
        if part.defense is None:
            return self.streams[part.stream].take(part.rows)
        source = next(defense for defense in self.stack if defense.name == part.defense)
        rng = random.Random(f"{self.config.seed}/{part.defense}/{step.index}")
        return source.rows(part.rows, DataContext(step.index, rng, self.sampler, self.make_judge))

    def _rollout(self, step: Step, part: PlannedPart, ahead: Ahead | None) -> tuple[list[Micro], dict[str, Any]]:
        """ahead: the part's rollouts were begun one step ago, by the weights of its reference."""
        assert self.rewards is not None
        rows = ahead.rows if ahead else self.streams[part.stream].take(part.rows)
        shared: dict[str, Any] = {"config": self.config, "policy": self.policy, "stack": self.stack}
        shared["accelerator"] = self.accelerator
        generating = time.perf_counter()
        asked = ask(part, rows, step.index, **shared)
        if ahead:
            completions = completed(self, ahead, asked.requests)
        else:
            completions = sample(self.sampler(), asked.requests, part, self.config, self.stack)
        result = collect(part, asked, completions, step.index, rewards=self.rewards, state=self._state(part), **shared)
        self.tracker.samples(result.records)
        metrics: dict[str, Any] = {**result.metrics, "rollout_seconds": time.perf_counter() - generating}
        if self.config.grpo.max_staleness:
            metrics["staleness"] = int(ahead is not None)  # updates since the weights that sampled
        train_at, rollout_at = (Where(part.stream, "grpo", phase) for phase in ("train", "rollout"))
        steered = self.stack.steers_differently(train_at, rollout_at)
        micros = [
            Micro(batch.to(self.policy.device), part.weight, same_context=batch.rollout is None and not steered)
            for batch in result.batches
        ]
        apart: Counter[str] = Counter()
        old = self.config.grpo.iterations > 1 or ahead is not None
        forwards = sum(old + (not micro.same_context) for micro in micros)
        # Each is a collective when the model is sharded, and every rank runs as many: asked before any of them begins.
        most = max(gather_object([forwards])) if self.policy.is_sharded else 0
        with self.policy.at(ahead.reference) if ahead else nullcontext():  # as it was when it sampled
            for micro in micros:
                if old:
                    with self.stack.activations(self.policy, train_at):
                        micro.batch.old_logp = self.policy.score(micro.batch, self.config.grpo.temperature)
                if not micro.same_context:
                    with self.stack.activations(self.policy, rollout_at):
                        gap, tokens = separate_gap(self.policy, micro.batch, self.config.grpo.temperature)
                    apart.update({"gap": gap, "tokens": tokens})  # type: ignore[arg-type]
            for _ in range(most - forwards):
                self.policy.score(dummy(self.policy, micros).batch)
        total = reduce_sums(apart, self.accelerator)
        if total.get("tokens"):
            metrics["sampler_gap"] = total["gap"] / total["tokens"]
        return micros, metrics

    def _state(self, part: PlannedPart) -> TrainerState:
        """What rewards are told of the run."""
        stream = self.streams[part.stream]
        epoch = stream.epoch + stream.position / len(stream)
        return TrainerState(self.done, len(self.plan), epoch, [dict(record) for record in self.tracker.metrics])

    def update(self, step: Step, micros: list[Micro]) -> dict[str, Any]:
        """Forward and backward of every micro-batch, one optimizer step, weight hooks."""
        micros = even_out(micros, self.accelerator, self.policy)
        uses_grpo = step.path == "grpo"
        plan = ForwardPlan.from_needs(self.stack.needs | engine_needs(self.config.grpo, uses_grpo))
        counts = global_counts(micros, self.stack, self.config.grpo, self.accelerator)
        loss = StepLoss(self.config.grpo, self.stack, plan, counts, self.accelerator.num_processes)
        measure = self.effects.due(step.index, self.config.track.every)
        leaves = self.policy.leaves() if measure else []
        shares: dict[str, float] = {}
        for number, micro in enumerate(micros):
            temperature = self.config.grpo.temperature if micro.batch.where.path == "grpo" else 1.0
            frozen = self.policy.frozen(micro.batch, plan, temperature)
            last = number == len(micros) - 1
            with (
                nullcontext() if last or self.policy.is_sharded else self.accelerator.no_sync(self.policy.module),
                self.stack.activations(self.policy, micro.batch.where),
            ):
                total, terms = loss.forward(self.policy, micro, frozen)
                wanted = measure and len(terms) > 1 and len(shares) < len(self.stack.penalized)
                if wanted or (measure and self.policy.is_sharded):
                    shares |= self._shares(terms if wanted else {}, total, leaves)
                backward(self.accelerator, self.optimizer, total)
        parameters: list[torch.Tensor] = list(self.policy.trainable().values())
        has_rows = anywhere(any(not micro.dummy for micro in micros), self.accelerator)
        metrics = self._step_optimizer(step, parameters, has_rows)
        self.dirty |= self.stack.after_step(self.policy, "step")
        return metrics | self._loss_metrics(step, micros, loss) | shares

    def _shares(
        self, terms: dict[str, torch.Tensor], total: torch.Tensor, leaves: list[torch.Tensor]
    ) -> dict[str, float]:
        """Gradient shares of the terms. When the model is sharded a backward is a collective: every rank runs as many."""
        most = max(gather_object([len(terms)])) if self.policy.is_sharded else 0  # asked before any of them begins
        shares = self.effects.gradients(terms, leaves) if terms else {}
        for _ in range(most - len(terms)):
            torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        return shares

    def _step_optimizer(self, step: Step, parameters: list[torch.Tensor], has_rows: bool) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr
        norm = clip(self.accelerator, self.optimizer, parameters, self.config.optim.max_grad_norm)
        if has_rows:
            if not math.isfinite(norm):
                raise NotFinite(f"the gradient norm is {norm}")
            self.began = None
            self.optimizer.step()
            self.dirty = True
        self.optimizer.zero_grad()
        return {"lr": step.lr, "grad_norm": norm}

    def _loss_metrics(self, step: Step, micros: Sequence[Micro], loss: StepLoss) -> dict[str, Any]:
        """Reduce what the micro-batches summed up over ranks, and name it as the contract does."""
        sums = Counter(loss.sums)
        sums["tokens"] = sum(micro.batch.tokens for micro in micros if not micro.dummy)
        total = reduce_sums(sums, self.accelerator)
        tokens = total.pop("tokens")
        metrics: dict[str, Any] = {"loss": total.pop("loss", 0.0), "tokens": tokens}
        gap, gap_tokens = total.pop("gap_sum", 0.0), total.pop("gap_tokens", 0.0)
        if gap_tokens:
            metrics["sampler_gap"] = gap / gap_tokens
            self._check_gap(step, gap / gap_tokens)
        grpo_tokens = loss.counts.get("grpo_tokens", 0.0)
        for name in ("entropy", "k3"):
            if (value := total.pop(f"{name}_sum", None)) is not None and grpo_tokens:
                metrics[name] = value / grpo_tokens
        compared, targets = total.pop("grpo/count", 0.0), total.pop("grpo/targets", 0.0)
        if compared:  # mean ratio, shares of clipped ratios, mean correction weight
            for name in [name for name in total if name.startswith("grpo/")]:
                metrics[name.removeprefix("grpo/")] = total.pop(name) / (
                    targets if name == "grpo/correction" else compared
                )
        return metrics | total

    def _check_gap(self, step: Step, gap: float) -> None:
        """Trainer and sampler saw the same context and the same distribution: they must agree, or the rollouts are not the
        policy's. (Truncation by top_p makes the two differ by design.)"""
        limit = gap_limit(self.policy, self.config.sampler.max_gap)
        if self.config.sampler.self_test and self.config.grpo.top_p == 1.0 and gap > limit:
            raise RunError(
                f"step {step.index}: sampler and trainer disagree by {gap:.3g} nats a token (limit {limit:.3g}): the rollouts "
                "are not the policy's. Did the model's files change? sampler.max_gap sets the limit"
            )

    # ------------------------------------------------------------------------------------------------ probes

    def _probes(self, step: Step) -> bool:
        every = self.config.track.every
        return self.probe is not None and every > 0 and (step.index % every == 0 or self.done == len(self.plan))

    def _probe(self, step: Step) -> tuple[Late, dict[str, Any]]:
        """Sample a few answers with all training hooks off and hand them to the judge; KL to the base on those very tokens."""
        began = time.perf_counter()
        probe = self.probe
        assert probe is not None
        started, metrics = start_probe(probe, self.policy, self.sampler(), self.config, step.index, self.direction)

        def finish() -> dict[str, Any]:
            judged, dialogues = probe.finish(started)
            self.tracker.dialogues(dialogues[: self.config.track.texts], step.index)
            self.tracker.samples(
                {"step": step.index, "probe": True, **{k: v for k, v in dialogue.items() if k != "ids"}}
                for dialogue in dialogues
            )
            return judged

        return Late(started.judging.done, finish), {**metrics, "probe_seconds": time.perf_counter() - began}

    def _take_in_judgements(self) -> None:
        """Write what the judge has found meanwhile. While it is out and its settings say so (on_outage: pause), wait for it."""
        judge = self.probe.judge if self.probe else None
        if isinstance(judge, BackgroundJudge):
            self.tracker.collect(wait=judge.paused)
            if self.tracker.arrived:  # not what an earlier run of this process met
                self.gave_up = judge.gave_up
