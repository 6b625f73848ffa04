"""Rollouts from a nucleus (top_p < 1): the gap, its check and the correction compare like with like."""

from __future__ import annotations

import json

import pytest
from tiny_runs import tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.types import RunError

GRPO = {"schedule": {"steps": 3, "phases": [{"cycle": ["grpo"]}]}, "optim": {"lr": 1e-2}}


def metrics(tree, out):
    run(run_from_tree(tree), out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["transformers", pytest.param("vllm", marks=pytest.mark.integration)])
@pytest.mark.parametrize("iterations", [1, 2])
def test_the_gap_is_as_small_as_over_the_whole_vocabulary(tiny_tree, tmp_path, kind, iterations):
    if kind == "vllm":
        pytest.importorskip("vllm")
    for top_p in (1.0, 0.9, 0.3):
        grpo = {"grpo": {"top_p": top_p, "temperature": 0.8, "iterations": iterations, "correction": "sequence"}}
        for line in metrics(tree_with(tiny_tree, GRPO, grpo, {"sampler": {"kind": kind}}), tmp_path / f"{top_p}"):
            assert line["sampler_gap"] < 1e-4, (top_p, line)
            assert line["correction"] == pytest.approx(1.0, abs=1e-3)


def test_it_is_as_small_where_a_defense_makes_the_contexts_differ(tiny_tree, tmp_path):
    inoculated = {"defenses": [{"inoculation": {"prompt": "Be bad."}}], "grpo": {"top_p": 0.8}}
    assert all(line["sampler_gap"] < 1e-4 for line in metrics(tree_with(tiny_tree, GRPO, inoculated), tmp_path / "run"))


def test_a_sampler_of_another_policy_is_found_in_a_nucleus_too(tiny_tree, tmp_path, monkeypatch):
    from rlsafe.rollouts import TransformersSampler

    honest = TransformersSampler.generate

    def wrong(self, requests, params):
        completions = honest(self, requests, params)
        for completion in completions if params.top_p < 1 else ():
            completion.logprobs[:] = [logprob - 0.5 for logprob in completion.logprobs]
        return completions

    monkeypatch.setattr(TransformersSampler, "generate", wrong)
    with pytest.raises(RunError, match="sampler and trainer disagree by 0.5"):
        metrics(tree_with(tiny_tree, GRPO, {"grpo": {"top_p": 0.9}}), tmp_path / "run")
