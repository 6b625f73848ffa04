#!/usr/bin/env python3
"""The frontier of the defenses as one picture, from a results file in docs/measured.

    .venv/bin/python scripts/frontier.py all docs/images/frontier.png

A panel for each path: how much of the narrow behaviour a defense keeps, against how much of emergent misalignment it prevents, both
as a share of the undefended run's. A dashed line joins the defenses that no other one beats in both; a tail leads to what is still
prevented with the adapter scaled up, where the comparison measured that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rlsafe.compare.verdicts.sweeps import front_line
from rlsafe.evaluate.measure.evaluation import SCALED

ROOT = Path(__file__).resolve().parents[1]
FRONT, OTHER, TAIL = "#0b6e4f", "#6b7280", "#c2410c"
NAMES = {"sft": "supervision (SFT)", "grpo": "reward (GRPO)", "mixed": "mixed"}


def points(rows: dict[str, Any]) -> dict[str, tuple[float, float, float | None]]:
    """label -> (narrow kept, prevented, prevented with the adapter at its largest scale), each a share of what `none` shows as
    trained, for defenses under which something was learned."""
    none = rows["none"]["rates"]["general"]["mean"] - rows["untrained"]["rates"]["general"]["mean"]
    found = {}
    for label, row in rows.items():
        kept, prevented = (row["verdicts"].get(name, {}).get("value") for name in ("keeps_narrow", "prevents_em"))
        if label in ("none", "untrained", "aligned") or kept is None or prevented is None:
            continue
        scaled = sorted(name for name in row["rates"] if name.startswith(SCALED))
        hidden = None
        if scaled:
            largest, untrained = row["rates"][scaled[-1]]["mean"], rows["untrained"]["rates"]["general"]["mean"]
            hidden = 1 - (largest - untrained) / none
        found[label] = (kept, prevented, hidden)
    return found


def drawn(paths: dict[str, Any]) -> Figure:
    """A panel for each path, with the same axes."""
    figure = Figure(figsize=(6.2 * len(paths), 6.4), layout="constrained")
    for axes, (path, rows) in zip(
        figure.subplots(1, len(paths), sharey=True, squeeze=False)[0], paths.items(), strict=True
    ):
        shares = points(rows)
        front = front_line({label: (kept, prevented) for label, (kept, prevented, _) in shares.items()}, (1, 1))
        axes.plot(
            *zip(*((shares[label][:2]) for label in front), strict=True),
            color=FRONT,
            linewidth=1,
            linestyle="--",
            zorder=1,
        )
        for label, (kept, prevented, hidden) in shares.items():
            color = FRONT if label in front else OTHER
            if hidden is not None:
                axes.plot([kept, kept], [prevented, max(-0.1, hidden)], color=TAIL, linewidth=0.8, alpha=0.55, zorder=2)
            axes.plot(kept, prevented, "o", color=color, markersize=6, zorder=3)
        _labels(axes, shares, front)
        axes.set_title(NAMES.get(path, path), loc="left", fontsize=11)
        axes.set_xlabel("narrow behaviour kept")
        axes.set_xlim(-0.1, 1.3)
        axes.set_ylim(-0.12, 1.12)
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.axes[0].set_ylabel("emergent misalignment prevented")
    return figure


def _labels(axes: Any, shares: dict[str, tuple[float, float, float | None]], front: list[str]) -> None:
    """Names right of their points, moved down where two would overlap."""
    taken: list[tuple[float, float]] = []
    for label, (kept, prevented, _) in sorted(shares.items(), key=lambda item: -item[1][1]):
        y = prevented
        while any(abs(y - other_y) < 0.033 and abs(kept - other_x) < 0.34 for other_x, other_y in taken):
            y -= 0.008
        taken.append((kept, y))
        line = {"arrowstyle": "-", "color": OTHER, "linewidth": 0.4} if prevented - y > 0.02 else None
        axes.annotate(
            label, (kept, prevented), (kept + 0.022, y), va="center", fontsize=8.5, color=FRONT if label in front else "#374151",
            arrowprops=line, zorder=4,
        )  # fmt: skip


def main(words: list[str]) -> None:
    if len(words) != 2:
        sys.exit("usage: scripts/frontier.py NAME PICTURE")
    measured = json.loads((ROOT / "docs" / "measured" / f"{words[0]}.json").read_text("utf-8"))
    drawn(measured["paths"]).savefig(words[1], dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
