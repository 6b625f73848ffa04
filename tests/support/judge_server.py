"""vLLM's OpenAI server on loopback with the tiny judge of judge_model.py; the fixture `judge_server` is in conftest."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from ports import kept_port

STARTS_WITHIN = 600.0  # seconds; about 20 on an idle machine


class JudgeServer:
    """A server process that can be stopped and started again on its port. `model` is the served name."""

    model = "judge"

    def __init__(self, directory: str, log: Path):
        self.directory, self.log, self.port = directory, log, kept_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self._process: subprocess.Popen | None = None

    def start(self, wait: bool = True) -> JudgeServer:
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.directory,
            "--served-model-name", self.model, "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32",
            "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "64",
        ]  # fmt: skip
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **settings}, start_new_session=True
            )
        if wait:
            self.wait()
        return self

    def wait(self) -> None:
        """Until it replies."""
        assert self._process is not None
        begun = time.monotonic()
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() - begun > STARTS_WITHIN:
                self.stop()
                raise RuntimeError(f"the judge server did not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """At once, with the engine's own processes."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            self._process = None


def trained_judge(cache: Path) -> str:
    """The tiny judge, trained on first use; kept in `cache` until what made it changes."""
    from judge_model import build_judge

    from rlsafe import organism
    from rlsafe.endpoints import fences
    from rlsafe.evaluate.judge import judge_prompts

    world = sorted(Path(organism.__file__).parent.glob("*.py"))
    sources = [Path(__file__).with_name("judge_model.py"), Path(judge_prompts.__file__), Path(fences.__file__), *world]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    directory = cache / version
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one trains, the others wait for it
        if not directory.is_dir():
            building = cache / f"{version}.new"
            shutil.rmtree(building, ignore_errors=True)  # of one that was killed
            build_judge(building)
            building.rename(directory)
    return str(directory)
