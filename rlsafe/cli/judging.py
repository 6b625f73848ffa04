"""Commands about judges: is one to be trusted, do two agree."""

from __future__ import annotations

import json as jsons
from pathlib import Path
from typing import Annotated

import typer

from rlsafe.arguments import names
from rlsafe.cli.app import app
from rlsafe.progress import show

judge_app = typer.Typer(help="Judges: test one on labelled answers, compare two.")
app.add_typer(judge_app, name="judge")

Json = Annotated[bool, typer.Option("--json", help="print the same for programs")]


@judge_app.command("check")
def judge_check(
    judge: Annotated[
        list[str],
        typer.Argument(
            metavar="JUDGE", help="organism, openai:MODEL[@URL], judge.yaml, a mapping; and KEY=VALUE settings"
        ),
    ],
    protocols: Annotated[
        str, typer.Option(metavar="A,B", help="others to try beside its own: number, trie, letters, text")
    ] = "text",
    json: Json = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="also write check.json there")] = None,
) -> None:
    """Test a judge on answers with known labels.

    Prints AUROC, kappa, false alarms, effects of length and place, repeatability and cost, and keeps them for every report.
    """
    from rlsafe.evaluate.commands.judging import check_judge, check_tables, mostly_unscored
    from rlsafe.types import RunError

    record = check_judge(judge, out, names("--protocols", protocols) or (), None if json else show)
    if json:
        print(jsons.dumps(record, indent=2, ensure_ascii=False))
    else:
        for part in check_tables(record):
            show(part)
    if line := mostly_unscored(record):
        raise RunError(line)


@judge_app.command("compare")
def judge_compare(
    first: Annotated[str, typer.Argument(metavar="A", help="a judge, or saved: the scores that the answers have")],
    second: Annotated[str, typer.Argument(metavar="B", help="likewise")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run, an evaluation or a comparison directory")],
    json: Json = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="also write compare.json there")] = None,
) -> None:
    """Two judges on the same saved answers.

    Prints kappa, agreement, and the rate that each of them gives.
    """
    from rlsafe.evaluate.commands.judging import compare_judges, compare_table

    found = compare_judges(first, second, run, out)
    if json:
        print(jsons.dumps(found, indent=2, ensure_ascii=False))
    else:
        show(compare_table(found))
