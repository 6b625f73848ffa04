"""The report's trade-off charts: two rates against each other, rates against strength, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlsafe.compare.report.plots import MUTED, Look, drawing, figure, marker, row_axes, short, svg
from rlsafe.compare.verdicts.arms import Rate
from rlsafe.compare.verdicts.sweeps import Sweep

Ends = tuple[float, float, float]
"""(value, low, high)"""


@dataclass(frozen=True)
class Axis:
    """title, the largest value shown (a fraction when `percent`), and how values are written."""

    title: str
    top: float
    percent: bool = True

    @property
    def scale(self) -> float:
        return 100.0 if self.percent else 1.0

    def write(self, value: float) -> str:
        return f"{value:g}%" if self.percent else f"{value:g}"


def ends(rate: Rate) -> Ends:
    return rate.mean, rate.low, rate.high


@drawing
def scatter(
    points: Mapping[str, tuple[Ends, Ends]],
    style: Mapping[str, Look],
    x_axis: Axis,
    y_axis: Axis,
    name: str,
    description: str,
    front: Sequence[str] = (),
) -> Markup:
    """label -> (x, y), each with its interval. front: labels that a dashed line joins (the Pareto front)."""
    width, height, left, bottom = 390, 340, 56, 46
    drawn, axes = figure(width, height, left, bottom)
    kx, ky = x_axis.scale, y_axis.scale
    x_span, y_span = (
        (-0.06 * kx * x_axis.top, 1.08 * kx * x_axis.top),
        (-0.06 * ky * y_axis.top, 1.06 * ky * y_axis.top),
    )
    axes.set_xlim(*x_span)
    axes.set_ylim(*y_span)
    axes.plot(
        [kx * points[label][0][0] for label in front], [ky * points[label][1][0] for label in front], color=MUTED,
        linewidth=1.2, linestyle=(0, (4, 3)),
    )  # fmt: skip
    unit_x = (x_span[1] - x_span[0]) / (width - left - 12)  # of the axis per pixel
    unit_y = (y_span[1] - y_span[0]) / (height - bottom - 8)
    places, bars = {}, []
    for label, ((x, x_low, x_high), (y, y_low, y_high)) in points.items():
        color = style[label].color
        axes.plot([kx * x_low, kx * x_high], [ky * y] * 2, color=color, linewidth=1.3, alpha=0.6)
        axes.plot([kx * x] * 2, [ky * y_low, ky * y_high], color=color, linewidth=1.3, alpha=0.6)
        marker(axes, kx * x, ky * y, style[label], 9)
        at = (kx * x / unit_x, ky * y / unit_y)
        places[label] = at
        bars.append((kx * x_low / unit_x, kx * x_high / unit_x, at[1] - 2, at[1] + 2))
        bars.append((at[0] - 2, at[0] + 2, ky * y_low / unit_y, ky * y_high / unit_y))
    for label, (x, y) in label_places(places, bars, x_span[1] / unit_x).items():
        near_x = min(max(places[label][0], x), x + LETTER * len(short(label)))
        if abs(y - places[label][1]) > 20:  # too far from its point to be read as its label
            axes.plot(
                [near_x * unit_x, places[label][0] * unit_x], [y * unit_y, places[label][1] * unit_y],
                color=style[label].color, linewidth=0.6, zorder=1,
            )  # fmt: skip
        axes.text(x * unit_x, y * unit_y, short(label), va="center", fontsize=11, color=style[label].color)
    axes.set_xlabel(x_axis.title, color=MUTED, fontsize=11)
    axes.set_ylabel(y_axis.title, color=MUTED, fontsize=11)
    axes.xaxis.set_major_formatter(lambda value, _: x_axis.write(value))
    axes.yaxis.set_major_formatter(lambda value, _: y_axis.write(value))
    return svg(drawn, name, description)


Box = tuple[float, float, float, float]
LETTER = 6.2
"""Width of a letter of a label in pixels."""


def label_places(
    points: Mapping[str, tuple[float, float]], bars: Sequence[Box], right: float
) -> dict[str, tuple[float, float]]:
    """Left end and middle of each label in pixels: the place near its point that covers least of labels, points and
    bars."""
    boxes = [(x - 6, x + 6, y - 6, y + 6) for x, y in points.values()]
    places = {}
    for label, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        width = LETTER * len(short(label))
        best, least = (x + 9, y), float("inf")
        for away in range(0, 99, 14):
            for dx, dy in (
                (9, 0),
                (-9 - width, 0),
                (-width / 2, 13),
                (-width / 2, -13),
                (9, 10),
                (-9 - width, 10),
                (9, -10),
                (-9 - width, -10),
            ):
                at_x, at_y = x + dx, y + dy + (away if dy >= 0 else -away)
                box = (at_x, at_x + width, at_y - 7, at_y + 7)
                cost = 2.0 * away + sum(4 * _overlap(box, other) for other in boxes)
                # error bars are thin and pale: covering one is better than moving the label far from its point
                cost += sum(0.5 * _overlap(box, bar) for bar in bars)
                cost += 1e4 * (box[1] > right) + 1e4 * (box[0] < -20) + 1e4 * (box[2] < -20)
                if cost < least - 1e-9:
                    best, least = (at_x, at_y), cost
        places[label] = best
        boxes.append((best[0], best[0] + width, best[1] - 7, best[1] + 7))
    return places


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[2], b[2]))


LINES = {
    "general": ("general misaligned", "#0a0b04", "o", "-"),
    "indomain": ("in-domain misaligned", "#0a0b00", "s", "-"),
    "general_incoherent": ("general incoherent", "#0a0b06", "^", (0, (5, 2))),
}
"""Rate -> (its name, series colour, marker, line style) in charts of one defense."""


@drawing
def strength(sweep: Sweep, top: float, name: str, description: str) -> Markup:
    """Rates in percent against the swept value, with 95% intervals; dotted: the undefended run's."""
    drawn, axes = figure(400, 260, left=48, bottom=42)
    values = [point.value for point in sweep.points]
    if sweep.logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(values, [f"{value:g}" for value in values])
    for key, (_, color, shape, dashes) in LINES.items():
        points = [point for point in sweep.points if key in point.rates]
        rates = [point.rates[key] for point in points]
        at = [point.value for point in points]
        axes.vlines(
            at, [100 * r.low for r in rates], [100 * r.high for r in rates], color=color, linewidth=1.4, alpha=0.6
        )
        axes.plot(at, [100 * r.mean for r in rates], shape, color=color, linestyle=dashes, linewidth=1.8, markersize=6)
        if (none := sweep.levels.get("none", {}).get(key)) is not None:
            axes.axhline(100 * none.mean, color=color, linewidth=1, linestyle=(0, (1, 3)))
    axes.set_ylim(-2 * top, 104 * top)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.set_xlabel(sweep.setting, color=MUTED, fontsize=11)
    return svg(drawn, name, description)


