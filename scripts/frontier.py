#!/usr/bin/env python3
"""The frontier of the defenses as one picture, from a results file in docs/measured.

    .venv/bin/python scripts/frontier.py all docs/images/frontier.png

A panel for each path: how much of the narrow behaviour a defense keeps, against how much of emergent misalignment it prevents, both
as a share of the undefended run's. A dashed line joins the defenses that no other one beats in both. What lies below the panel has a
triangle at its edge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rlsafe.compare.verdicts.sweeps import front_line

ROOT = Path(__file__).resolve().parents[1]
FRONT, OTHER = "#0b6e4f", "#6b7280"
LOWEST, APART = -0.1, 0.047  # of the panel
COLUMNS = ((0.7, 1.12, (1.13, 1.12)), (-1, 0.4, (0.42, 0.66)))
"""Points whose share kept lies between the first two numbers have their labels in a column, which begins at the third."""
NAMES = {"sft": "supervision (SFT)", "grpo": "reward (GRPO)", "mixed": "mixed"}


def points(rows: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """label -> (narrow kept, prevented), each a share of what `none` shows, for defenses that were judged."""
    found = {}
    for label, row in rows.items():
        kept, prevented = (row["verdicts"].get(name, {}).get("value") for name in ("keeps_narrow", "prevents_em"))
        if label not in ("none", "untrained", "aligned") and kept is not None and prevented is not None:
            found[label] = (kept, prevented)
    return found


def drawn(paths: dict[str, Any]) -> Figure:
    """A panel for each path, with the same axes."""
    figure = Figure(figsize=(6.4 * len(paths), 6.4), layout="constrained")
    for axes, (path, rows) in zip(
        figure.subplots(1, len(paths), sharey=True, squeeze=False)[0], paths.items(), strict=True
    ):
        shares = points(rows)
        front = front_line(shares, (1, 1))
        axes.plot(
            *zip(*(shares[label] for label in front), strict=True),
            color=FRONT,
            linewidth=1,
            linestyle="--",
            zorder=1,
        )
        for label, (kept, prevented) in shares.items():
            color, mark = FRONT if label in front else OTHER, "o" if prevented >= LOWEST else "v"
            axes.plot(kept, max(LOWEST, prevented), mark, color=color, markersize=6, zorder=3)
        _labels(axes, shares, front)
        axes.set_title(NAMES.get(path, path), loc="left", fontsize=11)
        axes.set_xlabel("narrow behaviour kept")
        axes.set_xlim(-0.06, 1.5)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.set_ylim(LOWEST - 0.03, 1.12)
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.axes[0].set_ylabel("emergent misalignment prevented")
    return figure


def _labels(axes: Any, shares: dict[str, tuple[float, float]], front: list[str]) -> None:
    """Names beside their points; those of a crowd in a column, as high as their points where there is room."""
    places = {label: (kept + 0.03, max(LOWEST, prevented)) for label, (kept, prevented) in shares.items()}
    for low, high, (column, top) in COLUMNS:
        crowd = sorted((one for one in shares if low < shares[one][0] <= high), key=lambda one: -shares[one][1])
        last = top
        for number, label in enumerate(crowd):
            room = LOWEST + APART * (len(crowd) - number - 1)  # for those that follow
            last = max(min(last - APART, shares[label][1]), room)
            places[label] = (column, last)
    for label, place in places.items():
        point = shares[label][0], max(LOWEST, shares[label][1])
        line = {"arrowstyle": "-", "color": "#9ca3af", "linewidth": 0.5, "relpos": (0, 0.5)}
        far = abs(place[1] - point[1]) > 0.02 or place[0] - point[0] > 0.04
        axes.annotate(
            label, point, place, va="center", fontsize=9, color=FRONT if label in front else "#374151", zorder=4,
            arrowprops=line if far else None,
        )  # fmt: skip


def main(words: list[str]) -> None:
    if len(words) != 2:
        sys.exit("usage: scripts/frontier.py NAME PICTURE")
    measured = json.loads((ROOT / "docs" / "measured" / f"{words[0]}.json").read_text("utf-8"))
    drawn(measured["paths"]).savefig(words[1], dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
