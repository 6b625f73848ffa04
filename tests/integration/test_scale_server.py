"""Several processes that send their rollouts to one vLLM server train what one process trains with it."""

from __future__ import annotations

import json

import pytest
from policy_server import PolicyServer
from scale import train
from tiny import save_tiny_model
from tiny_architectures import load
from tiny_runs import GRPO, adapter, distance, tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.rollouts import close_all
from rlsafe.rollouts.remote import Server

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    running = PolicyServer(save_tiny_model(directory / "model"), directory / "server.log")
    running.start(wait=900)
    yield running
    close_all()
    running.stop()


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("how", ["cpu_ddp", "cpu_fsdp2"])
def test_two_processes_train_what_one_trains_with_a_server(server, tiny_tree, tmp_path, how, staleness):
    """Three prompts: the second process has one of them. Both save the adapter, under one name, and check what is sampled."""
    served = {"sampler": {"kind": "server", "urls": [server.url]}, "grpo": {"max_staleness": staleness}}
    model = {"model": {**tiny_tree["model"], "name": server.model}, "optim": {"lr": 1e-3}}
    tree = tree_with(tiny_tree, GRPO, served, model)
    run(run_from_tree(tree), tmp_path / "one")
    train(how, tree, tmp_path / "two")
    one, two = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("one", "two"))
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert [step["reward"] for step in one] == pytest.approx([step["reward"] for step in two])
    assert max(step["sampler_gap"] for step in one + two) < 1e-4
    for steps in (one, two):  # with 1, sampled while the step before updates, and compared with what sampled them
        assert [step.get("staleness", 0) for step in steps] == [0, *[staleness] * 3]
        assert all((abs(step["ratio"] - 1) > 1e-5) == bool(staleness and step["step"]) for step in steps)
    moved = max(float(tensor.abs().max()) for name, tensor in adapter(tmp_path / "two").items() if "lora_B" in name)
    assert moved > 1e-4 and distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 2e-5


def test_an_adapter_that_another_process_loaded_meanwhile_is_taken(server, tmp_path):
    """Two processes may both see that it is not there, and both load it."""
    load(server.model).save_adapter(tmp_path)
    for process in (Server(server.url, 60), Server(server.url, 60)):
        process._load("of-both", str(tmp_path))
    assert "of-both" in server.adapters()
    process.unload("of-both")
