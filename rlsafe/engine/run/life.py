"""A run directory's life: start, checkpoint, interrupt, resume, finish. `train` is the command."""

from __future__ import annotations

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
from rlsafe.config.files import replacing_directory
from rlsafe.config.lock import hold, is_first_rank, is_one_of_several, releasing
from rlsafe.config.trees import flatten
from rlsafe.engine.run.finished import Run
from rlsafe.engine.run.interrupts import ended_early, stop_requests, stops_at_once
from rlsafe.engine.run.records import claim, goes_on, read_record, went_on_from, write, write_record
from rlsafe.types import Interrupted, RunError

if TYPE_CHECKING:
    from rlsafe.engine.run.build import Prepared, Resources
    from rlsafe.engine.train.state import Components, RunState
    from rlsafe.evaluate import Evaluation
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
    replaces: Sequence[str] = (),
) -> Run:
    """Train one run into `out`. The caller decides whether an existing directory may be used (see `train`).

    resume: continue from the newest checkpoint that can be read. command: how a person resumes, for the message of an
        interrupt. sources: the config files behind `config`, for the record. first: see `contact`. replaces: what the run before left
        in `out`, deleted once this one can begin.

    UserError for what is wrong with the config, its data or its model, before the first step; RunError when the run cannot go on;
    Interrupted when it was asked to stop before its last step, its state saved; in the last one it is finished and `Run.stopped`.
    """
    from rlsafe.engine.run.build import Resources, prepare
    from rlsafe.engine.run.contact import contact
    from rlsafe.engine.train.distributed import anywhere

    started = time.perf_counter()
    out, resources = Path(out), resources or Resources()
    prepared = prepare(config)
    if first:
        contact(prepared, resources)
    notes: list[str] = []
    components, state, resumed = _begin(prepared, out, resources, notes, resume, replaces)
    main = components.accelerator.is_main_process
    origin = _write_origin(components, out, command, sources, resumed) if main else {}
    written = finished = False
    try:
        with stop_requests() as asked:
            _train(components, state, out, asked, progress, command or "--resume")
            _save_trained(components.policy, out, write=main)
            written = True
            if main:
                components.tracker.offset()  # judgements that are still to come belong to the record, and all of it on the disk
                ended = _ended(components, state, out, notes, resumed, time.perf_counter() - started)
                write_record(out, "finished", origin, **ended)
                finished = True
            components.tracker.close()
            stopped = anywhere(asked.is_set(), components.accelerator) if components.several else asked.is_set()
    except BaseException as error:
        early = ended_early(error, components, state, out, command, written, finished)
        with suppress(Exception, KeyboardInterrupt):  # a full disk stops the last lines, too: told is what came first
            components.tracker.close()
        raise early from error
    seconds = time.perf_counter() - started
    return Run(out, prepared.config, components.tracker.metrics, seconds, notes, components=components, stopped=stopped)


def _begin(
    prepared: Prepared, out: Path, resources: Resources, notes: list[str], resume: bool, replaces: Sequence[str]
) -> tuple[Components, RunState, list[int]]:
    """(components, state, the steps from which the run went on so far): built anew or, to resume, put where the newest checkpoint
    was taken. From here on the directory is the run's."""
    from rlsafe.engine.run.build import build_run
    from rlsafe.engine.run.resume import check_same, newest, restore

    saved: dict[str, Any] = newest(out, prepared.config, notes.append) if resume else {}
    resumed = went_on_from(out) if resume else []
    if is_first_rank():
        claim(out, resumed)
        for name in replaces:
            _remove(out / name)
    if not saved and is_first_rank():  # what a run without any checkpoint left behind
        for name in ("tensorboard", "trackers"):
            _remove(out / name)
    components, state = build_run(
        prepared, out, resources, notes.append, offset=saved.get("offset"), first_step=saved.get("done", 0)
    )
    check_same(components, saved.get("done", 0), out)
    if saved:
        restore(components, state, saved)
        resumed.append(state.done)
    return components, state, resumed


def _write_origin(
    run: Components, out: Path, command: str, sources: Sequence[Path], resumed: list[int]
) -> dict[str, Any]:
    """config.yaml, and in run.json what the run is made of, which is given back."""
    from rlsafe.engine.record.provenance import provenance

    settings, origin = dump_yaml(run.config), provenance(run.config, command, sources)
    write(out / "config.yaml", settings)
    write_record(out, "running", origin, resumed=resumed)
    run.tracker.text("config", f"```yaml\n{settings}\n```")
    return origin


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
    """`rlsafe train`: one run from a config file, evaluated at the end when the config names questions and a judge.

    UserError for settings that cannot work and for a directory that may not be used; else as `run`.
    """
    settings = load_run(config, overrides)
    named = out or settings.out
    directory = Path(named or f"runs/{Path(config).stem}-{datetime.now():%Y%m%d-%H%M%S}")
    if dry_run:
        from rlsafe.engine.run.dry import dry_run as describe

        return Run(directory, settings, plan=describe(settings, directory))
    if not named and is_one_of_several():
        directory = _of_first(directory)
    check_out(directory)
    hold(directory)
    done, replaces = _existing(directory, settings, resume, overwrite)
    words = ["rlsafe", "train", str(config), *overrides, "--out", str(directory)]
    command = shlex.join([*words, "--resume"])
    go_on = f"the run is saved. Go on with: {command}"
    evaluating = f"interrupted while evaluating; {go_on}"
    if done is not None:
        with stops_at_once(evaluating):
            return _evaluated_now(done)
    from rlsafe.engine.record.provenance import config_files
    from rlsafe.engine.run.build import Resources

    # The same flags: there may be nothing to resume yet, or only the run that is to be replaced.
    again = shlex.join([*words, *["--resume"] * resume, *["--overwrite"] * overwrite])
    resources = Resources(on_start=on_start)
    with stops_at_once(f"interrupted before the first step; begin again with: {again}"):
        finished = run(
            settings, directory, resources=resources, progress=progress, resume=resume, command=command,
            sources=config_files(config), first=True, replaces=replaces,
        )  # fmt: skip
    if finished.config.evaluate.wanted:
        if finished.stopped:
            raise Interrupted(f"interrupted in the last step, nothing is evaluated yet; {go_on}")
        with stops_at_once(evaluating):
            finished.evaluation = _evaluated(finished, resources)
    return finished


