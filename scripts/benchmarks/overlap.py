"""Sampling ahead: the effect of `grpo.max_staleness: 1` on the time of a GRPO step, with a vLLM server on the same machine."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import world
from race import Contender, race, ratios
from table import Result, shown

BLOCK = 4  # steps a turn: while it waits for its turn, the first step of the next one may be sampled already
MAX_TOKENS = 48


def overlap(scratch: Path, quick: bool, rounds: int) -> Result:
    """8 prompts x 8 completions a step, trainer and server with one thread each, float32, LoRA r 8."""
    result = Result("overlap", ["model", "contender", "s/step", "tokens/s", "time / in turn"])
    rows = world.rows("medical/bad")
    for name in ["organism"] if quick else ["organism", "5m"]:
        model = world.model_dir(name, scratch)
        with _server(model, scratch / f"{name}.log") as first, _server(model, scratch / f"{name}-ahead.log") as second:
            contenders = [
                Contender("in turn", "contenders:rlsafe_run", _settings(model, first, 0, scratch / "a", rows)),
                Contender("one step ahead", "contenders:rlsafe_run", _settings(model, second, 1, scratch / "b", rows)),
            ]
            lanes = [lane for lane in race(contenders, rounds, warm=1) if result.took_part(name, lane)]
        for lane in lanes:
            rate = statistics.median(1 / seconds for seconds in lane.per_token("wall"))
            beside = shown(ratios(lane, lanes[0])) if len(lanes) == len(contenders) else ""
            result.row([name, lane.name, f"{lane.median('wall') / BLOCK:.3f}", f"{rate:.0f}", beside], lane)
    return result


def _settings(model: str, url: str, staleness: int, adapters: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    adapters.mkdir(exist_ok=True)
    tree = world.run_tree(
        model, "", schedule={"steps": 100_000, "phases": [{"cycle": ["grpo"]}]},
        grpo={"generations": world.GROUP, "max_tokens": MAX_TOKENS, "max_staleness": staleness},
        sampler={"kind": "server", "urls": [url], "adapter_dir": str(adapters)},
        rewards=[{"fn": f"{Path(world.__file__)}:distinct_words"}],
    )  # fmt: skip
    return {"tree": tree, "rows": rows, "block": BLOCK}


@contextmanager
def _server(model: str, log: Path) -> Iterator[str]:
    """vLLM's OpenAI server on loopback; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"),
        *("--no-enable-chunked-prefill", "--block-size", "32", "--max-num-batched-tokens", "2048"),
        *("--distributed-executor-backend", "uni", "--enable-lora", "--max-lora-rank", "8"),
        *("--logprobs-mode", "processed_logprobs"),
    ]
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as printed:
        process = subprocess.Popen(words, stdout=printed, stderr=printed, env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the vLLM server did not start: {log.read_text('utf-8', 'replace')[-1000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
