"""A run directory's life: start, checkpoint, interrupt, resume, finish. `train` is the command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import RunConfig, UserError, check_out, dump_yaml, load_run
from rlsafe.engine.run.interrupts import ended_early, stop_requests, stops_at_once
from rlsafe.engine.run.lock import hold, releasing
from rlsafe.engine.run.records import goes_on, read_record
from rlsafe.rewards import spread
from rlsafe.types import Interrupted, RunError

if TYPE_CHECKING:
    from rlsafe.engine.run.components import Resources
    from rlsafe.engine.train.loop import Loop, Progress
    from rlsafe.evaluate import Evaluation
    from rlsafe.policy import Policy
    from rlsafe.types import Sampler


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
    def is_main(self) -> bool:
        """Whether this process speaks for the run: the first rank does."""
        return self.loop is None or self.loop.accelerator.is_main_process

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
        lines += [f"note: {line}" for line in spread.summary(self.metrics)]
        return lines + [f"note: {note}" for note in self.notes]


def run(
    config: RunConfig,
    out: Path | str,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    command: str = "",
    sources: Sequence[Path] = (),
    first: bool = False,
) -> Run:
    """Train one run into `out`. The caller decides whether an existing directory may be used (see `train`).

    resume: continue from the newest checkpoint that can be read. command: how a person resumes, for the message of an
        interrupt. sources: the config files behind `config`, for the record. first: see `contact`.
    """
    from rlsafe.engine.record.provenance import digests, provenance
    from rlsafe.engine.run.components import Resources, build_loop, prepare
    from rlsafe.engine.run.contact import contact
    from rlsafe.engine.run.resume import newest, restore, save_checkpoint
    from rlsafe.engine.train.distributed import anywhere, first_of

    started = time.perf_counter()
    out = Path(out)
    prepared = prepare(config)
    if first:
        contact(prepared, resources or Resources())
    notes: list[str] = []
    state: dict[str, Any] = newest(out, prepared.config, notes.append) if resume else {}
    resumed = _resumed(out) if resume else []
    try:
        _write_record(
            out, "running", {}, resumed=resumed
        )  # before the model is loaded: the directory is a run's from now on
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    if not state:  # what a run without any checkpoint left behind
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
    loop = build_loop(
        prepared,
        out,
        resources or Resources(),
        notes.append,
        offset=state.get("offset"),
        first_step=state.get("done", 0),
    )
    if state:
        restore(loop, state)
        resumed.append(loop.done)
    loop.effects.warn = notes.append
    main = loop.accelerator.is_main_process
    origin = provenance(prepared.config, command, sources) if main else {}
    if main:
        _write(out / "config.yaml", dump_yaml(prepared.config))
        _write_record(out, "running", origin, resumed=resumed)
        loop.tracker.text("config", "```yaml\n" + dump_yaml(prepared.config) + "\n```")
    try:
        with stop_requests() as asked:
            every = prepared.config.checkpoint.every

            def after_step() -> None:
                due = every and loop.done % every == 0
                if anywhere(asked.is_set(), loop.accelerator):
                    asked.set()
                loop.gave_up = first_of(loop.gave_up, loop.accelerator)
                if due or asked.is_set() or loop.gave_up:
                    save_checkpoint(loop, out)
                if loop.gave_up and loop.done < len(loop.plan):
                    raise RunError(
                        f"{loop.gave_up}; stopped after step {loop.done} of {len(loop.plan)}, state saved. "
                        f"Resume with: {command or '--resume'}"
                    )
                if asked.is_set() and loop.done < len(loop.plan):
                    raise Interrupted(
                        f"after step {loop.done} of {len(loop.plan)}; state saved. Resume with: {command or '--resume'}"
                    )

            loop.run(progress, after_step)
            _save_trained(loop, out, write=main)
            if main:
                loop.tracker.collect(wait=True)  # judgements that are still to come belong to the record
                _write_record(
                    out, "finished", origin,
                    steps=loop.done, seconds=time.perf_counter() - started, notes=notes, resumed=resumed,
                    processes=loop.accelerator.num_processes,
                    ended=datetime.now(UTC).isoformat(timespec="seconds"),
                    files=digests(out, loop.policy.saved_as),
                    defenses={defense.name: report for defense in loop.stack if (report := defense.report())},
                )  # fmt: skip
            loop.tracker.close()
    except BaseException as error:
        ended = ended_early(error, loop, out, command)
        with suppress(Exception):  # a full disk stops the last lines, too: told is what came first
            loop.tracker.close()
        raise ended from error
    return Run(out, prepared.config, loop.tracker.metrics, time.perf_counter() - started, notes, loop=loop)


@releasing
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
        from rlsafe.engine.run.dry import dry_run as describe

        return Run(directory, settings, plan=describe(settings, directory))
    check_out(directory)
    hold(directory)
    if (done := _existing(directory, settings, resume, overwrite)) is not None:
        return done
    from rlsafe.engine.record.provenance import config_files
    from rlsafe.engine.run.components import Resources

    command = shlex.join(["rlsafe", "train", str(config), *overrides, "--out", str(directory), "--resume"])
    resources = Resources(on_start=on_start)
    with stops_at_once(f"interrupted before the first step; begin again with: {command}"):
        finished = run(
            settings, directory, resources=resources, progress=progress, resume=resume, command=command,
            sources=config_files(config), first=True,
        )  # fmt: skip
    questions = finished.config.evaluate
    if questions.wanted:
        from rlsafe.evaluate import evaluate_run
        from rlsafe.evaluate.ask.journal import identity

        with stops_at_once(f"interrupted while evaluating; the run is saved. Go on with: {command}"):
            sampler = finished.sampler  # every rank takes part in its sync; the main one asks and counts
            with finished.policy.kept_whole() if sampler.name == "transformers" else nullcontext():
                if not finished.is_main:
                    return finished
                finished.evaluation = evaluate_run(
                    sampler, finished.policy.tokenizer, questions, directory,
                    judge=resources.judge(finished.config) if questions.judge is not None else None,
                    weights=identity(finished.config, directory),
                )  # fmt: skip
    return finished


def _existing(directory: Path, settings: RunConfig, resume: bool, overwrite: bool) -> Run | None:
    """What to do with a directory that is there: a finished run when there is nothing left to do, else None to go on."""
    from rlsafe.engine.run import checkpoint

    if not directory.exists():
        if resume:
            raise UserError(f"{directory}: nothing to resume, there is no such run directory")
        return None
    status = read_record(directory, resume, overwrite)
    if not status and any(directory.iterdir()) and not overwrite:
        raise UserError(f"{directory}: not empty and not a run of rlsafe; choose another --out, or --overwrite")
    if resume and status.get("status") == "finished" and goes_on(directory, settings):
        for name in ("evaluation.json", "answers.csv", "benign_answers.csv"):  # of the model as it was
            (directory / name).unlink(missing_ok=True)
        return None
    if resume and status.get("status") == "finished":
        done = _read_run(directory, status)
        if done.config.evaluate.wanted and not (directory / "evaluation.json").is_file():
            from rlsafe.evaluate import evaluate

            done.evaluation, done.notes = evaluate(directory), ["already trained; evaluated now"]
        return done
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


# ------------------------------------------------------------------------------------------------ files


def _save_trained(loop: Loop, out: Path, write: bool) -> None:
    """adapter/, or model/ after full fine-tuning: whole or absent. Every rank brings its shards, the main one writes."""
    name = loop.policy.saved_as
    building = out / f".{name}"
    if not write:
        return loop.policy.save_adapter(str(building), write=False)
    shutil.rmtree(building, ignore_errors=True)
    loop.policy.save_adapter(str(building))
    shutil.rmtree(out / name, ignore_errors=True)
    building.rename(out / name)


def _write_record(out: Path, status: str, origin: dict[str, Any], **more: Any) -> None:
    """run.json: how far the run is, what it was made of (rlsafe.engine.record.provenance), what it left."""
    _write(out / "run.json", json.dumps({"status": status, **more, **origin}, indent=2))


def _resumed(out: Path) -> list[int]:
    """The steps from which the run went on before."""
    return list(read_record(out, resume=True).get("resumed", []))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # several ranks may write the same
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before what it names
    temporary.replace(path)
