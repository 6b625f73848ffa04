"""DeepSpeed ZeRO-3: two processes on CPUs train what one trains, go on from checkpoints, and refuse what they would ignore."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from defense_matrix import PATHS
from safetensors.torch import load_file
from scale import KINDS, assert_trained_alike, metrics, train
from tiny import save_tiny_model
from tiny_runs import adapter, distance, tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'")

COMMON = {"schedule": {"steps": 3}, "optim": {"lr": 1e-3}, "batch": {"micro_rows": 4}, "track": {"check_after": 2}}
WATCH = """
import rlsafe

class Watch(rlsafe.Defense):
    '''Fails unless this process holds half of the model between steps; its penalty is NaN in step 1 when asked for it.'''

    def __init__(self, weight: float = 1.0, poison: bool = False):
        self.weight, self.poison, self.at = weight, poison, 0

    def weights(self, policy, moment):
        sizes = [(p.numel(), p.ds_tensor.numel(), p.ds_numel) for p in policy.core.parameters()]
        assert all(now == 0 and own == (all_ + 1) // 2 for now, own, all_ in sizes), sizes
        return False

    def penalty(self, view):
        return {"logp": (view.logp * (float("nan") if self.poison and self.at == 1 else 0.1), view.mask("answer"))}

    def effect(self):
        self.at += 1
        return {"at": float(self.at)}
"""
SAME = WATCH.replace("sizes = [", "return False; sizes = [")  # for one process, which has nothing to slice


def watched(directory: Path, name: str, source: str) -> dict[str, Any]:
    (directory / name).write_text(source)
    return {"defenses": [{f"{directory / name}:Watch": {"poison": True}}]}


@pytest.mark.parametrize("kind", KINDS)
def test_two_partitioned_processes_train_what_one_trains(tiny_tree, tmp_path, kind):
    tree = tree_with(tiny_tree, COMMON, KINDS[kind])
    run(run_from_tree(tree), tmp_path / "one")
    train("cpu_zero3", tree, tmp_path / "two")
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2 and "sharded over 2 processes (DeepSpeed ZeRO-3)" in str(record["notes"])
    assert_trained_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_process_without_rows_of_its_own_keeps_step_in_a_mixture(tiny_tree, tmp_path):
    """One row and one prompt: in most steps the second process has nothing but dummies, while the first measures shares."""
    defenses = [{"kl": {"weight": 0.5}}, {"ldifs": {}}, {"interleaving": {"fraction": 0.3}}]
    rows = {"batch": {"sft_rows": 1, "grpo_prompts": 1, "micro_rows": 2}, "track": {"every": 1}}
    tree = tree_with(tiny_tree, COMMON, PATHS["mixed"], rows, {"defenses": defenses})
    run(run_from_tree(tree), tmp_path / "one")
    train("cpu_zero3", tree, tmp_path / "two")
    assert distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 2e-5
    shares = [line["defense/ldifs/grad_share"] for line in metrics(tmp_path / "two")[1:]]
    assert min(shares) > 0


@pytest.mark.slow
def test_weights_stay_in_slices_and_a_step_of_nan_is_left_out_whole(tiny_tree, tmp_path):
    """Two micro-batches a process: the gradient of a step that is left out must not be added to the next one's."""
    tree = tree_with(tiny_tree, COMMON, {"schedule": {"steps": 4}, "batch": {"micro_rows": 2}})
    tree = tree_with(tree, {"optim": {"on_nan": "skip", "max_grad_norm": 0.5}})
    run(run_from_tree(tree | watched(tmp_path, "same.py", SAME)), tmp_path / "one")
    train("cpu_zero3", tree | watched(tmp_path, "watch.py", WATCH), tmp_path / "two")
    assert [line.get("skipped") for line in metrics(tmp_path / "two")] == [None, 1, None, None]
    assert min(line["grad_norm"] or 9 for line in metrics(tmp_path / "two")) > 1, "nothing was clipped"
    assert distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 2e-5
    assert "the gradient norm is nan" in (tmp_path / "two" / "nonfinite" / "step-000001" / "batch.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_resumed_run_ends_with_the_same_bits(tiny_tree, tmp_path, processes):
    """In as many processes; in another number of them sums round differently."""
    tree = tree_with(
        tiny_tree, COMMON, PATHS["grpo"], {"checkpoint": {"every": 2, "keep": 9}, "grpo": {"iterations": 2}}
    )
    tree["defenses"] = [{"kl": {"reference": "step:1"}}]
    out = tmp_path / "two"
    train("cpu_zero3", tree, out)
    unbroken = adapter(out)
    rewind(out)
    train("cpu_zero3", tree, out, "--resume", launch=("--num_processes", str(processes)))
    assert json.loads((out / "run.json").read_text())["resumed"] == [2]
    assert distance(unbroken, adapter(out)) < (1e-12 if processes == 2 else 5e-5)


def rewind(out: Path) -> None:
    """As if the run had been killed after its first checkpoint."""
    for name in ("adapter", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    for checkpoint in sorted((out / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    (out / "run.json").write_text(json.dumps({"status": "running"}))


@pytest.mark.slow
def test_half_precision_weights_keep_float32_masters_over_a_resume(tiny_tree, tmp_path):
    """Steps far below the rounding of bfloat16 add up in the masters, before and after."""
    tree = tree_with(tiny_tree, COMMON, {"schedule": {"steps": 6}, "checkpoint": {"every": 3, "keep": 9}})
    tree = tree_with(tree, {"optim": {"lr": 2e-5}, "model": {"dtype": "bfloat16", "lora": None}, "defenses": ["kl"]})
    out = tmp_path / "two"
    train("cpu_zero3", tree, out)
    unbroken = load_file(str(out / "model" / "model.safetensors"))
    start = load_file(str(Path(tree["model"]["name"]) / "model.safetensors"))
    moved = max(float((unbroken[name].float() - start[name]).abs().max()) for name in start)
    assert moved > 1e-4
    rewind(out)
    train("cpu_zero3", tree, out, "--resume")
    assert distance(unbroken, load_file(str(out / "model" / "model.safetensors"))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_are_computed_again_are_gathered_again(tiny_tree, tmp_path, dtype):
    """A half-precision base keeps its adapter in float32. Products then round to bfloat16, differently in other batches."""
    changes = {"model": {"dtype": dtype, "gradient_checkpointing": True}, "defenses": ["kl", "ldifs"]}
    tree = tree_with(tiny_tree, COMMON, changes)
    run(run_from_tree(tree), tmp_path / "one")
    train("cpu_zero3", tree, tmp_path / "two")
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert {str(tensor.dtype) for tensor in two.values()} == {"torch.float32"}
    size, apart = (
        sum(float((one[name] - other * two[name]).square().sum()) for name in one if "lora_B" in name) ** 0.5
        for other in (0, 1)
    )
    assert distance(one, two) < 2e-5 if dtype == "float32" else apart < 0.03 * size  # DDP, FSDP2: 0.009


@pytest.mark.slow
def test_only_one_partitioned_process_evaluates_and_goes_on_from_an_adapter(tiny_tree, narrow_file, tmp_path):
    """The second run starts from the first one's adapter, which one process can read as well."""
    evaluate = {"benign": [narrow_file], "benign_limit": 2, "max_tokens": 4}
    first = tree_with(tiny_tree, {"schedule": {"steps": 1}, "evaluate": evaluate})
    printed = train("cpu_zero3", first, tmp_path / "first")
    assert printed.count("1 steps in") == 1 and (tmp_path / "first" / "evaluation.json").is_file()
    start = {"model": {"adapter": str(tmp_path / "first" / "adapter")}, "defenses": [{"kl": {"reference": "start"}}]}
    tree = tree_with(tiny_tree, COMMON, start)
    run(run_from_tree(tree), tmp_path / "one")
    train("cpu_zero3", tree, tmp_path / "two")
    assert distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 2e-5


@pytest.mark.slow
def test_training_goes_on_from_weights_that_a_defense_has_rewritten(tiny_tree, tmp_path):
    base = save_tiny_model(tmp_path / "base", seed=9)
    tree = tree_with(tiny_tree, COMMON, {"defenses": [{"safelora": {"base": base, "lowest": 4, "every": 1}}]})
    run(run_from_tree(tree), tmp_path / "one")
    train("cpu_zero3", tree, tmp_path / "two")
    assert [line["defense/safelora/projected"] > 0 for line in metrics(tmp_path / "two")] == [True] * 3
    assert distance(adapter(tmp_path / "one"), adapter(tmp_path / "two")) < 2e-5


@pytest.mark.slow
def test_moments_that_cannot_be_cut_are_refused_in_one_line(tiny_tree, tmp_path):
    printed = train("cpu_zero3", tree_with(tiny_tree, {"optim": {"kind": "adamw_8bit"}}), tmp_path / "two", code=1)
    words = "optim.kind: adamw_8bit: its moments cannot be partitioned by DeepSpeed; expected adamw"
    assert words in printed and "Traceback" not in printed.split(words)[0]
