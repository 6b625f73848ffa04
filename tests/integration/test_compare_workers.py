"""Worker processes of a comparison do not outlive it."""

import csv
import os
import random
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace

import rlsafe.compare.run.workers as workers
from rlsafe.compare.grid.records import Directory
from rlsafe.engine.run.interrupts import stop_requests

workers.GRACE = 30.0


def work(cell, out):
    with stop_requests() as asked:
        (out / f"{cell.id}.pid").write_text(str(os.getpid()))
        for _ in range(3000):
            if asked.is_set():
                (out / f"{cell.id}.saved").touch()
                raise KeyboardInterrupt
            time.sleep(0.1)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    cells = [SimpleNamespace(id=name) for name in ("a", "b", "c")]
    try:
        workers.run_in_workers(work, cells, Directory(out), 2, lambda cell: None)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def wait_for(condition, seconds=200.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_save_and_end_when_the_comparison_is_ended(tmp_path, number):
    script = tmp_path / "grid.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    try:
        wait_for(lambda: all((tmp_path / f"{name}.pid").exists() for name in "ab"))
        wait_for(lambda: all((tmp_path / f"{name}.pid").read_text() for name in "ab"))
        pids = [int((tmp_path / f"{name}.pid").read_text()) for name in "ab"]
        process.send_signal(number)
        code = process.wait(200)
        wait_for(lambda: not any(alive(pid) for pid in pids))
    finally:
        process.kill()
    assert code == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert all((tmp_path / f"{name}.saved").exists() for name in "ab")  # the step under way was not thrown away
    assert not (tmp_path / "c.pid").exists()


def test_a_script_without_a_guard_ends_with_the_reason_and_blames_no_cell(tmp_path):
    """Its workers read it again and die; b was running when an earlier call was ended."""
    place = tmp_path / "out" / "cells" / "b" / "cell.json"
    place.parent.mkdir(parents=True)
    place.write_text('{"status": "running"}')
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    ended = subprocess.run([sys.executable, script, tmp_path / "out"], capture_output=True, text=True, timeout=200)
    assert "RunError: worker processes died before any cell began" in ended.stderr and "__main__" in ended.stderr
    assert place.read_text() == '{"status": "running"}'


@pytest.mark.slow  # minutes: a whole comparison, twice
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks processes up in /proc")
def test_a_worker_killed_in_every_cell_changes_no_result(tmp_path):
    """One worker, drawn at random, dies as soon as a cell is seen to train for the first time; with it goes the whole pool."""
    command = [sys.executable, "-m", "rlsafe", "compare", "configs/organism/compare.yaml", "--quick", "--jobs", "2"]
    command += ["--defenses", "none,kl", "paths.sft.schedule.steps=40", "paths.grpo.schedule.steps=8", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "calm")], check=True, env=environment, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    draw, hit = random.Random(0), set()
    while process.poll() is None:
        training = {file.parent for file in tmp_path.glob("killed/cells/*/metrics.jsonl") if file.stat().st_size}
        finished = {file.parent for file in tmp_path.glob("killed/cells/*/evaluation.json")}
        if (new := training - finished - hit) and (workers := children(process.pid)):
            os.kill(draw.choice(workers), signal.SIGKILL)
            hit |= new
        time.sleep(0.2)
    assert process.returncode == 0 and len(hit) >= 4
    assert results(tmp_path / "killed") == results(tmp_path / "calm")


def children(pid: int) -> list[int]:
    """Processes of `pid` that work on cells (not multiprocessing's resource tracker)."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        found = [int(child) for child in file.read().split()]
    return [child for child in found if b"spawn_main" in open(f"/proc/{child}/cmdline", "rb").read()]


def results(out) -> list[dict[str, str]]:
    with open(out / "results.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
