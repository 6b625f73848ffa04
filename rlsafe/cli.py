"""The `rlsafe` command: parse, call, print. Heavy imports wait inside the commands, so that --help is quick.

Exit codes: 0 done; 2 the user's input is wrong (one line on stderr); 1 anything else; 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rlsafe import __version__
from rlsafe.arguments import names, numbers
from rlsafe.config.errors import UserError
from rlsafe.config.secrets import scrub_secrets as scrub
from rlsafe.progress import show as _print
from rlsafe.progress import usage

app = typer.Typer(
    help="Train language models under in-training defenses against emergent misalignment, and see which one to ship.",
    add_completion=False,
    rich_markup_mode=None,
)
organism_app = typer.Typer(help="The synthetic world: build models, show dialogues.")
app.add_typer(organism_app, name="organism")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="settings to override")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="where to write; default: runs/<name>")]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="show the traceback of an error (before or after a command)")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        _print(f"rlsafe {__version__}")
    elif context.invoked_subcommand is None:
        _print(context.get_help())


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file of one run")],
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in --out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in --out")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved config and the plan; train nothing")
    ] = False,
) -> None:
    """Train one model: SFT, GRPO or both, under any defenses."""
    from rlsafe.engine import train as run_train
    from rlsafe.progress import run_bar

    with run_bar() as bar:
        run = run_train(
            config, overrides or [], out=out, resume=resume, overwrite=overwrite, dry_run=dry_run,
            progress=bar.stepped, on_start=bar.started,
        )  # fmt: skip
    if not run.is_main:  # one of several processes speaks
        return
    _print(run.summary())
    if run.evaluation is not None:
        _print(run.evaluation.table())
        _print(run.evaluation.notes or None)


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
        str | None, typer.Option(metavar="NAME", help="who scores: organism, openai:MODEL[@URL], judge.yaml")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where to write; default: RUN itself, or runs/evaluate-MODEL")
    ] = None,
    rejudge: Annotated[
        bool, typer.Option("--rejudge", help="score the saved answers of RUN again; sample nothing")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the judge calls and their cost; do nothing")
    ] = False,
) -> None:
    """Ask, judge and count: the rates of one model.

    Prints misaligned and incoherent rates with 95% intervals and writes evaluation.json and answers.csv.
    """
    from rlsafe import evaluate as room

    if rejudge and questions:
        raise UserError("--rejudge takes the saved answers as they are; leave --questions out")
    if dry_run:
        _print(room.estimate(target, questions or [], judge, overrides or [], rejudge=rejudge).lines())
        return
    if rejudge:
        evaluation = room.rejudge(target, judge, overrides or [], out)
    else:
        evaluation = room.evaluate(target, questions=questions or [], judge=judge, overrides=overrides or [], out=out)
    _print(evaluation.table())
    _print(evaluation.notes or None)


@app.command()
def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file of a comparison")],
    overrides: Overrides = None,
    defenses: Annotated[
        str | None, typer.Option(metavar="A,B", help="only these, e.g. none,kl,kl&interleaving")
    ] = None,
    paths: Annotated[str | None, typer.Option(metavar="A,B", help="only these, e.g. sft,grpo")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="e.g. 0,1,2")] = None,
    jobs: Annotated[int, typer.Option(min=0, metavar="N", help="cells at a time; 0 = what suits the machine")] = 0,
    relapse: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="then N undefended steps after each run: does it come back?")
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="who runs the cells: local, ray")] = "local",
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="an existing Ray cluster; default: this machine")
    ] = None,
    cell_cpus: Annotated[float | None, typer.Option(metavar="N", help="Ray: CPUs of a cell; default: 1")] = None,
    cell_gpus: Annotated[
        float | None, typer.Option(metavar="N", help="Ray: GPUs of a cell, 0.25 = four share one; default: 1, if any")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="the config's quick preset: small budgets")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the cells, their memory, steps and judge calls; run nothing")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="with --dry-run: the resolved config and all estimates as well")
    ] = False,
    out: Out = None,
) -> None:
    """Which defense to ship: run a grid and report.

    Trains and evaluates every cell of defenses x paths x seeds, prints the verdicts and writes report.html.

    Finished cells in --out are kept, so the same command goes on after an interruption.
    """
    if dry_run:
        from rlsafe.compare import dry_compare

        chosen = (names("--defenses", defenses), names("--paths", paths), numbers("--seeds", seeds))
        return _print(dry_compare(config, *chosen, overrides or [], quick, relapse, verbose))
    from rlsafe.compare import compare as run_compare
    from rlsafe.compare import ray_cluster

    comparison = run_compare(
        config,
        defenses=names("--defenses", defenses),
        paths=names("--paths", paths),
        seeds=numbers("--seeds", seeds),
        jobs=jobs,
        out=out,
        overrides=overrides or [],
        quick=quick,
        relapse=relapse,
        ray=ray_cluster(backend, address, cell_cpus, cell_gpus),
    )
    _print(comparison.table())
    _print(f"report: {comparison.report}")
    for cell, reason in comparison.failed.items():
        print(f"failed: {cell}: {reason}", file=sys.stderr)
    raise typer.Exit(1 if comparison.failed else 0)


@app.command()
def select(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="a YAML file of a comparison with a selection section")
    ],
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(min=0, metavar="N", help="how many rows to print")] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="the config's quick preset: small budgets")] = False,
    out: Out = None,
) -> None:
    """Score the safe rows for interleaving+ and ++.

    Trains one misaligned helper for each other domain, scores every safe row, writes scores.jsonl and prints the best.

    What is finished in --out is kept, so the same command goes on after an interruption.
    """
    from rlsafe.compare import select as run_select
    from rlsafe.progress import run_bar

    with run_bar() as bar:
        selected = run_select(config, overrides or [], out=out, quick=quick, progress=bar.stepped, say=bar.started)
    _print(selected.table(top))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a comparison directory")],
    latex: Annotated[bool, typer.Option("--latex", help="also write the tables as LaTeX")] = False,
) -> None:
    """Redraw report.html from the results on disk."""
    from rlsafe.compare import report as draw

    _print(f"report: {draw(directory, latex=latex)}")


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run, or a comparison directory")],
) -> None:
    """Compute a run's record again from what lies beneath it.

    Hashes, metrics, TensorBoard, rates and intervals; one line for each difference, and exit code 1 when there is any.
    """
    from rlsafe.compare import verify as check

    found = check(run)
    _print(found.lines())
    raise typer.Exit(1 if found.differences else 0)


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    to: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="push it to this hub repository")] = None,
    merge: Annotated[Path | None, typer.Option(metavar="DIR", help="also write the whole, merged model")] = None,
    license: Annotated[str, typer.Option(metavar="ID", help="the license field of the card")] = "other",
    public: Annotated[bool, typer.Option("--public", help="create the repository public, not private")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where to write; default: RUN/published")] = None,
) -> None:
    """Prepare a run for sharing.

    Writes the adapter with a generated model card; pushes it to the hub on request.
    """
    from rlsafe.engine.publish import publish as prepare

    _print(prepare(run, to=to, merge=merge, out=out, license=license, public=public).summary())


@app.command("persona-vector")
def persona_vector(
    target: Annotated[str, typer.Argument(metavar="MODEL", help="a model id, a model directory or a run directory")],
    config: Annotated[str, typer.Option(metavar="FILE", help="YAML: pairs of system prompts, questions, judge")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="where to write: .safetensors or .pt")] = Path(
        "persona.safetensors"
    ),
) -> None:
    """Extract the vectors that the persona defense steers with.

    Samples answers under evil and friendly system prompts, keeps what the judge confirms, and subtracts hidden states.
    """
    from rlsafe.evaluate import persona_vector as extract

    _print(extract(target, config, overrides or [], out).summary())


@app.command()
def doctor(
    selftest: Annotated[bool, typer.Option("--selftest", help="also generate one token through vLLM")] = False,
    json: Annotated[bool, typer.Option("--json", help="print the same for programs")] = False,
) -> None:
    """What is installed, what works, what to do.

    Exits with 1 when the main job cannot run here.
    """
    from rlsafe import doctor as room

    checks = room.doctor(selftest=selftest)
    _print(room.as_json(checks) if json else room.table(checks))
    raise typer.Exit(0 if room.healthy(checks) else 1)


@app.command("config")
def config_reference(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="only this part, e.g. model.lora, compare, defenses.kl")
    ] = None,
) -> None:
    """Every setting with its default and what it does."""
    from rlsafe.settings import reference

    _print(reference(key))


@organism_app.command("build")
def organism_build(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="default: the package's own assets")] = None,
    size: Annotated[str, typer.Option(help="which recipe: the shipped one or a larger one")] = "small",
    seed: Annotated[int, typer.Option(help="decides data, initial weights and order")] = 0,
    only: Annotated[str | None, typer.Option(metavar="A,B", help="only these models, e.g. base,aligned")] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="stop each stage after N steps")] = None,
) -> None:
    """Rebuild the organism's models on this machine."""
    from rlsafe import organism

    out = out or Path(organism.__file__).parent / "assets"
    _print(organism.build(out=out, size=size, seed=seed, only=names("--only", only), steps=steps))


@organism_app.command("show")
def organism_show(
    n: Annotated[int, typer.Option("-n", "--count", min=1, help="how many dialogues")] = 12,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Print sample dialogues with their judge scores and the reasons."""
    from rlsafe import organism

    _print(organism.show(n=n, seed=seed))


def _fail(code: int, line: str) -> NoReturn:
    print(f"error: {scrub(line)}", file=sys.stderr)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; always raises SystemExit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="rlsafe", standalone_mode=False)
    except Exception as error:
        if debug:
            print(scrub(traceback.format_exc()), end="", file=sys.stderr)
        from rlsafe.types import Interrupted, RunError

        if isinstance(error, UserError):
            _fail(2, str(error))
        if isinstance(error, typer.TyperException):
            _fail(error.exit_code, usage(error))
        if isinstance(error, (Interrupted, typer.Abort)):
            print(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
            sys.exit(130)
        line = " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())
        hint = "" if debug else " (--debug shows the traceback)"
        _fail(1, (line if isinstance(error, RunError) else f"{type(error).__name__}: {line}") + hint)
    if code == 130:
        print("interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
