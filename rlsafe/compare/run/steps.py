"""`rlsafe evaluate RUN --steps all`: a run, or every narrow run of a comparison, measured at its checkpoints.

RUN/steps/step-NNNNNN/ has the evaluation of one checkpoint, RUN/steps.csv one line for each and for the finished run. What is measured
already, with the same settings, is not measured again. Runs keep checkpoints as `checkpoint: {every: N, keep: K}` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.compare.grid.records import Directory
from rlsafe.compare.verdicts.levels import edited
from rlsafe.compare.verdicts.results import STEPS, table_text
from rlsafe.config import RunConfig, UserError, load_run
from rlsafe.config.files import read_whole, run_record, write_json, write_text
from rlsafe.config.lock import hold, releasing
from rlsafe.config.reads import AT_STEPS, EVALUATION, check_read
from rlsafe.engine.record import checkpoint
from rlsafe.evaluate import Evaluation, evaluate_run, gather, reader_of
from rlsafe.evaluate.commands.command import as_messages, load_sampler, named_sets, resolve
from rlsafe.evaluate.measure.hashing import digest
from rlsafe.types import BackgroundJudge, RunError

if TYPE_CHECKING:
    from rich.table import Table

TABLE, KEY = "steps.csv", "key.json"
NOT_THE_ANSWERS = {
    "model": {"gradient_checkpointing", "train_thinking", "trust_remote_code"},
    "sampler": {"urls", "adapter_dir", "patience", "gpu_memory", "max_num_seqs", "self_test", "max_gap"},
}
"""Settings of model and sampler that answers do not depend on: after a change of one, what is measured stays so."""
COLUMNS = (
    "step,general_misaligned,general_incoherent,indomain_misaligned,indomain_incoherent,narrow_score,general_n,indomain_n"
).split(",")
Say = Callable[[str], None]


@dataclass
class Steps:
    """One run's evaluations by step; the last one is the finished run's own, where it has one. out: its directory. edits: why
    earlier steps are not what the run would have ended with there, if so."""

    out: Path
    evaluations: dict[int, Evaluation]
    edits: str | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [_row(step, one) for step, one in sorted(self.evaluations.items())]

    @property
    def caption(self) -> str | None:
        return f"{self.edits}: before its last step this one has weights without that" if self.edits else None

    def table(self) -> Table:
        """For the terminal, in percent."""
        from rich.table import Table

        heads = [f"{name.replace('_', ' ')} %" for name in COLUMNS[1:5]]
        shown = Table("step", *heads, "answers", title=str(self.out), caption=self.caption)
        for row in self.rows:
            rates = ["-" if row[name] is None else f"{100 * row[name]:.1f}" for name in COLUMNS[1:5]]
            shown.add_row(str(row["step"]), *rates, f"{row['general_n'] or 0} + {row['indomain_n'] or 0}")
        return shown


def _row(step: int, one: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"step": step}
    for name in ("general", "indomain"):
        if rates := one.sets.get(name):
            row |= {
                f"{name}_misaligned": rates.misaligned,
                f"{name}_incoherent": rates.incoherent,
                f"{name}_n": rates.n,
            }
    return row | {"narrow_score": one.narrow.score if one.narrow else None}


def evaluate_steps(
    target: str | Path,
    steps: str = "all",
    questions: Sequence[str | Path] = (),
    judge: str | None = None,
    overrides: Sequence[str] = (),
    say: Say = lambda line: None,
) -> list[Steps]:
    """Measure the checkpoints of a run directory, or of every narrow run in a comparison directory.

    steps: "all", or numbers as in "100,200". Only what the verdicts by level need is asked: general and in-domain questions (and
    `evaluate.narrow`), without cues, benign tasks or a scaled adapter. UserError without checkpoints, for an unknown step, and for
    an override that is not read here.
    """
    check_read(overrides, EVALUATION, "an evaluation")
    check_read(overrides, AT_STEPS, "an evaluation with --steps", "leave it out: only the finished run is asked by it")
    where = Path(target)
    if (where / "comparison.json").is_file():
        directory = Directory(where)
        runs = [directory.cell(id) for id in directory.plan()["cells"] if directory.record(id).get("kind") == "narrow"]
        runs = [run for run in runs if checkpoint.saved(run / "checkpoints")]
        if not runs:
            raise UserError(
                f"{where}: no narrow run kept checkpoints; run the comparison with checkpoint.every=N checkpoint.keep=K"
            )
        return [_one(run, steps, questions, judge, overrides, say) for run in runs]
    return [_one(where, steps, questions, judge, overrides, say)]


@releasing
def _one(
    target: Path, steps: str, questions: Sequence[str | Path], judge: str | None, overrides: Sequence[str], say: Say
) -> Steps:
    config, run = resolve(target, judge, overrides)
    if run is None:
        raise UserError(f"{target}: --steps needs a run directory with checkpoints")
    done = run_record(run).get("steps")
    saved = _chosen(run, steps)
    hold(run)
    less: dict[str, Any] = {"cue": None, "cues": {}, "benign": [], "scale": []}
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=less)})
    other = _other_settings(config, load_run(run / "config.yaml"))
    keys = {step: _key(config, path, questions, other) for step, path in saved.items()}
    todo = [step for step in saved if (read_whole(_place(run, step) / KEY) or {}).get("key") != keys[step]]
    if todo:
        _measure(config, run, {step: saved[step] for step in todo}, keys, questions, say)
    found = {step: Evaluation.load(_place(run, step)) for step in saved}
    if done and done not in found and (run / "evaluation.json").is_file():
        found[int(done)] = Evaluation.load(run)
    measured = Steps(run, found, edited(config))
    write_text(run / TABLE, table_text(COLUMNS, measured.rows))
    return measured


def _place(run: Path, step: int) -> Path:
    return run / STEPS / f"step-{step:06d}"


def _chosen(run: Path, steps: str) -> dict[int, Path]:
    """Step -> checkpoint."""
    saved = {int(path.name.removeprefix("step-")): path for path in checkpoint.saved(run / "checkpoints")}
    if not saved:
        raise UserError(f"{run}: kept no checkpoints; train with checkpoint.every=N checkpoint.keep=K")
    if steps == "all":
        return saved
    wanted = [word.strip() for word in steps.split(",")]
    for word in wanted:
        if not word.isdigit() or int(word) not in saved:
            raise UserError(f"--steps {word}: expected all, or some of {', '.join(map(str, saved))}")
    return {int(word): saved[int(word)] for word in wanted}


def _other_settings(config: RunConfig, run: RunConfig) -> dict[str, Any]:
    """What decides the answers and is not as in the run's own settings: of its model, and of its sampler."""
    found: dict[str, Any] = {}
    for section, aside in NOT_THE_ANSWERS.items():
        now, then = (getattr(one, section).model_dump(mode="json", exclude=aside) for one in (config, run))
        found |= {f"{section}.{name}": value for name, value in now.items() if value != then[name]}
    return found


