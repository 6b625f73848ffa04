"""A run directory's life: start, checkpoint, interrupt, resume, finish. `train` is the command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from rlsafe.config import RunConfig, UserError, check_out, dump_yaml, load_run
from rlsafe.engine.run.finished import Run
from rlsafe.engine.run.interrupts import ended_early, stop_requests, stops_at_once
from rlsafe.engine.run.lock import hold, releasing
from rlsafe.engine.run.records import goes_on, read_record
from rlsafe.types import Interrupted, RunError

if TYPE_CHECKING:
    from rlsafe.engine.run.build import Resources
    from rlsafe.engine.train.state import Components, RunState
    from rlsafe.policy import Policy


Progress = Callable[[int, int, dict[str, Any]], None]
"""Called after each step with (steps done, steps in all, the step's metrics)."""


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
    from rlsafe.engine.record.provenance import provenance
    from rlsafe.engine.run.build import Resources, build_run, prepare
    from rlsafe.engine.run.contact import contact
    from rlsafe.engine.run.resume import newest, restore

    started = time.perf_counter()
    out = Path(out)
    prepared = prepare(config)
    if first:
        contact(prepared, resources or Resources())
    notes: list[str] = []
    saved: dict[str, Any] = newest(out, prepared.config, notes.append) if resume else {}
    resumed = _resumed(out) if resume else []
    _claim(out, resumed)
    if not saved:  # what a run without any checkpoint left behind
        for name in ("tensorboard", "trackers"):
            shutil.rmtree(out / name, ignore_errors=True)
    components, state = build_run(
        prepared, out, resources or Resources(), notes.append,
        offset=saved.get("offset"), first_step=saved.get("done", 0),
    )  # fmt: skip
    if saved:
        restore(components, state, saved)
        resumed.append(state.done)
    main = components.accelerator.is_main_process
    origin = provenance(prepared.config, command, sources) if main else {}
    if main:
        _write(out / "config.yaml", dump_yaml(prepared.config))
        _write_record(out, "running", origin, resumed=resumed)
        components.tracker.text("config", "```yaml\n" + dump_yaml(prepared.config) + "\n```")
    try:
        with stop_requests() as asked:
            _train(components, state, out, asked, progress, command or "--resume")
            _save_trained(components.policy, out, write=main)
            if main:
                components.tracker.collect(wait=True)  # judgements that are still to come belong to the record
                ended = _ended(components, state, out, notes, resumed, time.perf_counter() - started)
                _write_record(out, "finished", origin, **ended)
            components.tracker.close()
    except BaseException as error:
        early = ended_early(error, components, state, out, command)
        with suppress(Exception):  # a full disk stops the last lines, too: told is what came first
            components.tracker.close()
        raise early from error
    seconds = time.perf_counter() - started
    return Run(out, prepared.config, components.tracker.metrics, seconds, notes, components=components)


def _train(run: Components, state: RunState, out: Path, asked: Event, progress: Progress | None, resuming: str) -> None:
    """Every step that is left, with checkpoints between them. Interrupted when a stop is `asked` for; RunError when the judge
    stays out."""
    from rlsafe.engine.run.resume import save_checkpoint
    from rlsafe.engine.train.distributed import anywhere, first_of
    from rlsafe.engine.train.loop import train_steps

    every, steps = run.config.checkpoint.every, len(run.plan)
    for record in train_steps(run, state):
        if progress:
            progress(state.done, steps, record)
        stop, gave_up = asked.is_set(), state.gave_up
        if run.several:  # signals reach ranks at different moments, and all must stop after the same step
            stop, gave_up = anywhere(stop, run.accelerator), first_of(gave_up, run.accelerator)
        if stop or gave_up or (every and state.done % every == 0):
            save_checkpoint(run, state, out)
        if state.done == steps:
            continue
        if gave_up:
            raise RunError(
                f"{gave_up}; stopped after step {state.done} of {steps}, state saved. Resume with: {resuming}"
            )
        if stop:
            raise Interrupted(f"after step {state.done} of {steps}; state saved. Resume with: {resuming}")


def _claim(out: Path, resumed: list[int]) -> None:
    """Before the model is loaded: the directory is a run's from now on. UserError when it cannot be written."""
    try:
        _write_record(out, "running", {}, resumed=resumed)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _ended(
    run: Components, state: RunState, out: Path, notes: list[str], resumed: list[int], seconds: float
) -> dict[str, Any]:
    """What run.json says of a finished run beside its origin."""
    from rlsafe.engine.record.provenance import digests

    return {
        "steps": state.done,
        "seconds": seconds,
        "notes": notes,
        "resumed": resumed,
        "processes": run.accelerator.num_processes,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": digests(out, run.policy.saved_as),
        "defenses": {defense.name: report for defense in run.stack if (report := defense.report())},
    }


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
    from rlsafe.engine.run.build import Resources

    command = shlex.join(["rlsafe", "train", str(config), *overrides, "--out", str(directory), "--resume"])
    resources = Resources(on_start=on_start)
    with stops_at_once(f"interrupted before the first step; begin again with: {command}"):
        finished = run(
            settings, directory, resources=resources, progress=progress, resume=resume, command=command,
            sources=config_files(config), first=True,
        )  # fmt: skip
    questions = finished.config.evaluate
    if questions.wanted:
        from rlsafe.evaluate import evaluate_run, reader_of
        from rlsafe.evaluate.ask.journal import identity
        from rlsafe.rollouts import ranks

        with stops_at_once(f"interrupted while evaluating; the run is saved. Go on with: {command}"):
            sampler = finished.sampler if questions.asks else None  # every rank takes part in its sync
            whole = sampler is None or sampler.name == "transformers"
            with finished.policy.kept_whole() if whole else nullcontext():
                # The first rank asks, judges and counts; all of them answer.
                with ranks.spread(sampler) if sampler else nullcontext() as asking:
                    if not finished.is_main:
                        return finished
                    finished.evaluation = evaluate_run(
                        asking, finished.policy.tokenizer, questions, directory,
                        judge=resources.judge(finished.config) if questions.judged else None,
                        weights=identity(finished.config, directory),
                        reader=reader_of(finished.config, finished.policy, whole=whole),
                    )  # fmt: skip
    return finished


def _existing(directory: Path, settings: RunConfig, resume: bool, overwrite: bool) -> Run | None:
    """What to do with a directory that is there: a finished run when there is nothing left to do, else None to go on."""
    from rlsafe.engine.record import checkpoint

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
        done = Run.read(directory)
        done.before, done.notes = True, ["already finished; nothing to do"]
        if done.config.evaluate.wanted and not (directory / "evaluation.json").is_file():
            from rlsafe.evaluate import evaluate

            done.before, done.evaluation, done.notes = False, evaluate(directory), ["already trained; evaluated now"]
        return done
    if resume:
        return None
    if status.get("status") == "finished" and not overwrite:
        raise UserError(f"{directory}: holds a finished run; use --overwrite to replace it or another --out")
    if checkpoint.saved(directory / "checkpoints") and not overwrite:
        raise UserError(
            f"{directory}: holds an unfinished run with checkpoints; use --resume to go on or --overwrite to start over"
        )
    for name in ("checkpoints", "tensorboard", "trackers", "adapter", "model"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("metrics.jsonl", "samples.jsonl", "evaluation.json", "answers.csv", "benign_answers.csv", "run.json"):
        (directory / name).unlink(missing_ok=True)
    return None


# ------------------------------------------------------------------------------------------------ files


def _save_trained(policy: Policy, out: Path, write: bool) -> None:
    """adapter/, or model/ after full fine-tuning: whole or absent. Every rank brings its shards, the main one writes."""
    name = policy.saved_as
    building = out / f".{name}"
    if not write:
        return policy.save_adapter(str(building), write=False)
    shutil.rmtree(building, ignore_errors=True)
    policy.save_adapter(str(building))
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
