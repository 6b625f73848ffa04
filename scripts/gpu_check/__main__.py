"""`scripts/gpu-check`: every check in a process of its own and with its own time limit; one table, one JSON record."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import checks
from checks import Missing

# What rlsafe imports on the way beyond torch and transformers; `--pack` copies those that are pure or small.
NEEDS = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "accelerate", "peft", "psutil", "jinja2", "pyyaml"),
    *("openai", "httpx2", "httpcore2", "jiter", "distro", "anyio", "sniffio", "tensorboard", "absl-py", "protobuf", "grpcio"),
    *("werkzeug", "docstring-parser", "bandit", "stevedore"),
    *("markdown", "tensorboard-data-server", "typer", "rich", "shellingham", "datasets", "dill", "multiprocess", "xxhash", "fsspec"),
    "bitsandbytes",
)  # fmt: skip
LIMITS = {"cli": 200, "update": 120, "vllm": 210}  # three engines start there, two of them compile
LIMIT = 45  # seconds of the other checks
PACKED = 64 << 20  # bytes
WHEELS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
CUDA = "cuda130"  # the gpu set's


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="at sizes of seconds, without a GPU as well")
    parser.add_argument("--only", default="", help=f"of {','.join(checks.ALL)}")
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--pack", type=Path, help="put what a bare machine lacks into this directory instead")
    parser.add_argument(
        "--python", default="", help="with --pack: that machine's Python (3.12), when it is another than this one's"
    )
    parser.add_argument("--without", default="", help="with --pack: packages that are there already (name,name)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.pack:
        return pack(chosen.pack, chosen.python, chosen.without.split(","))
    if chosen.one:
        print("\n" + json.dumps(result_of(chosen.one, chosen.tiny)))
        return 0
    names = chosen.only.split(",") if chosen.only else list(checks.ALL)
    if unknown := [name for name in names if name not in checks.ALL]:
        parser.error(f"unknown check {unknown[0]!r}; expected one of {', '.join(checks.ALL)}")
    rows = []
    for name in names:
        began = time.perf_counter()
        row = result_of(name, True) if chosen.tiny else in_process(name)
        rows.append({"check": name, **row, "seconds": round(time.perf_counter() - began, 1)})
        print(line(rows[-1]), flush=True)
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "tiny": chosen.tiny, **machine(), "checks": rows}
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(record, indent=2), encoding="utf-8")
    counts = {state: sum(row["state"] == state for row in rows) for state in ("passed", "failed", "not run")}
    print(f"{record['device']}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["failed"] else 0


def in_process(name: str) -> dict[str, Any]:
    """One check in a process of its own, which is ended when its time is up."""
    limit = LIMITS.get(name, LIMIT)
    command = [sys.executable, str(Path(__file__).parent), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"state": "failed", "what": f"took more than {limit} s", "numbers": {}}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        tail = (done.stderr.strip().splitlines() or [""])[-1]
        what = f"its process ended with {done.returncode}: {tail[:200]}"
        return {"state": "failed", "what": what, "numbers": {}, "trace": done.stderr[-6000:]}


def result_of(name: str, tiny: bool) -> dict[str, Any]:
    """passed, failed or not run, in words and numbers."""
    import logging

    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at every product that it casts
    if not tiny and not torch.cuda.is_available():
        return {"state": "not run", "what": "no GPU here (--tiny runs on a CPU)", "numbers": {}}
    if tiny:
        signal.signal(signal.SIGALRM, _late)
        signal.alarm(LIMITS.get(name, LIMIT))
    try:
        with tempfile.TemporaryDirectory(prefix="rlsafe-check-") as scratch:
            numbers = checks.ALL[name](checks.Place(Path(scratch), tiny))
        wrong = [what for what, (_, good) in numbers.items() if good is False]
        shown = {what: value for what, (value, _) in numbers.items()}
        return {"state": "failed" if wrong else "passed", "what": ", ".join(wrong), "numbers": shown}
    except (Missing, ImportError) as error:
        return {"state": "not run", "what": str(error), "numbers": getattr(error, "numbers", {})}
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).strip()[:300]}"
        return {"state": "failed", "what": what, "numbers": {}, "trace": traceback.format_exc()[-6000:]}
    finally:
        if tiny:
            signal.alarm(0)


def _late(*_: Any) -> None:
    raise TimeoutError("its time is up")


def line(row: dict[str, Any]) -> str:
    numbers = ", ".join(f"{what} {value:.4g}" if isinstance(value, float) else f"{what} {value}"
                        for what, value in row["numbers"].items())  # fmt: skip
    return (
        f"{row['check']:<12} {row['state']:<8} {row['seconds']:>6.1f} s  {row['what'] and row['what'] + '; '}{numbers}"
    )


def machine() -> dict[str, Any]:
    import torch

    versions = {}
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "vllm", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": device, "python": platform.python_version(), "versions": versions}


def pack(directory: Path, python: str = "", without: Sequence[str] = ()) -> int:
    """Install the packages of NEEDS, as this environment has them, into `directory`, for `python` (this one, when empty)."""
    pins = [f"{name}=={version(name)}" for name in NEEDS if _here(name) and name not in without]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--target",
        str(directory),
    ]
    if python:
        command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        command += [f"--platform={kind}_{platform.machine()}" for kind in WHEELS]
    subprocess.run([*command, *pins], check=True)
    for library in directory.glob("bitsandbytes/libbitsandbytes_*.so"):
        if CUDA not in library.name and "cpu" not in library.name:
            library.unlink()  # 20 MiB for each older CUDA
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(f"{len(pins)} packages, {size / 2**20:.0f} MiB, in {directory}")
    return 0 if size <= PACKED else 1


def _here(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