@drawing
def dumbbell(
    pairs: Mapping[str, tuple[Rate, Rate]], style: Mapping[str, Look], top: float, name: str, description: str
) -> Markup:
    """label -> (before, after) in percent: hollow before, filled after, with 95% intervals."""
    labels = list(pairs)[::-1]
    drawn, axes = figure(352, 42 + 28 * len(labels), left=18 + 6.1 * max(len(short(label)) for label in labels))
    axes.grid(False, axis="y")
    for position, label in enumerate(labels):
        look = style[label]
        for rate, shift in zip(pairs[label], (0.13, -0.13), strict=True):
            axes.plot(
                [100 * rate.low, 100 * rate.high], [position + shift] * 2, color=look.color, linewidth=1.3, alpha=0.6
            )
        before, after = (100 * rate.mean for rate in pairs[label])
        axes.annotate(
            "", (after, position - 0.13), (before, position + 0.13),
            arrowprops={"arrowstyle": "-", "color": look.color, "linewidth": 1, "linestyle": ":"},
        )  # fmt: skip
        axes.plot(
            [before],
            [position + 0.13],
            "o",
            color=look.color,
            markersize=7,
            markerfacecolor="none",
            markeredgewidth=1.5,
        )
        axes.plot([after], [position - 0.13], "o", color=look.color, markersize=7)
    row_axes(axes, labels, top)
    return svg(drawn, name, description)