def _key(config: RunConfig, path: Path, questions: Sequence[str | Path], other: dict[str, Any]) -> str:
    """A digest of the checkpoint and of everything that it is measured with. other: settings that the run was not trained with."""
    settings = {
        "evaluate": config.evaluate.model_dump(mode="json"),
        "questions": [str(one) for one in questions],
        **other,
    }
    sums = (path / checkpoint.SUMS).read_bytes()
    return hashlib.sha256(digest(settings).encode() + sums).hexdigest()


def _measure(
    config: RunConfig,
    run: Path,
    saved: dict[int, Path],
    keys: dict[int, str],
    questions: Sequence[str | Path],
    say: Say,
) -> None:
    """One model and one sampler for all checkpoints."""
    material = gather(config.evaluate, extra=named_sets(questions))
    if not material.asks:
        raise UserError(f"{run}: nothing is asked; --steps needs evaluate.general or evaluate.indomain")
    if isinstance(material.judge, BackgroundJudge):
        material.judge.check(first=True)
    if material.narrow:
        material.narrow.check()
    sampler, policy = load_sampler(config, None, as_messages(chain(*material.questions.values())), "before evaluation")
    reader = reader_of(config, policy, read_back=True)
    for step, path in saved.items():
        say(f"{run.name}: step {step}")
        policy.load_state_dict(checkpoint.load(path)["policy"])
        sampler.sync(policy)
        out = _place(run, step)
        evaluate_run(
            sampler, policy.tokenizer, config.evaluate, out, progress=say, material=material, weights=keys[step],
            reader=reader,
        )  # fmt: skip
        write_json(out / KEY, {"key": keys[step], "step": step, "checkpoint": path.name})


def require_scores(measured: Sequence[Steps]) -> None:
    """RunError when half or more of the answers of some step have no score; all that was written stays."""
    for one in measured:
        for step, evaluation in one.evaluations.items():
            if line := evaluation.mostly_unscored:
                raise RunError(f"{one.out}, step {step}: {line}")
