"""The report's charts: matplotlib SVG, inlined, with the page's own colours and font.

Colours are written as placeholders and replaced by CSS variables, so that one drawing fits light and dark mode. Labels stay
text, so they can be selected, searched and read aloud. The report also has the numbers of every chart in a table.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import Any, TypeVar

from markupsafe import Markup

from rlsafe.compare.verdicts.arms import Rate

INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule", PAPER: "--paper"}
_SERIES = 12
_MARKERS = "oD^vPXp<>hd"  # without the square of `none`; one fewer than the colours, so that (colour, marker) pairs repeat late


@dataclass(frozen=True)
class Look:
    """Colour and marker of a label, the same in every chart and legend."""

    color: str
    marker: str
    css: str


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """References are grey, `none` is ink, defenses take the series colours in order."""
    chosen, index = {}, 0
    for label in labels:
        if label in ("untrained", "aligned"):
            chosen[label] = Look(MUTED, "|" if label == "untrained" else "x", "var(--muted)")
        elif label == "none":
            chosen[label] = Look(INK, "s", "var(--ink)")
        else:
            number = index % _SERIES
            chosen[label] = Look(f"#0a0b{number:02x}", _MARKERS[index % len(_MARKERS)], f"var(--s{number + 1})")
            index += 1
    return chosen


F = TypeVar("F", bound=Callable[..., Markup])


def drawing(draw: F) -> F:
    """Decorator: draw with fixed matplotlib settings, independent of the user's matplotlibrc. Text stays text in the SVG, and a
    `$` in a label (which comes from a config) does not start a formula."""

    @wraps(draw)
    def with_settings(*args: Any, **named: Any) -> Markup:
        from matplotlib import rc_context, rcParamsDefault

        own = {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, "svg.fonttype": "none"}
        with rc_context({**rcParamsDefault, **own, "svg.hashsalt": "rlsafe"}):
            return draw(*args, **named)

    return with_settings  # type: ignore[return-value]


def figure(width: float, height: float, left: float, bottom: float = 26) -> tuple[Any, Any]:
    """A bare figure in CSS pixels and its axes; fixed margins (a layout engine would take most of the drawing time)."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width / 72, height / 72), dpi=72)
    drawn.subplots_adjust(left=left / width, right=1 - 12 / width, bottom=bottom / height, top=1 - 8 / height)
    axes = drawn.add_subplot()
    axes.tick_params(colors=MUTED, labelsize=11, length=0, pad=5)
    for spine in axes.spines.values():
        spine.set(color=GRID, linewidth=1)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return drawn, axes


def svg(drawn: Any, name: str, description: str) -> Markup:
    """The figure as inline SVG. `name` keeps its ids apart from those of other figures on the page."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    prefix = re.sub(r"\W+", "-", name)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    for sentinel, variable in _VARIABLES.items():
        text = text.replace(sentinel, f"var({variable})")
    text = re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--s{int(found[1], 16) + 1})", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(description)}">',
        text,
        count=1,
    )
    return Markup(text)


def short(label: str, most: int = 28) -> str:
    """A label of at most `most` characters, shortened in the middle."""
    return label if len(label) <= most else f"{label[: most - 12]}\u2026{label[-11:]}"


def marker(axes: Any, x: float, y: float, look: Look, size: float) -> None:
    axes.plot([x], [y], look.marker, color=look.color, markersize=size, markeredgewidth=2 if look.marker in "|x" else 0)


def row_axes(axes: Any, labels: Sequence[str], top: float) -> None:
    """One row for each label, percent up to `top` (a fraction) across."""
    axes.set_yticks(range(len(labels)), [short(label) for label in labels])
    for tick in axes.get_yticklabels():
        tick.set_color(INK)
    axes.set_xlim(-2 * top, 104 * top)
    axes.set_ylim(-0.65, len(labels) - 0.4)
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")


@drawing
def whiskers(rates: Mapping[str, Rate], style: Mapping[str, Look], top: float, name: str, description: str) -> Markup:
    """One rate of every label: the mean, its 95% interval, and each seed as a faint dot. In percent, up to `top` (a
    fraction)."""
    labels = list(rates)[::-1]
    drawn, axes = figure(352, 42 + 26 * len(labels), left=18 + 6.1 * max(len(short(label)) for label in labels))
    axes.grid(False, axis="y")
    for position, label in enumerate(labels):
        rate, look = rates[label], style[label]
        ends = [100 * rate.low, 100 * rate.high]
        axes.plot(ends, [position] * 2, color=look.color, linewidth=2, solid_capstyle="round")
        for value in rate.seeds.values() if len(rate.seeds) > 1 else ():
            axes.plot(
                [100 * value], [position - 0.3], ".", color=look.color, alpha=0.5, markersize=5, markeredgewidth=0
            )
        marker(axes, 100 * rate.mean, position, look, 8)
    row_axes(axes, labels, top)
    return svg(drawn, name, description)


DASH = 5
"""Pixels of a dash and the gap behind it, in lines that mark a step."""


def taking_turns(marks: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
    """label -> (step, its index among the labels of that step, their number, at least two): their dashes alternate."""
    sharing = {step: [label for label in marks if marks[label] == step] for step in marks.values()}
    return {label: (step, sharing[step].index(label), max(2, len(sharing[step]))) for label, step in marks.items()}


@drawing
def curves(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    style: Mapping[str, Look],
    name: str,
    description: str,
    percent: bool,
    marks: Mapping[str, int] | None = None,
) -> Markup:
    """label -> (step, mean, lowest seed, highest seed): a line and the band of the seeds. marks: label -> a step at which a
    dashed line stands; lines at one step take turns, so that every colour is seen."""
    drawn, axes = figure(340, 220, left=48, bottom=42)
    scale = 100 if percent else 1
    for label, points in series.items():
        look = style[label]
        steps = [point[0] for point in points]
        mean, low, high = ([scale * point[k] for point in points] for k in (1, 2, 3))
        axes.fill_between(steps, low, high, color=look.color, alpha=0.13, linewidth=0)
        axes.plot(
            steps,
            mean,
            color=look.color,
            linewidth=1.8,
            marker=look.marker,
            markersize=4.5,
            markevery=max(1, len(steps) // 6),
            markeredgewidth=1 if look.marker in "|x" else 0,
        )
    if percent:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    for label, (step, turn, of) in taking_turns(marks or {}).items():
        axes.axvline(
            step, color=style[label].color, linewidth=1.3, linestyle=(DASH * turn, (DASH - 1, DASH * of - DASH + 1))
        )
    axes.set_xlabel("step", color=MUTED, fontsize=11)
    return svg(drawn, name, description)
