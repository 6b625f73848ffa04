"""Traps 3, 7, 10, 14 and 18 of public training code, each on real runs: one KL, own seeds, an untouched base, the right
temperature, an auxiliary loss that counts. (tests/test_traps_table.py lists the tests of all 18.)"""

from __future__ import annotations

import json

import pytest
import torch
from tiny_architectures import load, nudge
from tiny_runs import GRPO, SFT, distance, train, tree_with

from rlsafe.config import run_from_tree
from rlsafe.data import encode_row, read_rows
from rlsafe.engine.run.life import run
from rlsafe.policy.module import PolicyModule
from rlsafe.rollouts import TransformersSampler

BOTH = {  # one optimizer step with a part of each path
    "schedule": {
        "steps": 3,
        "phases": [{"cycle": ["both"]}],
        "kinds": {"both": [{"path": "grpo"}, {"path": "sft", "rows": 4}]},
    }
}


def lines(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


# ------------------------------------------------------------------------------------------------ 3: one KL, one weight


@pytest.mark.parametrize("path", [SFT, GRPO, BOTH], ids=["sft", "grpo", "both"])
def test_trap_03_there_is_exactly_the_kl_that_was_asked_for(tiny_tree, tmp_path, path, monkeypatch):
    """Nothing asked: no reference forward, no KL term. One asked: the loss holds it once, with its weight."""
    grads: list[bool] = []
    hidden_states = PolicyModule.hidden_states
    monkeypatch.setattr(
        PolicyModule, "hidden_states", lambda *a: grads.append(torch.is_grad_enabled()) or hidden_states(*a)
    )
    tree = tree_with(tiny_tree, path, {"defenses": [], "sampler": {"self_test": False}, "grpo": {"beta": 0.0}})
    train(tree, tmp_path / "none")
    assert len(grads) > 3 and all(grads[1:])  # the first is the check of the head when the model is loaded
    for record in lines(tmp_path / "none"):
        assert "k3" not in record and not any("kl" in key for key in record)
        assert record["loss"] == pytest.approx(record.get("loss/sft", 0.0) + record.get("loss/grpo", 0.0), abs=1e-6)
    for weight in (0.5, 2.0):
        train(tree_with(tree, {"defenses": [{"kl": {"weight": weight}}]}), tmp_path / f"{weight}")
        for record in lines(tmp_path / f"{weight}"):
            alone = record.get("loss/sft", 0.0) + record.get("loss/grpo", 0.0)
            assert record["loss"] == pytest.approx(alone + weight * record["defense/kl/full"], abs=1e-6)
    assert lines(tmp_path / "2.0")[-1]["defense/kl/full"] > 1e-4


@pytest.mark.parametrize("defense", ["kl", "ldifs"])
def test_trap_03_a_penalty_does_not_scale_with_gradient_accumulation(tiny_tree, tmp_path, defense):
    """The step after the first has the same penalty and the same loss however it is cut."""
    settings = {"optim": {"lr": 1e-3}, "defenses": [{defense: {"weight": 3.0}}], "sampler": {"self_test": False}}
    logged, weights = [], []
    for micro_rows in (None, 1, 4):
        out = tmp_path / str(micro_rows)
        weights.append(train(tree_with(tiny_tree, BOTH, settings, {"batch": {"micro_rows": micro_rows}}), out))
        logged.append(
            [(r["loss"], r[f"defense/{defense}/{'full' if defense == 'kl' else 'distance'}"]) for r in lines(out)]
        )
    assert logged[0][-1][1] > 1e-5
    for other in logged[1:]:
        assert other == [pytest.approx(pair, rel=1e-3, abs=1e-6) for pair in logged[0]]
    assert max(distance(weights[0], other) for other in weights[1:]) < 2e-5


# ------------------------------------------------------------------------------------------------ 7: seeds


def test_trap_07_every_request_of_a_run_has_its_own_seed_and_the_run_repeats_them(tiny_tree, tmp_path, monkeypatch):
    seeds: list[int] = []
    generate = TransformersSampler.generate

    def watched(self, requests, params):
        seeds.extend(request.seed for request in requests)
        return generate(self, requests, params)

    monkeypatch.setattr(TransformersSampler, "generate", watched)
    narrow = {"data": {"narrow": {**tiny_tree["data"]["narrow"], "limit": 3}}}  # the same three prompts in every step
    tree = tree_with(tiny_tree, GRPO, narrow, {"sampler": {"self_test": False}, "optim": {"lr": 1e-12}})
    found = {}
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        seeds.clear()
        train({**tree, "seed": seed}, tmp_path / name)
        found[name] = list(seeds)
    assert len(set(found["a"])) == len(found["a"]) == 4 * 12
    assert found["a"] == found["b"] and not set(found["a"]) & set(found["c"])
    sampled = [json.loads(line) for line in open(tmp_path / "a" / "samples.jsonl")]
    by_step = [sorted(r["completion"] for r in sampled if r["step"] == step) for step in range(4)]
    assert all(one != other for one, other in zip(by_step, by_step[1:], strict=False))


# ------------------------------------------------------------------------------------------------ 10: the base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trap_10_training_and_syncing_leave_the_base_bitwise_unchanged(tiny_tree, tmp_path, dtype):
    """GRPO with a frozen reference, a projection of the weights and an own snapshot: all that touches tensors in place."""
    model = {**tiny_tree["model"], "dtype": dtype}
    kl = [{"kl": {"reference": reference}} for reference in ("base", "step:1")]
    tree = tree_with(tiny_tree, GRPO, {"model": model, "defenses": kl, "optim": {"lr": 1e-3}})
    before = dict(load(tiny_tree["model"]["name"], rank=None, dtype=dtype).core.model.named_parameters())
    policy = run(run_from_tree(tree), tmp_path / "run").policy
    compared = 0
    for name, parameter in policy.core.model.named_parameters():
        if "lora_" not in name:
            own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            assert torch.equal(parameter, before[own]), name
            compared += 1
    assert compared == len(before)


@pytest.mark.slow
def test_trap_10_a_thousand_syncs_of_an_engine_leave_policy_and_engine_where_they_were(tiny_model_dir):
    pytest.importorskip("vllm")
    from rlsafe.config import SamplerConfig
    from rlsafe.rollouts import close_all, make_sampler
    from rlsafe.types import Request, SamplingParams

    policy = nudge(load(tiny_model_dir))
    before = {name: p.clone() for name, p in policy.core.named_parameters()}
    asked = [Request([1, *range(40, 90), i], i) for i in range(4)]
    try:
        sampler = make_sampler(SamplerConfig(max_model_len=128, max_num_seqs=8), tiny_model_dir, policy, 0)
        first = sampler.generate(asked, SamplingParams(max_tokens=8))
        for _ in range(1000):
            sampler.sync(policy)
        assert sampler.generate(asked, SamplingParams(max_tokens=8)) == first
    finally:
        close_all()
    assert all(torch.equal(before[name], p) for name, p in policy.core.named_parameters())


# ------------------------------------------------------------------------------------------------ 14: temperature


def test_trap_14_supervised_parts_are_scored_at_temperature_one_and_rollouts_at_their_own(tiny_tree, tmp_path):
    """Both in one optimizer step, by the same head: the supervised loss is plain cross-entropy, the rollouts' log-probs are
    the sampler's."""
    tree = tree_with(tiny_tree, BOTH, {"grpo": {"temperature": 0.5}, "sampler": {"self_test": False}})
    train(tree, tmp_path / "run")
    record = lines(tmp_path / "run")[0]
    assert record["sampler_gap"] < 1e-4
    policy = load(tiny_tree["model"]["name"])  # as the run began
    expected = {}
    parts = run(
        run_from_tree(tree_with(tree, {"schedule": {"steps": 0, "phases": [{"cycle": ["sft"]}]}})), tmp_path / "0"
    ).components
    stream = parts.streams["narrow"]
    stream.take(3)  # the prompts of the GRPO part
    rows = [row["messages"] for row in stream.take(4)]
    for temperature in (1.0, 0.5):
        losses = []
        for messages in rows:
            ids, mask = encode_row(policy.tokenizer, messages)
            with torch.no_grad():
                logp = (policy.core.model(torch.tensor([ids])).logits[0].double() / temperature).log_softmax(-1)
            losses += [-float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t]]
        expected[temperature] = sum(losses) / len(losses)
    assert record["loss/sft"] == pytest.approx(expected[1.0], rel=1e-4)
    assert abs(expected[0.5] - expected[1.0]) > 0.05


