"""The Typer application that the commands' modules register with, and the arguments that several of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rlsafe import __version__
from rlsafe.config.errors import UserError
from rlsafe.config.lock import is_first_rank, is_one_of_several
from rlsafe.progress import show

app = typer.Typer(
    help="Train language models under in-training defenses against emergent misalignment, and see which one to ship.",
    epilog="Begin with: rlsafe train configs/organism/sft_medical.yaml --dry-run. Tutorials: docs/tutorials/. Settings: rlsafe config.",
    add_completion=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.PATH=VALUE",
        help="settings to change, e.g. optim.lr=1e-4 'defenses=[{kl: {weight: 0.3}}]'; rlsafe config lists them",
    ),
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="where to write; default: runs/CONFIG")]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="show the traceback of an error (before or after a command)")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        show(f"rlsafe {__version__}")
    elif context.invoked_subcommand is None:
        show(context.get_help())
    elif context.invoked_subcommand != "train" and is_one_of_several():
        _one_process(context.invoked_subcommand)


def _one_process(command: str) -> NoReturn:
    """UserError, said by the first of several processes: each would do the whole work, and write over the others'."""
    if not is_first_rank():
        raise typer.Exit(2)
    raise UserError(
        f"accelerate launch: rlsafe {command} works in one process; start it without accelerate launch (rlsafe train uses "
        "several, for its evaluation too)"
    )
