"""How cost grows: step time with tokens, memory with steps, comparison time with cells; each as a plot."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import world
from race import Contender, race
from table import Result

COMPARE = Path(__file__).resolve().parents[2] / "configs" / "organism" / "compare.yaml"


def growth(scratch: Path, quick: bool, rounds: int) -> Result:
    """On the organism, one thread."""
    result = Result("growth", ["what", "at", "value"])
    model = world.model_dir("organism", scratch)
    _step_time(result, scratch, model, [1, 4] if quick else [1, 2, 4, 8, 16], rounds)
    _memory(result, scratch, model, 200 if quick else 1000)
    if not quick:
        _cells(result, scratch, [1, 5, 9])
    return result


def _step_time(result: Result, scratch: Path, model: str, thousands: Sequence[int], rounds: int) -> None:
    rows = world.varied_rows(2000)
    contenders = [
        Contender(
            f"{n}k tokens",
            "contenders:rlsafe_run",
            # a row has about 145 tokens
            {"tree": world.run_tree(model, "", batch={"sft_rows": 7 * n, "grpo_prompts": 1}), "rows": rows},
        )
        for n in thousands
    ]
    lanes = [lane for lane in race(contenders, rounds, warm=1) if result.took_part("organism", lane)]
    points = [(lane.median("tokens"), lane.median("wall")) for lane in lanes]
    for lane, (tokens, seconds) in zip(lanes, points, strict=True):
        result.row(["SFT step, seconds", f"{tokens:.0f} tokens", f"{seconds:.3f}"], lane)
    _finish(result, scratch, "step-time", "tokens of a step", "seconds", points)
    rates = [seconds / tokens for tokens, seconds in points]
    result.goal(
        "step time per token, largest step over smallest", rates[-1] / rates[0], "<= 1.1", rates[-1] <= 1.1 * rates[0]
    )


def _memory(result: Result, scratch: Path, model: str, steps: int) -> None:
    tree = world.run_tree(model, "", batch={"sft_rows": 2, "grpo_prompts": 1})
    (lane,) = race(
        [Contender("rlsafe", "contenders:rlsafe_run", {"tree": tree, "rows": world.rows("medical/bad")})], steps, 20
    )
    if not result.took_part("organism", lane):
        return
    points = [(float(step), unit["rss"]) for step, unit in enumerate(lane.units)]
    tenth = max(1, steps // 10)
    first, last = (
        statistics.median(unit["rss"] for unit in part) for part in (lane.units[:tenth], lane.units[-tenth:])
    )
    result.row(["memory, MiB", f"first {tenth} steps", f"{first:.0f}"])
    result.row(["memory, MiB", f"last {tenth} of {steps} steps", f"{last:.0f}"])
    _finish(result, scratch, "memory", "step", "resident MiB", points)
    result.goal(f"memory over {steps} steps, last tenth over first", last / first, "<= 1.01", last <= 1.01 * first)


def _cells(result: Result, scratch: Path, counts: Sequence[int]) -> None:
    """Short SFT cells of different seeds in one process; the time of no cell (start, report) is the line's offset."""
    points = []
    for count in counts:
        seeds = ",".join(map(str, range(count)))
        command = [
            sys.executable, "-m", "rlsafe", "compare", str(COMPARE), "schedule.steps=20", "track.every=0",
            "evaluate.samples=1", "aligned=null", "--defenses", "none", "--paths", "sft", "--seeds", seeds, "--jobs", "1",
            "--out", str(scratch / f"cells-{count}"),
        ]  # fmt: skip
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            result.notes.append(f"comparison of {count} cells failed: {done.stderr.strip().splitlines()[-1][:200]}")
            return
        points.append((float(count), time.perf_counter() - began))
        result.row(["comparison, seconds", f"{count} cells", f"{points[-1][1]:.1f}"])
    _finish(result, scratch, "comparison-time", "cells", "seconds", points)
    if len(points) > 2:
        steps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(points, points[1:], strict=False)]
        result.goal(
            "seconds per further cell, last over first", steps[-1] / steps[0], "<= 1.3", steps[-1] <= 1.3 * steps[0]
        )


def _finish(result: Result, scratch: Path, name: str, x: str, y: str, points: Sequence[tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None)
    axes.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(scratch / f"{name}.png", dpi=150)
    pyplot.close(figure)
    result.plots.append(str(scratch / f"{name}.png"))
