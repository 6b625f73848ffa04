"""Worker processes of a comparison do not outlive it."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace

import rlsafe.compare.workers as workers
from rlsafe.compare.records import Directory
from rlsafe.engine.interrupts import stop_requests

workers.GRACE = 1.0


def work(cell, out):
    with stop_requests() as asked:
        (out / f"{cell.id}.pid").write_text(str(os.getpid()))
        for _ in range(300):
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


def wait_for(condition, seconds=40.0):
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
        code = process.wait(40)
        wait_for(lambda: not any(alive(pid) for pid in pids))
    finally:
        process.kill()
    assert code == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert all((tmp_path / f"{name}.saved").exists() for name in "ab")  # the step under way was not thrown away
    assert not (tmp_path / "c.pid").exists()
