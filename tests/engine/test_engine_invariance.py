"""Results do not depend on how a step is cut up: micro-batches, ranks, repetition, interruption."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from tiny_runs import GRPO, MIXED, SFT, adapter, distance, train, tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.types import Interrupted


@pytest.mark.parametrize(
    ("kind", "normalization"),
    [
        pytest.param(
            kind,
            normalization,
            id=f"{name}-{normalization}",
            marks=[pytest.mark.integration] if name == "mixed" or normalization in ("dr_grpo", "bnpo") else [],
        )
        for name, kind, normalizations in [
            ("sft", SFT, ["dapo"]),  # the normalization is GRPO's
            ("grpo", GRPO, ["grpo", "dr_grpo", "dapo", "bnpo"]),
            ("mixed", MIXED, ["grpo", "dr_grpo", "dapo", "bnpo"]),
        ]
        for normalization in normalizations
    ],
)
def test_micro_batch_size_and_accumulation_change_nothing(tiny_tree, tmp_path, kind, normalization):
    base = tree_with(tiny_tree, kind, {"grpo": {"normalization": normalization}, "optim": {"lr": 1e-3}})
    whole = train(base, tmp_path / "whole")
    moved = max(float(tensor.abs().max()) for name, tensor in whole.items() if "lora_B" in name)  # from zero
    assert moved > 1e-4, "the run must move the weights for the comparison to mean anything"
    for micro_rows in (1, 3):
        cut = train(tree_with(base, {"batch": {"micro_rows": micro_rows}}), tmp_path / f"cut{micro_rows}")
        assert distance(whole, cut) < 2e-5


def test_the_same_seed_gives_the_same_adapter_and_another_seed_does_not(tiny_tree, tmp_path):
    tree = tree_with(tiny_tree, MIXED)
    first, again = train(tree, tmp_path / "a"), train(tree, tmp_path / "b")
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = train(tree_with(tree, {"seed": 1}), tmp_path / "c")
    assert distance(first, other) > 1e-4


def test_a_run_repeats_from_its_own_resolved_config(tiny_tree, tmp_path):
    from rlsafe.config import load_run

    first = train(tree_with(tiny_tree, MIXED), tmp_path / "a")
    run(load_run(tmp_path / "a" / "config.yaml"), tmp_path / "b")
    assert distance(first, adapter(tmp_path / "b")) == 0.0
    assert (tmp_path / "a" / "config.yaml").read_text() == (tmp_path / "b" / "config.yaml").read_text()


@pytest.mark.parametrize("iterations", [1, pytest.param(2, marks=pytest.mark.integration)])
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(tiny_tree, tmp_path, iterations):
    tree = tree_with(tiny_tree, MIXED, {"grpo": {"iterations": iterations}})
    whole = train(tree, tmp_path / "whole")
    timing = {"seconds", "rollout_seconds", "probe_seconds"}

    def lines(out):
        records = map(json.loads, open(out / "metrics.jsonl"))
        return [{k: v for k, v in record.items() if k not in timing} for record in records]

    for stop_after in (1, 3, 4):

        def interrupt(done, total, metrics, at=stop_after):
            if done == at:
                signal.raise_signal(signal.SIGINT)

        cut = tmp_path / f"cut{stop_after}"
        with pytest.raises(Interrupted, match="--resume"):
            run(run_from_tree(tree), cut, progress=interrupt)
        resumed = train(tree, cut, resume=True)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), stop_after
        assert lines(tmp_path / "whole") == lines(cut), stop_after


def test_rollouts_that_are_not_the_policys_stop_the_run(tiny_tree, tmp_path, monkeypatch):
    """Trap 11: a sampler that stops following the policy is found in the step where it happens."""
    from rlsafe.rollouts import TransformersSampler
    from rlsafe.types import RunError

    honest = TransformersSampler.generate

    def stale(self, requests, params):
        completions = honest(self, requests, params)
        for completion in completions:
            completion.logprobs = [value - 0.1 for value in completion.logprobs]
        return completions

    tree = tree_with(tiny_tree, GRPO, {"sampler": {"kind": "transformers", "self_test": True}})
    train(tree, tmp_path / "honest")
    monkeypatch.setattr(TransformersSampler, "generate", stale)
    with pytest.raises(RunError, match="disagree|differ|log-prob"):
        run(run_from_tree(tree), tmp_path / "stale")
