"""Time from the command to the first step, and of `import rlsafe` and `rlsafe --help`."""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from table import Result, middle

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "organism"
TRAIN = ["schedule.steps=1", "track.every=0", "evaluate.general=null", "evaluate.indomain=null"]


def startup(scratch: Path, quick: bool, rounds: int) -> Result:
    """Whole processes with warm file caches; the first run of each is left out."""
    result = Result("startup", ["what", "seconds", "of those engine start", "CPU seconds"])
    tool = str(Path(sys.executable).parent / "rlsafe")
    commands = {"import rlsafe": [sys.executable, "-c", "import rlsafe"], "rlsafe --help": [tool, "--help"]}
    for what, wanted in (("import rlsafe", 1.0), ("rlsafe --help", 0.5)):
        times = [_run(commands[what]) for _ in range(rounds + 1)][1:]
        walls = [wall for wall, _ in times]
        result.row([what, middle(walls), "", middle([cpu for _, cpu in times])])
        seconds = statistics.median(walls)
        result.goal(f"{what}, seconds", seconds, f"< {wanted}", seconds < wanted)
        result.measured.append({"what": what, "seconds": walls})
    for what, config, extra, wanted in (
        ("first SFT step", "sft_medical.yaml", [], 8.0),
        ("first GRPO step", "grpo_medical.yaml", ["schedule.phases=[{cycle: [grpo]}]"], 10.0),
    ):
        runs = [_first(scratch, config, extra) for _ in range(2 if quick else 4)][1:]
        rest = statistics.median(run["seconds"] - run["engine"] for run in runs)
        engine = [run["engine"] for run in runs]
        result.row(
            [what, middle([run["seconds"] for run in runs]), middle(engine), middle([run["cpu"] for run in runs])]
        )
        result.goal(f"{what}, seconds without the engine's start", rest, f"<= {wanted:.0f}", rest <= wanted)
        result.measured.append({"what": what, "runs": runs})
    return result


def _run(command: list[str]) -> tuple[float, float]:
    before, began = _children(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, _children() - before


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _first(scratch: Path, config: str, extra: list[str]) -> dict[str, float]:
    """Seconds from the command to the end of the first optimizer step, those of the engine's start, CPU seconds in all."""
    times, out = scratch / "times.json", scratch / "first-step"
    shutil.rmtree(out, ignore_errors=True)
    times.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(Path(__file__).with_name("first_step.py")),
        str(times),
        "train",
        str(CONFIGS / config),
    ]
    before, began = _children(), time.time()
    done = subprocess.run([*command, *TRAIN, *extra, "--out", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{config} failed:\n{done.stderr[-2000:]}")
    told = json.loads(times.read_text("utf-8"))
    return {"seconds": told["first"] - began, "engine": told["engine"], "cpu": _children() - before}
