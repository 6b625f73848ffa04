"""Every defense under DDP, FSDP2 and ZeRO-3, with either sampler: two processes train what one trains, resumed or not."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
from defense_matrix import IDS, PATHS, Lab
from scale import train
from tiny_runs import adapter, distance, tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run

NORMAL = {("cpu_fsdp2", "safelora", "grpo")}
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
HOW = ["cpu_ddp", "cpu_fsdp2", pytest.param("cpu_zero3", marks=NEEDS_DEEPSPEED)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab.build(tmp_path_factory.mktemp("lab"))


def cases(*kinds: str):
    for how in ("cpu_ddp", "cpu_fsdp2", "cpu_zero3"):
        for label, paths in IDS.items():
            if label == "inoculation-adapter" and how != "cpu_ddp":
                continue  # refused: it reads whole weights
            for path in [path for path in kinds if path in paths]:
                marks = [] if (how, label, path) in NORMAL else [pytest.mark.slow]
                marks += [NEEDS_DEEPSPEED] if how == "cpu_zero3" else []
                yield pytest.param(how, label, path, id=f"{how}-{label}-{path}", marks=marks)


def tree_of(lab, label, path, *changes):
    case = lab.case(label)
    common = {"optim": {"lr": 1e-3}, "track": {"every": 0, "check_after": 2}}
    return tree_with(lab.tree, PATHS[path], common, {"defenses": [{case.name: case.settings[1]}, "kl"]}, *changes)


@pytest.mark.parametrize(("how", "label", "path"), cases(*PATHS))
def test_two_processes_defend_as_one_does(lab, tmp_path, monkeypatch, how, label, path):
    monkeypatch.setenv("HOME", str(lab.home))
    tree = tree_of(lab, label, path)
    run(run_from_tree(tree), tmp_path / "one")
    train(how, tree, tmp_path / "two")
    assert distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_a_checkpoint_of_two_processes_goes_on_in_one(lab, tmp_path, how):
    """Moments, snapshots and rollouts that wait for their second use are whole in it; of those one process has more than the other."""
    changes = {"grpo": {"iterations": 2}, "checkpoint": {"every": 3, "keep": 9}, "batch": {"micro_rows": 4}}
    tree = tree_of(lab, "kl", "grpo", changes, {"defenses": [{"kl": {"reference": "step:1"}}]})
    train(how, tree, tmp_path / "two")
    whole = adapter(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "adapter")
    for checkpoint in sorted((tmp_path / "two" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    (tmp_path / "two" / "run.json").write_text(json.dumps({"status": "running"}))
    run(run_from_tree(tree), tmp_path / "two", resume=True)
    assert distance(whole, adapter(tmp_path / "two")) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_full_fine_tuning(lab, tmp_path, how):
    from safetensors.torch import load_file

    tree = tree_of(lab, "kl", "sft", {"defenses": ["kl", "ldifs"]})
    tree["model"]["lora"] = None
    run(run_from_tree(tree), tmp_path / "one")
    train(how, tree, tmp_path / "two")
    one, two = (load_file(str(tmp_path / name / "model" / "model.safetensors")) for name in ("one", "two"))
    assert distance(one, two) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_rollouts_by_vllm_follow_the_gathered_policy(lab, tmp_path, how):
    """The self-test compares log-probs after each of the first syncs; the sampled texts are those of one process."""
    pytest.importorskip("vllm")
    tree = tree_of(lab, "persona", "grpo", {"sampler": {"kind": "vllm", "self_test": True}})
    run(run_from_tree(tree), tmp_path / "one")
    train(how, tree, tmp_path / "two")
    assert distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 1e-3
    gaps = [json.loads(line).get("sampler_gap", 0.0) for line in (tmp_path / "two" / "metrics.jsonl").open()]
    assert max(gaps) < 1e-3