def _of_first(directory: Path) -> Path:
    """The directory that the first rank named by its clock: others' may be a second on. Here the ranks meet."""
    import torch

    from rlsafe.engine.train.distributed import start
    from rlsafe.rollouts import ranks

    start(cpu=not torch.cuda.is_available())
    return ranks.of_first(lambda: directory)


EVALUATION = ("evaluation.json", "answers.csv", "benign_answers.csv", "likelihood.csv", "narrow_answers.csv")
"""What an evaluation leaves in a run's directory."""

TRAINING = ("checkpoints", "tensorboard", "trackers", "adapter", "model", "metrics.jsonl", "samples.jsonl")
"""What training leaves there beside its record; checkpoints first, so that nothing goes on from them when deleting is cut short."""


def _evaluated(finished: Run, resources: Resources) -> Evaluation | None:
    """What the trained model answers, judged, and written into the run's directory; None on ranks that only help to answer."""
    from rlsafe.evaluate import evaluate_run, reader_of
    from rlsafe.evaluate.ask.journal import identity
    from rlsafe.rollouts import ranks

    questions = finished.config.evaluate
    sampler = finished.sampler if questions.asks else None  # every rank takes part in its sync
    whole = sampler is None or sampler.name == "transformers"
    with finished.policy.kept_whole() if whole else nullcontext():
        # The first rank asks, judges and counts; all of them answer.
        with ranks.spread(sampler) if sampler else nullcontext() as asking:
            if not finished.is_main:
                return None
            return evaluate_run(
                asking, finished.policy.tokenizer, questions, finished.out,
                judge=resources.judge(finished.config) if questions.judged else None,
                weights=identity(finished.config, finished.out),
                reader=reader_of(finished.config, finished.policy, whole=whole),
            )  # fmt: skip


def _evaluated_now(done: Run) -> Run:
    """A run that was trained before, evaluated when its settings ask for it and that is still to be done. The first rank does it."""
    if is_first_rank() and done.config.evaluate.wanted and done.evaluation is None:
        from rlsafe.evaluate import evaluate

        done.before, done.evaluation, done.notes = False, evaluate(done.out), ["already trained; evaluated now"]
    return done


def _existing(
    directory: Path, settings: RunConfig, resume: bool, overwrite: bool
) -> tuple[Run | None, tuple[str, ...]]:
    """What to do with a directory that is there: a finished run when there is nothing left to train, else None to go on, and what is
    then to be deleted. Nothing is deleted here: the settings of the new run may still turn out wrong.

    The first rank decides: another may come before or after it, to a directory that is just being made ready.
    """
    from rlsafe.engine.record import checkpoint

    first = is_first_rank()
    if not first and not resume:
        return None, ()
    if not directory.exists():
        if resume:
            raise UserError(f"{directory}: nothing to resume, there is no such run directory")
        return None, ()
    status = read_record(directory, resume, overwrite)
    if first and not status and any(directory.iterdir()) and not overwrite:
        raise UserError(f"{directory}: not empty and not a run of rlsafe; choose another --out, or --overwrite")
    if resume and status.get("status") == "finished" and not goes_on(directory, settings):
        done = Run.read(directory)
        done.before, done.notes = True, ["already finished; nothing to do", *done.notes]
        return done, ()
    if resume:  # what is left of an evaluation is of the model as it was, before more steps
        _check_not_read(directory, settings, EVALUATION)
        return None, EVALUATION
    if status.get("status") == "finished" and not overwrite:
        raise UserError(f"{directory}: holds a finished run; use --overwrite to replace it or another --out")
    if checkpoint.saved(directory / "checkpoints") and not overwrite:
        raise UserError(
            f"{directory}: holds an unfinished run with checkpoints; use --resume to go on or --overwrite to start over"
        )
    replaces = (*TRAINING, *EVALUATION)
    _check_not_read(directory, settings, replaces)
    return None, replaces


def _check_not_read(directory: Path, settings: RunConfig, replaces: Sequence[str]) -> None:
    """UserError when a setting names something of the run that is to be replaced: it would be deleted before it is read."""
    gone = [(directory / name).resolve() for name in replaces]
    for key, value in flatten(settings.model_dump(mode="json", exclude={"out"})).items():
        if isinstance(value, str) and "/" in value:
            text = value.removeprefix("path:").partition(".py:")[0]
            named = Path(os.path.expanduser(text)).resolve()
            if any(named == part or part in named.parents for part in gone):
                raise UserError(f"{key}: {value} is part of the run that would be replaced; choose another --out")


# ------------------------------------------------------------------------------------------------ files


def _remove(path: Path) -> None:
    """A file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _save_trained(policy: Policy, out: Path, write: bool) -> None:
    """adapter/, or model/ after full fine-tuning: whole or absent. Every rank brings its shards, the main one writes."""
    from rlsafe.engine.record.checkpoint import naming

    directory = out / policy.saved_as
    if not write:
        return policy.save_adapter(directory, write=False)
    with naming(directory), replacing_directory(directory) as building:
        policy.save_adapter(building)
