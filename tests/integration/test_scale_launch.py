"""What `accelerate launch` is given: configs that load, several hosts, and one clear line for what cannot train."""

from __future__ import annotations

import importlib.util
import json
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from ports import kept_port
from scale import CONFIGS, command, environment, train
from tiny_runs import adapter, distance, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.engine.train.distributed import start

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_config_and_rlsafe_takes_its_settings(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.mixed_precision == "no" and config.num_processes > 1
    assert (config.num_machines == 2) == name.endswith("multinode")
    if "fsdp2" in name:
        assert config.fsdp_config["fsdp_version"] == 2 and not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    if "zero3" in name:
        settings = config.deepspeed_config
        assert settings["zero_stage"] == 3 and not settings["zero3_init_flag"]
        assert {settings["offload_optimizer_device"], settings["offload_param_device"]} == {"none"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version 1: expected 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading: expected false",
        ),
    ],
)
def test_a_launch_that_would_train_something_else_is_refused(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        start(cpu=True)


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DEEPSPEED_ZERO_STAGE", "2", "zero_stage 2: expected 3, ddp.yaml keeps the whole model"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device cpu: expected none, fsdp2.yaml offloads"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme", "offload_optimizer_device nvme: expected none"),
        ("DEEPSPEED_ZERO3_INIT", "true", "zero3_init_flag true: expected false"),
        ("DEEPSPEED_CONFIG_FILE", "ds.json", "deepspeed_config_file ds.json: expected none, rlsafe reads none"),
        ("GRADIENT_CLIPPING", "0.5", "gradient_clipping 0.5: expected none, optim.max_grad_norm sets it"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4: expected 1"),
    ],
)
def test_what_deepspeed_would_decide_beside_the_config_is_refused(monkeypatch, variable, value, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name, setting in {**DEEPSPEED, f"ACCELERATE_{variable}": value}.items():
        monkeypatch.setenv(name, setting)
    with pytest.raises(UserError, match=words):
        start(cpu=True)


def test_deepspeed_that_is_not_there_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, setting in DEEPSPEED.items():
        monkeypatch.setenv(name, setting)
    with pytest.raises(UserError, match=r"DeepSpeed is not installed: pip install -e '.\[deepspeed\]'"):
        start(cpu=True)


def test_only_one_process_speaks_and_only_one_evaluates(tiny_tree, narrow_file, tmp_path):
    """The sampler's weights are shards: the others have gathered them before they leave."""
    evaluate = {"benign": [narrow_file], "benign_limit": 2, "max_tokens": 4}
    tree = tree_with(tiny_tree, {"schedule": {"steps": 1}, "evaluate": evaluate})
    printed = train("cpu_fsdp2", tree, tmp_path / "two")
    assert printed.count("1 steps in") == 1 and (tmp_path / "two" / "evaluation.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero3"])
def test_two_hosts_train_what_one_process_trains(tiny_tree, tmp_path, kind):
    """Two launches on the loopback address, as two hosts would start them."""
    if kind == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    tree = tree_with(tiny_tree, {"schedule": {"steps": 2}, "optim": {"lr": 1e-3}, "defenses": ["kl"]})
    run(run_from_tree(tree), tmp_path / "one")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(tree))
    hosts, port = [], kept_port()
    for rank in (0, 1):
        launch = ("--num_processes", "4", "--machine_rank", str(rank), "--main_process_port", str(port))
        words = command(f"{kind}_multinode", "-m", "rlsafe", "train", file, "--out", tmp_path / "two", launch=launch)
        hosts.append(
            subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [host.communicate(timeout=400)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "".join(said)[-3000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 4
    assert distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 2e-5
