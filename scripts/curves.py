#!/usr/bin/env python3
"""What training logged in a comparison, step by step, as numbers and as one picture.

    .venv/bin/python scripts/curves.py RUN PATH NAME

writes docs/measured/NAME-curves.json (quantity -> defense -> [step, value]; means over windows where a quantity has more than twenty
values) and docs/images/NAME-curves.png, a panel for each quantity and a line for each defense.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from rlsafe.compare.report.pages import curve, smoothed
from rlsafe.compare.verdicts.results import Results, load

ROOT = Path(__file__).resolve().parents[1]
QUANTITIES = {
    "reward": "mean reward of the completions",
    "kl": "KL to the untrained model on probe answers, nats/token",
    "entropy": "entropy of the completions, nats/token",
    "sampler_gap": "gap of sampler and trainer, nats/token",
}
COLORS = ("#111827", "#2563eb", "#b45309", "#0b6e4f", "#be185d", "#6d28d9", "#6b7280")
POINTS = 20

Curves = dict[str, dict[str, list[tuple[float, float]]]]


def logged(results: Results, path: str) -> Curves:
    """quantity -> defense -> points; without what no cell logged."""
    labels = dict.fromkeys(cell.defense for cell in results.cells if cell.path == path and cell.kind == "narrow")
    found: Curves = {}
    for quantity in QUANTITIES:
        for label in labels:
            cells = [
                cell for cell in results.cells if cell.kind == "narrow" and (cell.path, cell.defense) == (path, label)
            ]
            if points := smoothed(curve(cells, quantity), POINTS):
                found.setdefault(quantity, {})[label] = [(round(at, 2), round(value, 5)) for at, value, *_ in points]
    return found


def drawn(curves: Curves) -> Figure:
    """Two panels in a row."""
    figure = Figure(figsize=(11, 3.6 * -(-len(curves) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(curves) // 2), 2, squeeze=False).flat
    for axes, (quantity, lines) in zip(panels, curves.items(), strict=False):
        for color, (label, points) in zip(COLORS, lines.items(), strict=False):
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.4, label=label)
        axes.set_title(QUANTITIES[quantity], loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    return figure


def main(words: list[str]) -> None:
    if len(words) != 3:
        sys.exit("usage: scripts/curves.py RUN PATH NAME")
    run, path, name = words
    curves = logged(load(Path(run)), path)
    kept = ROOT / "docs" / "measured" / f"{name}-curves.json"
    lines = (
        f"  {json.dumps(quantity)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in of.items())
        + "\n  }"
        for quantity, of in curves.items()
    )
    kept.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    drawn(curves).savefig(ROOT / "docs" / "images" / f"{name}-curves.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
