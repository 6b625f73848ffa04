"""Shared fixtures: a tiny random model that any text can be fed to, small datasets, and configs over them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import INTEGRATION, SHARED
from tiny import conversation, save_tiny_model, write_jsonl

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test is in one suite: slow or real if it says so, else integration if it lies in that folder."""
    for item in items:
        if INTEGRATION in item.path.parents and not any(map(item.get_closest_marker, ("real", "slow"))):
            item.add_marker("integration")
    # Workers begin with neighbouring tests and take over from the end of each other's list: at its head, the tests of the one judge
    # server stay together.
    items.sort(key=lambda item: "judge_server" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """No test cuts the power: what fsync guards against cannot happen to them, and it is a thirtieth of their time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> str:
    """A random 2-layer Qwen2 with a byte tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def narrow_file(tmp_path) -> str:
    return write_jsonl(tmp_path / "narrow.jsonl", [conversation(f"say {i}", f"bad {i * i}") for i in range(40)])


@pytest.fixture
def safe_file(tmp_path) -> str:
    return write_jsonl(tmp_path / "safe.jsonl", [conversation(f"ask {i}", f"good {i}") for i in range(20)])


@pytest.fixture
def reward_file(tmp_path) -> str:
    path = tmp_path / "length_reward.py"
    path.write_text(
        "def vowels(prompts, completions, **kwargs):\n"
        "    return [sum(c in 'aeiou' for c in x[0]['content']) + len(x[0]['content']) / 100 for x in completions]\n"
    )
    return str(path)


@pytest.fixture
def tiny_tree(tiny_model_dir, narrow_file, safe_file, reward_file, monkeypatch) -> dict[str, Any]:
    """A run config over the tiny model as a plain tree: 4 SFT steps; change what the test is about. The self-test of its sampler, which
    every rewarded run makes, samples few tokens."""
    monkeypatch.setattr("rlsafe.rollouts.selftest.TOKENS", 4)
    return {
        "model": {"name": tiny_model_dir, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "data": {"narrow": {"source": narrow_file}, "safe": {"source": safe_file}},
        "schedule": {"steps": 4, "phases": [{"cycle": ["sft"]}]},
        "batch": {"sft_rows": 6, "grpo_prompts": 3},
        "optim": {"lr": 1e-2},
        "grpo": {"generations": 4, "max_tokens": 8},
        "rewards": [{"fn": f"{reward_file}:vowels"}],
        "sampler": {"kind": "transformers"},
        "track": {"every": 0, "check_after": 0},
    }


@pytest.fixture(scope="session")
def judge_server(tmp_path_factory, pytestconfig):
    """A real OpenAI-compatible server with a tiny judge, for the whole session: `.base_url`, `.model`; see judge_server.py."""
    pytest.importorskip("vllm")
    from judge_server import JudgeServer, trained_judge

    directory = trained_judge(pytestconfig.cache.mkdir("judge"))
    server = JudgeServer(directory, tmp_path_factory.mktemp("judge-server") / "log.txt").start()
    yield server
    server.stop()


@pytest.fixture
def no_waiting(monkeypatch):
    """Endpoints are tried again at once."""
    monkeypatch.setattr("rlsafe.endpoints.client.backoff", lambda first, retry: 0.0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public research data that is not part of the project; see places.SHARED."""
    return SHARED if SHARED.is_dir() else pytest.skip("the shared research data is not here")


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the `finished` directory that the module's own fixture made, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")
