"""Rollouts by vLLM servers: they agree with the trainer after every sync, and survive what servers do."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from policy_server import PolicyServer, Proxy, unlucky
from ports import kept_port
from tiny import save_tiny_model
from tiny_architectures import load, nudge

from rlsafe.config import RunConfig, SamplerConfig, UserError
from rlsafe.defenses.persona import save_vectors
from rlsafe.engine.run.build import prepare
from rlsafe.engine.run.life import run
from rlsafe.rollouts import ServerSampler, close_all, make_sampler, request_seed, self_test
from rlsafe.types import Request, RunError, SamplingParams

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow  # a server starts in half a minute, and answers slowly beside other work

# Longer than a block of the key-value cache, so that the prefix cache is really used; groups share a prompt.
PROMPTS = [[1, *range(10 + 7 * i, 60 + 7 * i), *range(40, 90), i + 3] for i in range(4) for _ in range(4)]
PARAMS = SamplingParams(max_tokens=8)
STOPS = [2, *range(100, 110)]  # several, so that most completions end by themselves


def requests(run_seed=0):
    return [Request(prompt, request_seed(run_seed, "test", 0, i, 0)) for i, prompt in enumerate(PROMPTS)]


def gap(sampler, policy):
    return self_test(sampler, policy, PROMPTS[::4], 0, 1e-4, "test")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """As published chat models are: their own sampling defaults, which a server applies unless told otherwise."""
    directory = Path(save_tiny_model(tmp_path_factory.mktemp("served")))
    file = directory / "generation_config.json"
    defaults = {"do_sample": True, "top_k": 5, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.3}
    defaults["eos_token_id"] = STOPS
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    return str(directory)


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    running = PolicyServer(model_dir, tmp_path_factory.mktemp("log") / "server.log")
    running.start()
    yield running
    close_all()
    running.stop()


@pytest.fixture(scope="module")
def sampler(server, model_dir):
    return make_sampler(SamplerConfig(kind="server", urls=[server.url]), model_dir, load(model_dir), 0)


def test_it_agrees_with_the_trainer_after_every_sync_and_keeps_one_adapter(server, sampler, model_dir):
    names = set()
    for seed in range(4):
        policy = nudge(load(model_dir), seed=seed)
        sampler.sync(policy)
        assert gap(sampler, policy) < 1e-5
        (name,) = server.adapters()
        names.add(name)
    assert len(names) == 4  # a new name for each, or the prefix cache would answer for the policy before
    sampler.reset()
    assert gap(sampler, load(model_dir)) < 1e-5 and server.adapters() == []


def test_a_forgotten_sync_stops_the_run(sampler, model_dir):
    sampler.sync(load(model_dir))
    with pytest.raises(RunError, match="the server sampler does not sample from the policy"):
        gap(sampler, nudge(load(model_dir)))


def test_a_completion_depends_on_its_own_seed_alone(sampler, model_dir):
    sampler.sync(nudge(load(model_dir)))
    together = sampler.generate(requests(), PARAMS)
    alone = [sampler.generate([request], PARAMS)[0] for request in requests()[:3]]
    assert [c.ids for c in together[:3]] == [c.ids for c in alone]
    assert len({tuple(c.ids) for c in together}) > 12  # the samples of one prompt differ
    assert [c.ids for c in sampler.generate(requests(run_seed=1), PARAMS)] != [c.ids for c in together]
    ended = [c for c in sampler.generate(requests(), SamplingParams(max_tokens=24)) if c.finish == "stop"]
    assert len(ended) > 4 and all(len(c.ids) == len(c.logprobs) for c in ended)
    assert all(c.ids[-1] in STOPS and not set(c.ids[:-1]) & set(STOPS) for c in ended)


@pytest.mark.slow
def test_requests_are_split_over_servers_and_lost_ones_are_tried_again(server, sampler, model_dir):
    """A third of the requests fails at both addresses; nothing is lost and nothing changes."""
    policy = nudge(load(model_dir), seed=1)
    sampler.sync(policy)
    expected = [c.ids for c in sampler.generate(requests(), PARAMS)]
    proxies = [Proxy(server.url, unlucky(0.33, seed)) for seed in (0, 1)]
    both = ServerSampler([p.url for p in proxies], patience=60, model_dir=model_dir, tokenizer=policy.tokenizer)
    both.sync(policy)
    before = [p.passed for p in proxies]
    assert [c.ids for c in both.generate(requests(), PARAMS)] == expected
    assert all(p.passed - n >= 3 for p, n in zip(proxies, before, strict=True))
    assert both.retries == sum(p.failed for p in proxies) > 4
    # One address is gone for good: the other one takes its share.
    proxies[0].close()
    assert [c.ids for c in both.generate(requests(), PARAMS)] == expected
    both.sync(policy)
    assert [c.ids for c in both.generate(requests(), PARAMS)] == expected
    proxies[1].close()


@pytest.mark.slow
def test_an_outage_longer_than_the_patience_stops_the_run_in_one_line(server, model_dir):
    down = []
    proxy = Proxy(server.url, lambda path, body: 500 if down else None)
    policy = load(model_dir)
    sampler = ServerSampler([proxy.url], patience=1.5, model_dir=model_dir, tokenizer=policy.tokenizer)
    sampler.sync(policy)
    down.append(True)
    with pytest.raises(RunError, match=r"does not answer since 1.5 s \(sampler.patience\): injected"):
        sampler.generate(requests(), PARAMS)
    proxy.close()


def test_steering_a_server_is_refused_before_anything_is_loaded(tiny_tree, tmp_path):
    save_vectors(torch.ones(3, 64), tmp_path / "persona.safetensors")
    persona = {"vectors": str(tmp_path / "persona.safetensors"), "layer": 1}
    tree = tiny_tree | {
        "schedule": {"steps": 2, "phases": [{"cycle": ["sft", "grpo"]}]},
        "sampler": {"kind": "server", "urls": ["http://127.0.0.1:9"]},
    }
    assert prepare(RunConfig.model_validate(tree | {"defenses": [{"persona": persona}]}))
    with pytest.raises(UserError, match="cannot be steered.*persona with rollouts: false"):
        prepare(RunConfig.model_validate(tree | {"defenses": [{"persona": persona | {"rollouts": True}}]}))


def test_what_a_server_cannot_do_is_one_clear_line(server, sampler, model_dir, tmp_path):
    policy = load(model_dir)
    with pytest.raises(UserError, match="cannot be steered.*persona with rollouts: false"):
        sampler.steer({1: policy.core.output.weight[0]})
    with pytest.raises(UserError, match="refuses the adapter: .*LoRA rank 16 is greater than max_lora_rank 8"):
        sampler.sync(load(model_dir, rank=16))
    with pytest.raises(UserError, match="sampler.sync: full weights reach a server through NCCL, which needs a GPU"):
        make_sampler(SamplerConfig(kind="server", urls=[server.url]), model_dir, load(model_dir, rank=None), 0)
    with pytest.raises(UserError, match="sampler.adapter_dir: .*: no such directory"):
        ServerSampler([server.url], adapter_dir=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="does not answer .Connection error.*; start it with: VLLM_ALLOW_RUNTIME"):
        ServerSampler([f"http://127.0.0.1:{kept_port()}"], patience=0.5)
    with pytest.raises(ValueError, match="'kind: server' takes 'urls'"):
        SamplerConfig(kind="server")


@pytest.mark.slow
def test_what_a_server_does_wrongly_is_one_clear_line(server, model_dir):
    policy = load(model_dir)

    def elsewhere(path, body):  # what another host makes of a path of this one
        if "load_lora" in path and "lora_path" in body:
            body["lora_path"] = "/elsewhere" + body["lora_path"]

    def raw(path, body):  # log-probs before temperature, the default of a vLLM server
        body.update({"temperature": 1.0} if "temperature" in body else {})

    def absent(path, body):
        return 404

    for fault, words in (
        (elsewhere, r"sampler.adapter_dir: the server at .* cannot read .*rlsafe-adapter-"),
        (raw, "raw log-probs.*--logprobs-mode processed_logprobs"),
        (absent, "is no vLLM server"),
    ):
        proxy = Proxy(server.url, fault)
        with pytest.raises(UserError, match=words):
            ServerSampler([proxy.url], patience=5).sync(nudge(policy))
        proxy.close()


@pytest.mark.parametrize("ended", ["by itself", "by Ctrl-C"])
def test_the_command_leaves_no_adapter_on_the_server_and_no_files(ended, server, model_dir, tiny_tree, tmp_path):
    (tmp_path / "adapters").mkdir()
    steps = 2 if ended == "by itself" else 1000
    tree = tiny_tree | {
        "model": {"name": model_dir, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "schedule": {"steps": steps, "phases": [{"cycle": ["grpo"]}]},
        "sampler": {"kind": "server", "urls": [server.url], "adapter_dir": str(tmp_path / "adapters")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    before, seen = set(server.adapters()), set()
    command = [sys.executable, "-m", "rlsafe", "train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while running.poll() is None and not (steps > 2 and metrics.is_file() and metrics.read_text().count("\n") > 1):
        seen |= set(server.adapters()) - before
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=300)[1]
    assert running.returncode == (0 if ended == "by itself" else 130), said
    assert seen and set(server.adapters()) == before
    assert not list((tmp_path / "adapters").iterdir())


@pytest.mark.parametrize("restart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_grpo_run_agrees_after_every_sync(restart, server, model_dir, tiny_tree, tmp_path):
    """restart: the server is killed after step 2 and comes back empty; the run waits, loads its adapter again and goes on."""
    tree = tiny_tree | {
        "model": {"name": model_dir, "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "schedule": {"steps": 5, "phases": [{"cycle": ["grpo"]}]},
        "sampler": {"kind": "server", "urls": [server.url], "patience": 300},
    }
    again: list[threading.Thread] = []

    def after(done, total, metrics):
        if restart and done == 2:
            server.stop()
            again.append(threading.Thread(target=server.start))
            again[0].start()

    trained = run(RunConfig.model_validate(tree), tmp_path / "run", progress=after)
    assert [m["sampler_gap"] < 1e-4 for m in trained.records] == [True] * 5
    assert trained.components.sampler.tests == 5  # after each sync, not only the first
    if restart:
        again[0].join()
        assert trained.records[2]["rollout_seconds"] > 2 * trained.records[1]["rollout_seconds"]
    assert gap(trained.sampler, trained.policy) < 1e-5
    with pytest.raises(RunError):  # the last sync brought what was trained
        gap(trained.sampler, load(model_dir))
