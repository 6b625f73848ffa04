"""A real vLLM server on loopback for rollouts, and a proxy before it that loses, refuses and rewrites requests."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ports import kept_port

ON_CPU = [
    *("--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill", "--block-size", "32"),
    *("--distributed-executor-backend", "uni"),  # no further process to wait for: far quicker on a loaded machine
]
SMALL = ["--max-model-len", "512", "--max-num-batched-tokens", "2048", "--max-num-seqs", "32"]
LORA = ["--enable-lora", "--max-lora-rank", "8", "--logprobs-mode", "processed_logprobs"]


class PolicyServer:
    """`python -m vllm.entrypoints.openai.api_server` on one port; may be stopped and started again."""

    def __init__(self, model: str, log: Path):
        self.model, self.log, self.port = model, log, kept_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self, wait: float = 600.0) -> None:
        environment = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        where = ["--model", self.model, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*module, *where, *ON_CPU, *SMALL, *LORA],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + wait
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text("utf-8", "replace")[-3000:]
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.2)

    def healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=2).status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """As a crash would: no time to say goodbye."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def adapters(self) -> list[str]:
        cards = json.load(urllib.request.urlopen(f"{self.url}/v1/models", timeout=10))["data"]
        return [card["id"] for card in cards if card["parent"] or card["id"] != self.model]


Fault = Callable[[str, dict[str, Any]], int | None]
"""(path, body) -> an HTTP status to answer with, 0 to hang up, None to pass the (perhaps changed) body on."""


class Proxy:
    """Forwards every request to `target`, after `fault` had its say."""

    def __init__(self, target: str, fault: Fault = lambda path, body: None):
        self.fault, self.passed, self.failed = fault, 0, 0
        host = target.removeprefix("http://")
        proxy, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                with lock:
                    status = proxy.fault(self.path, body)
                    proxy.failed += status is not None
                    proxy.passed += status is None
                if status == 0:
                    self.close_connection = True
                    return
                data = b'{"error": {"message": "injected", "type": "InternalServerError", "code": 500}}'
                if status is None:
                    connection = http.client.HTTPConnection(host, timeout=120)
                    sent = json.dumps(body) if body else None
                    connection.request(self.command, self.path, sent, {"content-type": "application/json"})
                    answer = connection.getresponse()
                    status, data = answer.status, answer.read()
                    connection.close()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def unlucky(share: float, seed: int = 0) -> Fault:
    """Fails `share` of the completions, in turn by a 500, a 429 and a connection that breaks."""
    rng = random.Random(seed)
    return lambda path, body: rng.choice([500, 429, 0]) if "completions" in path and rng.random() < share else None
