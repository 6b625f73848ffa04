"""KL: the divergence that it says, on the tokens that it says, from the model's own logits in float64."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import conversation, write_jsonl
from tiny_architectures import load, nudge, random_batch
from tiny_runs import GRPO, SFT, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses.kl import KL
from rlsafe.engine.run.life import run
from rlsafe.engine.train.loss import ForwardView
from rlsafe.policy import ForwardPlan
from rlsafe.types import RunError, Where


def value(policy, defense, batch, temperature=1.0):
    plan = ForwardPlan.from_needs(defense.needs)
    frozen = policy.frozen(batch, plan, temperature)
    view = ForwardView(batch, policy.forward(batch, plan, frozen, temperature), frozen)
    ((values, mask),) = defense.penalty(view).values()
    assert torch.equal(mask, defense.penalty_mask(batch)) and not values[~mask].any()
    return (values * mask).sum() / mask.sum()


def by_hand(policy, batch, mask, temperature=1.0, estimator="full"):
    """Mean over masked targets, row by row and token by token, from a float64 copy of the model."""
    model = policy.core.model.double()
    with torch.no_grad():
        ours = (model(batch.ids).logits / temperature).log_softmax(-1)
        with model.disable_adapter():
            theirs = (model(batch.ids).logits / temperature).log_softmax(-1)
    terms = []
    for row in range(len(batch)):
        for t in range(1, batch.ids.shape[1]):
            if not (batch.attention[row, t] and (mask == "all" or batch.loss_mask[row, t])):
                continue
            p, q, token = ours[row, t - 1], theirs[row, t - 1], batch.ids[row, t]
            ratio = q[token] - p[token]
            terms.append((p.exp() * (p - q)).sum() if estimator == "full" else ratio.exp() - ratio - 1)
    return float(torch.stack(terms).mean())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("estimator", "mask"), [("full", "all"), ("full", "answer"), ("k3", "answer")])
def test_it_agrees_with_a_float64_derivation_and_its_gradient_is_real(tiny_model_dir, estimator, mask, temperature):
    policy, batch = nudge(load(tiny_model_dir)), random_batch()
    if estimator == "k3":
        batch.where = Where("narrow", "grpo", "train")
    defense = KL(estimator=estimator, mask=mask)
    found = value(policy, defense, batch, temperature)
    gradients = torch.autograd.grad(found, list(policy.trainable().values()))
    assert sum(float(g.square().sum()) for g in gradients) > 1e-8
    expected = by_hand(policy, batch, mask, temperature, estimator)
    assert float(found) == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    if estimator == "full":  # the reference as well
        plan = ForwardPlan.from_needs(defense.needs)
        out = policy.forward(batch, plan, policy.frozen(batch, plan, 0.7), 0.7, kl_temperature=temperature)
        kl, wanted = out.kl["base"], defense.penalty_mask(batch)
        assert float((kl * wanted).sum() / wanted.sum()) == pytest.approx(expected, rel=1e-4)
    other = by_hand(policy, batch, "all" if mask == "answer" else "answer", temperature, estimator)
    assert abs(other - expected) > 1e-3 * expected


def test_on_rollouts_it_is_taken_at_temperature_one_unless_told_otherwise(tiny_tree, tmp_path):
    """At the temperature of rollouts a penalty would be stronger than on supervised rows, with which it shares one mean."""
    hot = tree_with(tiny_tree, GRPO, {"grpo": {"temperature": 0.7}, "defenses": [{"kl": {"weight": 5.0}}]})
    default = train(hot, tmp_path / "default")
    for number, (of_kl, like_the_default) in enumerate([(1.0, True), (None, False)]):
        tree = tree_with(hot, {"grpo": {"temperature": 0.7, "kl_temperature": of_kl}})
        assert same(default, train(tree, tmp_path / str(number))) is like_the_default


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_k3_needs_samples_of_the_policy(tiny_tree, tmp_path, tiny_model_dir):
    with pytest.raises(UserError, match="estimator k3 needs GRPO completions"):
        run(run_from_tree(tree_with(tiny_tree, {"defenses": [{"kl": {"estimator": "k3"}}]})), tmp_path / "run")
    batch = random_batch()
    assert not KL(estimator="k3").penalty_mask(batch).any()
    assert KL(estimator="k3").penalty(SimpleNamespace(batch=batch)) == {}


@pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])
def test_it_can_act_on_the_safe_rows_only(tiny_tree, tmp_path, path):
    """The variant on aligned out-of-domain rows: averaged over their tokens; without such rows it is a dead defense."""
    kl = {"kl": {"weight": 5.0, "on": ["safe"], "mask": "answer"}}
    added = {"interleaving": {"fraction": 0.5}}
    tree = tree_with(tiny_tree, path, {"track": {"check_after": 2, "every": 1}})
    both = train(tree_with(tree, {"defenses": [added, kl]}), tmp_path / "both")
    alone = train(tree_with(tree, {"defenses": [added]}), tmp_path / "alone")
    assert max(float((both[n] - alone[n]).abs().max()) for n in both) > 1e-4
    with pytest.raises(RunError, match="'kl' had no rows for its penalty"):
        run(run_from_tree(tree_with(tree, {"defenses": [kl]})), tmp_path / "dead")


def test_its_own_rows_may_be_the_runs_safe_ones(tiny_tree, tmp_path, safe_file):
    """So that a config names them in one place."""
    tree = tree_with(tiny_tree, {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}})
    own = {
        source: train(tree_with(tree, {"defenses": [{"kl": {"source": source, "target_share": 0.5}}]}), tmp_path / name)
        for name, source in (("named", safe_file), ("file", "data.safe"))
    }
    assert all(torch.equal(own[safe_file][name], own["data.safe"][name]) for name in own["data.safe"])
    with pytest.raises(UserError, match="no safe rows; set data.safe.source"):
        narrow = {"data": {**tree["data"], "safe": None}}
        run(run_from_tree(tree_with(tree, narrow, {"defenses": [{"kl": {"source": "data.safe"}}]})), tmp_path / "none")


def test_its_own_rows_are_treated_as_the_safe_ones(tiny_tree, tmp_path, safe_file):
    """What data.safe says of bad rows and of what is trained on holds for another source too."""
    talk = [*conversation("why?", "so.")["messages"], *conversation("and?", "no.")["messages"]]
    rows = [{"messages": talk}, {"messages": []}, {"messages": talk[:3]}, {"messages": talk[2:]}]
    source = write_jsonl(tmp_path / "own.jsonl", rows)
    tree = tree_with(tiny_tree, {"schedule": {"steps": 1}, "defenses": [{"kl": {"source": source}}]})
    with pytest.raises(UserError, match=r"own.jsonl:2: messages is an empty list"):
        run(run_from_tree(tree), tmp_path / "strict")
    safe = {"source": safe_file, "on_bad_row": "skip", "train_on": "assistant"}
    done = run(run_from_tree(tree_with(tree, {"data": {**tree["data"], "safe": safe}})), tmp_path / "skipped")
    notes = "\n".join(done.summary())
    assert f"{source}: 1 of 4 rows are bad and were skipped" in notes
    assert f"1 of 3 rows end without an answer to train on and were skipped (the first: {source}:3)" in notes
    assert "of which only the last is trained on" not in notes


def test_a_reference_may_be_the_adapter_of_an_earlier_run(tiny_tree, tmp_path):
    """`path:DIR` of what a run saved is the same reference as the snapshot that the run itself takes at that step."""
    tree = tree_with(
        tiny_tree, {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}, "optim": {"schedule": "constant"}}
    )
    train(tree, tmp_path / "warm")
    results, divergences = {}, {}
    for name, reference in {"path": f"path:{tmp_path / 'warm' / 'adapter'}", "step": "step:2", "base": "base"}.items():
        kl = {"kl": {"weight": 3.0, "reference": reference, "on": ["narrow"], "from_step": 2}}
        results[name] = train(tree_with(tree, {"schedule": {"steps": 5}, "defenses": [kl]}), tmp_path / name)
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        divergences[name] = [record["defense/kl/full"] for record in records[2:]]
    assert divergences["path"] == pytest.approx(divergences["step"], rel=1e-4, abs=1e-7)
    assert (
        divergences["path"][0] < 1e-6 < divergences["path"][-1]
    )  # the two part from the step on at which it was saved
    assert divergences["base"][0] > 1e-4
    distances = {
        name: max(float((results["path"][n] - results[name][n]).abs().max()) for n in results["path"])
        for name in ("step", "base")
    }
    assert distances["step"] < 1e-6 and distances["base"] > 1e-4
