"""Commands about one run: train, evaluate, ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlsafe.cli.app import Overrides, app
from rlsafe.config.errors import UserError
from rlsafe.progress import show

if TYPE_CHECKING:
    from rlsafe.evaluate import Evaluation


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file of one run")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where to write; default: runs/CONFIG-DATE-TIME")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in --out")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="print the resolved config, the plan, memory, time and judge calls; train nothing"
        ),
    ] = False,
) -> None:
    """Train one model: SFT, GRPO or both, under any defenses."""
    from rlsafe.engine.run.life import train as run_train
    from rlsafe.progress import run_bar

    with run_bar() as bar:
        run = run_train(
            config, overrides or [], out=out, resume=resume, overwrite=overwrite, dry_run=dry_run,
            progress=bar.stepped, on_start=bar.started,
        )  # fmt: skip
    if not run.is_main:  # one of several processes speaks
        return
    show(run.summary())
    if run.evaluation is not None:
        _show(run.evaluation)
        if not run.before:
            _scored(run.evaluation)


@app.command()
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="a run directory, a model directory or a model id")
    ],
    overrides: Overrides = None,
    questions: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="a question file; repeat for several")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="NAME", help="who scores: organism, static, openai:MODEL[@URL], judge.yaml")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where to write; default: RUN itself, or runs/evaluate-MODEL")
    ] = None,
    rejudge: Annotated[
        bool, typer.Option("--rejudge", help="score the saved answers of RUN again; sample nothing")
    ] = False,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="all|N,N",
            help="measure the checkpoints of RUN, or of every run of a comparison; then rlsafe report",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the judge calls and their cost; do nothing")
    ] = False,
) -> None:
    """Ask, judge and count: the rates of one model.

    Prints misaligned and incoherent rates with 95% intervals and writes evaluation.json and answers.csv.
    """
    from rlsafe import evaluate as room

    if steps is not None:
        if rejudge or dry_run or out:
            raise UserError("--steps writes to RUN/steps; leave --rejudge, --dry-run and --out out")
        return _evaluate_steps(target, steps, questions or [], judge, overrides or [])
    if rejudge and questions:
        raise UserError("--rejudge takes the saved answers as they are; leave --questions out")
    if dry_run:
        show(room.estimate(target, questions or [], judge, overrides or [], rejudge=rejudge).lines())
        return
    if rejudge:
        evaluation = room.rejudge(target, judge, overrides or [], out)
    else:
        evaluation = room.evaluate(target, questions=questions or [], judge=judge, overrides=overrides or [], out=out)
    _show(evaluation)
    _scored(evaluation)


def _evaluate_steps(target: str, steps: str, questions: list[str], judge: str | None, overrides: list[str]) -> None:
    """`evaluate --steps`: a table for each run, of its checkpoints. RunError when half or more of some answers have no score."""
    from rlsafe.compare.run.steps import evaluate_steps, require_scores

    measured = evaluate_steps(target, steps, questions, judge, overrides, lambda line: typer.echo(line, err=True))
    for one in measured:
        show(one.table())
    require_scores(measured)


def _show(evaluation: Evaluation) -> None:
    for table in evaluation.tables():
        show(table)
    show(evaluation.notes or None)


def _scored(evaluation: Evaluation) -> None:
    """RunError, so exit code 1, when half or more of the answers have no score; all that was written stays."""
    if line := evaluation.mostly_unscored:
        from rlsafe.types import RunError

        raise RunError(line)


@app.command()
def ask(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL", help="run directories, model directories, model ids; and KEY.PATH=VALUE"
        ),
    ],
    question: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", metavar="TEXT", help="repeat for several; default: a few of the run's own"),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="a system prompt")] = None,
    samples: Annotated[
        int, typer.Option("-n", "--samples", min=1, metavar="N", help="answers of each model to each question")
    ] = 1,
) -> None:
    """Talk to models: the same questions to each.

    Answers stand below each other. A judge that asks nobody else scores the answers.
    """
    from rlsafe.evaluate.commands.talking import talk

    # A cell of a sweep has `=` in its name, too: sft--kl[weight=0.1]--seed0
    settings = [target for target in targets if "=" in target and not Path(target).exists()]
    models = [target for target in targets if target not in settings]
    if not models:
        raise UserError("nobody to ask: expected a run directory or a model")
    show(talk(models, question or [], system, samples, settings))
