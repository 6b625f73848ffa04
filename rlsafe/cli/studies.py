"""Commands about a comparison: run it, prepare its data, draw its report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlsafe.arguments import names, numbers
from rlsafe.cli.app import Out, Overrides, app
from rlsafe.progress import show

if TYPE_CHECKING:
    from rlsafe.compare import Comparison

Defenses = Annotated[
    str | None, typer.Option(metavar="A,B", help="e.g. none,kl,'kl&interleaving'; default: the config's")
]
Paths = Annotated[str | None, typer.Option(metavar="A,B", help="only these, e.g. sft,grpo; default: the config's")]
Cluster = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="an existing Ray cluster; default: this machine")
]
CellCpus = Annotated[float | None, typer.Option(metavar="N", help="Ray: CPUs of a cell; default: 1")]
CellGpus = Annotated[
    float | None, typer.Option(metavar="N", help="Ray: GPUs of a cell, 0.25 = four share one; default: 1, if any")
]
Relapse = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="then N undefended steps after each run: does it come back?")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the cells, their memory, steps and judge calls; run nothing")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="with --dry-run: the resolved config and all estimates as well")
]
Quick = Annotated[bool, typer.Option("--quick", help="the config's quick preset: small budgets")]


@app.command()
def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file of a comparison")],
    overrides: Overrides = None,
    defenses: Defenses = None,
    paths: Paths = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="e.g. 0,1,2 or 0-9; default: the config's")] = None,
    decide: Annotated[
        bool, typer.Option("--decide", help="add seeds at looks fixed in advance, until the verdicts are decided")
    ] = False,
    jobs: Annotated[int, typer.Option(min=0, metavar="N", help="cells at a time; 0 = what suits the machine")] = 0,
    relapse: Relapse = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="who runs the cells: local, ray")] = "local",
    address: Cluster = None,
    cell_cpus: CellCpus = None,
    cell_gpus: CellGpus = None,
    quick: Quick = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    out: Out = None,
) -> None:
    """Which defense to ship: run a grid and report.

    Trains and evaluates every cell of defenses x paths x seeds, prints the verdicts and writes report.html.

    Finished cells in --out are kept, so the same command goes on after an interruption.
    """
    grid: dict[str, Any] = {
        "defenses": names("--defenses", defenses),
        "paths": names("--paths", paths),
        "seeds": numbers("--seeds", seeds),
        "overrides": overrides or [],
        "quick": quick,
        "relapse": relapse,
        "jobs": jobs,
    }
    from rlsafe.compare import ray_cluster

    ray = ray_cluster(backend, address, cell_cpus, cell_gpus)
    if dry_run:
        from rlsafe.compare import dry_compare
        from rlsafe.compare.run.deciding import check_options

        check_options(config, grid["seeds"], grid["overrides"], quick, decide, ray)
        return show(dry_compare(config, **grid, verbose=verbose))
    from rlsafe.compare import compare as run_compare
    from rlsafe.compare import compare_decided

    run = compare_decided if decide else run_compare
    _tell(run(config, **grid, out=out, ray=ray))


def _tell(comparison: Comparison) -> None:
    """Print the verdicts, where the report is, and the cells that failed; exit code 1 when any did."""
    show(comparison.table())
    show(f"report: {comparison.report}")
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
    quick: Quick = False,
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
    show(selected.table(top))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a comparison directory")],
    latex: Annotated[bool, typer.Option("--latex", help="also write the tables as LaTeX")] = False,
) -> None:
    """Redraw report.html from the results on disk."""
    from rlsafe.compare import draw_report as draw

    show(f"report: {draw(directory, latex=latex)}")


@app.command()
def versus(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a comparison directory")],
    one: Annotated[str, typer.Argument(metavar="A", help="a defense")],
    other: Annotated[str, typer.Argument(metavar="B", help="another")],
) -> None:
    """Is one defense better than another?

    Their difference on each path, with its interval.
    """
    from rlsafe.compare import versus as compare_two
    from rlsafe.compare.report.versus import versus_table

    show(versus_table(compare_two(directory, one, other), one, other))
