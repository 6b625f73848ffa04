"""What a run left as tables (pandas) and curves (matplotlib), for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import UserError, nearest
from rlsafe.config.files import read_lines

if TYPE_CHECKING:
    from pandas import DataFrame

CURVES = ("loss", "reward", "kl", "coherence", "misaligned_general", "misaligned_indomain")


def metrics(records: Sequence[Mapping[str, Any]]) -> DataFrame:
    """One row for each step's record."""
    from pandas import DataFrame

    return DataFrame(list(records), columns=list(dict.fromkeys(name for record in records for name in record)))


def samples(out: Path) -> DataFrame:
    """RUN/samples.jsonl; without any rows when nothing was sampled."""
    from pandas import DataFrame

    return DataFrame(read_lines(out / "samples.jsonl"))


def answers(out: Path) -> DataFrame:
    """RUN/answers.csv. UserError when the run was not evaluated."""
    from pandas import read_csv

    file = out / "answers.csv"
    if not file.is_file():
        raise UserError(f"{file}: no such file; `rlsafe evaluate {out}` writes it")
    texts = {"question_id": str, "question": str, "answer": str, "cue": str, "system": str}
    return read_csv(file, dtype=texts, keep_default_na=False, na_values={"aligned": [""], "coherent": [""]})


def plot(runs: Mapping[str, DataFrame], names: Sequence[str] = ()) -> Any:
    """A matplotlib Figure: a panel for each number, a line for each run. UserError for a number that no run has."""
    from matplotlib.ticker import MaxNLocator

    has = list(dict.fromkeys(name for frame in runs.values() for name in frame.select_dtypes("number")))
    for name in names:
        if name not in has:
            raise UserError(f"plot: no number {name!r} was measured{nearest(name, has)}")
    chosen = [*names] or [name for name in CURVES if name in has]
    if not chosen:
        raise UserError("plot: there is nothing to draw: no step was run")

    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = figure(4.2 * columns, 2.8 * rows)
    panels = list(sheet.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, chosen, strict=False):
        for label, frame in runs.items():
            if name in frame:
                line = frame[["step", name]].dropna()
                axes.plot(line["step"], line[name], label=label, marker="o" if len(line) < 30 else None, markersize=3)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        sheet.legend(
            *sheet.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(runs)), fontsize=8
        )
    return sheet


def figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches that a notebook shows by itself, whatever its backend."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            self.savefig(buffer := BytesIO(), format="png", dpi=100)
            return buffer.getvalue()

    return Shown(figsize=(width, height), layout="constrained")
