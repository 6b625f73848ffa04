"""`rlsafe versus DIR A B`: is one defense better than another? Their difference on each path, with its interval."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from rlsafe.compare.verdicts.arms import labelled
from rlsafe.compare.verdicts.differences import QUANTITIES, Difference, apart, arms_of, sampled
from rlsafe.compare.verdicts.looks import Looks
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.verdicts import judge_defenses
from rlsafe.config import UserError
from rlsafe.evaluate.statistics import LEVEL
from rlsafe.types import pick


def versus(directory: str | Path, one: str, other: str) -> dict[str, dict[str, Difference | None]]:
    """{path table: {criterion: difference, None where there is no clear effect to share}}.

    UserError when `directory` is no comparison, or a defense is unknown or was run on no path beside the other.
    """
    results = load(directory)
    tables = judge_defenses(results)
    known = list(dict.fromkeys(label for table in tables for label in table.defenses if label != "none"))
    for label in (one, other):
        pick("defense of this comparison", label, known)
    if one == other:
        raise UserError(f"{one} twice: name two defenses")
    found, looks = {}, Looks.load(results.directory.out)
    for table in tables:
        if {one, other} <= set(table.defenses):
            cells = labelled(results, table.model, table.path)
            two = [(table.key, label) for label in (one, other)]
            found[table.key] = {
                criterion: apart(sampled(arms_of(cells, rate), looks)(*two), one, other, criterion == "prevents_em")
                for criterion, (rate, _) in QUANTITIES.items()
            }
    if not found:
        raise UserError(f"{one} and {other} were run on no path together")
    return found


def versus_table(found: dict[str, dict[str, Difference | None]], one: str, other: str) -> Table:
    """The differences in points, for the terminal."""
    every = [d for of_criteria in found.values() for d in of_criteria.values() if d]
    looked = any(d.level != LEVEL for d in every)
    heading = "difference (level of its look), points" if looked else f"difference ({100 * LEVEL:.0f}%), points"
    table = Table("path", "share of what the undefended run shows", one, other, heading, "")
    for path, of_criteria in found.items():
        for criterion, difference in of_criteria.items():
            words = QUANTITIES[criterion][1]
            if difference is None:
                table.add_row(path, words, "", "", "", "no clear effect to share")
                continue
            d = difference
            shares = [f"{100 * share:.1f}%" for share in (d.first, d.second)]
            interval = f"{100 * d.low:+.1f} to {100 * d.high:+.1f}" + (f", {100 * d.level:.1f}%" if looked else "")
            table.add_row(path, words, *shares, f"{100 * d.value:+.1f} ({interval})", d.word)
    return table