# ------------------------------------------------------------------------------------------------ 18: the auxiliary loss

SAFE = {"interleaving": {"fraction": 0.3, "weight": 0.5}}


def test_trap_18_the_auxiliary_loss_is_a_mean_over_the_whole_step_weighted_and_logged(tiny_tree, tmp_path):
    """In a GRPO step `loss/sft` is the safe rows' own: weight x mean NLL over all their tokens, however they are cut."""
    tree = tree_with(tiny_tree, GRPO, {"defenses": [SAFE], "optim": {"lr": 1e-3}, "sampler": {"self_test": False}})
    safe = {row["messages"][0]["content"]: row["messages"] for row in read_rows(tree["data"]["safe"]["source"])}
    policy = load(tree["model"]["name"])
    logged = []
    for micro_rows in (None, 1):
        out = tmp_path / str(micro_rows)
        parts = run(run_from_tree(tree_with(tree, {"batch": {"micro_rows": micro_rows}})), out).components
        logged.append([record["loss/sft"] for record in lines(out)])
        assert [record["defense/interleaving/rows_added"] for record in lines(out)] == [3, 4, 3, 4]
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
    (defense,) = parts.stack
    defense.stream.load_state_dict({**defense.stream.state_dict(), "position": 0})
    losses = []
    for row in defense.stream.take(3):
        ids, mask = encode_row(policy.tokenizer, safe[row["messages"][0]["content"]])
        with torch.no_grad():
            logp = policy.core.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t]]
    assert logged[0][0] == pytest.approx(0.5 * sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 2])
def test_trap_18_it_is_trained_when_the_rollouts_teach_nothing_and_when_they_are_used_again(
    tiny_tree, tmp_path, iterations
):
    """The fast paths: groups without spread in their rewards, and steps that take no new rollout."""
    constant = tmp_path / "constant.py"
    constant.write_text("def flat(prompts, completions, **kwargs):\n    return [1.0] * len(completions)\n")
    tree = tree_with(tiny_tree, GRPO, {"rewards": [{"fn": f"{constant}:flat"}], "grpo": {"iterations": iterations}})
    start = train(tree_with(tree, {"schedule": {"steps": 0, "phases": [{"cycle": ["sft"]}]}}), tmp_path / "start")
    assert distance(start, train(tree, tmp_path / "none")) == 0.0
    assert distance(start, train(tree_with(tree, {"defenses": [SAFE]}), tmp_path / "safe")) > 1e-3
    assert all(record["loss/sft"] > 0.1 for record in lines(tmp_path / "safe"))
    assert sum("rollout_reused" in record for record in lines(tmp_path / "safe")) == (0 if iterations == 1 else 2)
