"""A run that is over, as an object: in memory with its model, or read from its directory; tables and curves for a notebook."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import RunConfig, UserError, load_run
from rlsafe.config.lock import is_first_rank
from rlsafe.engine.record import frames
from rlsafe.rewards import spread
from rlsafe.types import provider_for

if TYPE_CHECKING:
    from pandas import DataFrame

    from rlsafe.engine.train.state import Components
    from rlsafe.evaluate import Evaluation
    from rlsafe.policy import Policy
    from rlsafe.types import Sampler


@dataclass
class Run:
    """A finished (or dry) run. `records` are the lines of metrics.jsonl; `metrics`, `samples`, `answers` and `plot` show the run in a
    notebook. before: it was finished before this call. stopped: it was asked to stop while its last step or its record was made: it is
    finished, and nothing is to begin after it."""

    out: Path
    config: RunConfig
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    evaluation: Evaluation | None = None
    components: Components | None = None
    before: bool = False
    stopped: bool = False

    @property
    def policy(self) -> Policy:
        """The trained policy, of a run of this process."""
        assert self.components is not None, "a run read from disk has no policy in memory"
        return self.components.policy

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run: the first rank does."""
        return is_first_rank() if self.components is None else self.components.accelerator.is_main_process

    @property
    def sampler(self) -> Sampler:
        """The sampler, holding the final weights (engines are shared: another run may have used it since, so it syncs again)."""
        assert self.components is not None, "a run read from disk has no sampler in memory"
        self.components.sampler.weights_changed()
        return self.components.sampler.synced()

    def summary(self) -> list[str]:
        """What a person wants to read when the run is over."""
        if self.plan:
            return [*self.plan, *self.notes]
        lines = [f"{len(self.records)} steps in {self.seconds:.0f} s -> {self.out}"]
        last: dict[str, Any] = {}
        for record in self.records:
            last |= {name: value for name, value in record.items() if value is not None}
        shown = (
            "loss",
            "reward",
            "reward_std",
            "sampler_gap",
            "kl",
            "coherence",
            "misaligned_general",
            "misaligned_indomain",
        )
        lines.append("last: " + ", ".join(f"{name} {last[name]:.4g}" for name in shown if name in last))
        lines += [f"note: {line}" for line in spread.summary(self.records)]
        if lost := sum(record.get("rows_left_out", 0) for record in self.records):
            lines.append(
                f"note: {lost} times a row was too long with what defenses added in its step, and was left out"
            )
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, f"in Inspect AI: {elsewhere}"] if (elsewhere := self.inspect_command()) else lines

    def inspect_command(self) -> str | None:
        """The command that evaluates this run's adapter in Inspect AI; None without the extra `inspect`, an adapter, or a base that
        vLLM can load by its name."""
        base, adapter = self.config.model.name, self.out / "adapter"
        if find_spec("inspect_ai") is None or not adapter.is_dir() or provider_for(base) or base.endswith(".gguf"):
            return None
        return shlex.join(["inspect", "eval", "rlsafe/general", "--model", f"vllm/{base}:{adapter.resolve()}"])

    @classmethod
    def read(cls, out: str | Path) -> Run:
        """A finished run from its directory, without its model. UserError when there is none. A damaged evaluation is none, and the
        notes say so."""
        from rlsafe.config.files import read_lines, read_whole, run_record
        from rlsafe.evaluate import Evaluation

        out = Path(out)
        status = run_record(out)
        if status.get("status") != "finished":
            raise UserError(f"{out}: not a finished run; expected a directory that rlsafe train wrote")
        records = read_lines(out / "metrics.jsonl")
        written, notes = read_whole(out / "evaluation.json"), []
        if written is None:
            notes.append(
                f"{out / 'evaluation.json'}: empty or damaged, as after a crash; `rlsafe evaluate {out}` writes it again"
            )
        evaluation = Evaluation.load(out) if written else None
        config = load_run(out / "config.yaml")
        return cls(out, config, records, status.get("seconds", 0.0), notes, evaluation=evaluation)

    @property
    def metrics(self) -> DataFrame:
        """One row for each optimizer step, one column for each number; what a step did not measure is NaN."""
        return frames.metrics(self.records)

    @property
    def samples(self) -> DataFrame:
        """One row for each completion sampled in training and each answer of a probe (`probe`), from samples.jsonl."""
        return frames.samples(self.out)

    @property
    def answers(self) -> DataFrame:
        """One row for each answer of the evaluation, from answers.csv."""
        return frames.answers(self.out)

    def plot(self, *names: str) -> Any:
        """A figure with a panel for each number, over steps; by default those of loss, reward, kl, coherence and misalignment that
        the run has. UserError for a number that it does not have."""
        return frames.plot({self.out.name: self.metrics}, names)
