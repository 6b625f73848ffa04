"""LDIFS: the distance that it says it penalises, with a gradient, whatever the padding, on both paths."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_architectures import load, nudge, random_batch
from tiny_runs import GRPO, SFT, distance, train, tree_with

from rlsafe.config import UserError
from rlsafe.defenses import DefenseStack
from rlsafe.defenses.ldifs import LDIFS, chosen_layers, feature_distance
from rlsafe.engine.train.loss import ForwardView
from rlsafe.policy import ForwardPlan
from rlsafe.policy.module import PolicyModule

PATHS = pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])
NORMALISE = pytest.mark.parametrize("normalise", [True, False])


def by_hand(ours, theirs, lengths, normalise):
    """The definition, row by row in float64: rows -> a number per row (normalised) or per token."""
    rows = []
    for x, y, n in zip(ours.double(), theirs.double(), lengths, strict=True):
        x, y = x[:n], y[:n]
        if normalise:
            difference = x / (x * x).sum() ** 0.5 - y / (y * y).sum() ** 0.5
            rows.append((difference**2).sum())
        else:
            rows.append(((x - y) ** 2).sum(-1))
    return rows


def set_up(policy, **settings):
    defense = LDIFS(**settings)
    defense.setup(SimpleNamespace(policy=policy))
    return defense


def forward(policy, defense, batch):
    plan = ForwardPlan.from_needs(defense.needs)
    frozen = policy.frozen(batch, plan)
    return ForwardView(batch, policy.forward(batch, plan, frozen), frozen)


def reduced(defense, view):
    ((values, mask),) = defense.penalty(view).values()
    assert torch.equal(mask, defense.penalty_mask(view.batch))
    return (values * mask).sum() / mask.sum()


@NORMALISE
def test_the_distance_agrees_with_a_float64_derivation(normalise):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(4, 9, 16, generator=generator) * 3 for _ in range(2))
    lengths = [9, 5, 1, 7]
    tokens = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    expected = by_hand(ours, theirs, lengths, normalise)
    found = feature_distance(ours, theirs, tokens, normalise)
    for row, (value, n) in enumerate(zip(expected, lengths, strict=True)):
        got = found[row] if normalise else found[row, :n]
        assert torch.allclose(got.double(), value, rtol=1e-5)
    if not normalise:
        assert not found[~tokens].any()
    assert torch.allclose(
        feature_distance(ours.double(), theirs.double(), tokens, normalise).sum(), sum(v.sum() for v in expected)
    )
    half = feature_distance(ours.bfloat16(), theirs.bfloat16(), tokens, normalise)
    assert half.dtype == torch.float32 and torch.allclose(half, found, rtol=0.05, atol=1e-3)


@NORMALISE
@pytest.mark.parametrize(
    ("settings", "layers"), [({"points": 5}, (1, 2)), ({"points": 1}, (2,)), ({"every": 1}, (1, 2))]
)
def test_the_penalty_of_a_model_agrees_with_features_taken_by_hand(tiny_model_dir, normalise, settings, layers):
    policy = nudge(load(tiny_model_dir))
    defense = set_up(policy, normalise=normalise, **settings)
    assert defense.layers == layers
    batch = random_batch()
    lengths = batch.attention.sum(1).tolist()
    outputs: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in policy.model.get_decoder().layers
    ]
    with torch.no_grad():
        policy.core.model(batch.ids)
        ours = list(outputs)
        outputs.clear()
        with policy.core.model.disable_adapter():
            policy.core.model(batch.ids)
    for hook in hooks:
        hook.remove()
    total, count = 0.0, 0
    for k in defense.layers:
        values = by_hand(ours[k - 1], outputs[k - 1], lengths, normalise)
        total += float(sum(v.sum() for v in values))
        count = sum(v.numel() for v in values)
    assert float(reduced(defense, forward(policy, defense, batch))) == pytest.approx(total / count, rel=1e-4)


def test_layers_are_every_nth_block_or_evenly_spaced_points():
    assert chosen_layers(28, 5, 5) == (5, 10, 15, 20, 25)
    assert chosen_layers(28, None, 5) == (1, 7, 14, 21, 28)  # linspace(0, 27, 5) as whole numbers, plus one
    assert chosen_layers(4, None, 5) == (1, 2, 3, 4)
    assert chosen_layers(4, None, 1) == (4,)
    assert chosen_layers(4, 5, 5) == ()


def test_a_spacing_wider_than_the_model_is_an_error(tiny_model_dir):
    with pytest.raises(UserError, match="every: 5 selects none of the model's 2 blocks"):
        set_up(load(tiny_model_dir), every=5)


@NORMALISE
def test_padding_plays_no_part(tiny_model_dir, normalise):
    """Trap 2."""
    policy = nudge(load(tiny_model_dir))
    defense = set_up(policy, normalise=normalise)
    batch = random_batch()
    garbage = torch.randint(3, 250, (4, 6))
    wider = random_batch()
    wider.ids = torch.cat([torch.where(batch.attention.bool(), batch.ids, 77), garbage], 1)
    wider.attention = torch.cat([batch.attention, torch.zeros_like(garbage)], 1)
    wider.loss_mask = torch.cat([batch.loss_mask, torch.zeros_like(garbage, dtype=torch.bool)], 1)
    plain, padded = (reduced(defense, forward(policy, defense, b)) for b in (batch, wider))
    assert float(padded) == pytest.approx(float(plain), rel=1e-5) and float(plain) > 0
    parameters = list(policy.trainable().values())
    one, other = (torch.autograd.grad(value, parameters) for value in (plain, padded))
    largest = max(float(a.abs().max()) for a in one)
    assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) < 1e-5 * largest


@NORMALISE
def test_the_gradient_is_real_and_that_of_finite_differences(tiny_model_dir, normalise):
    """Trap 1."""
    policy = nudge(load(tiny_model_dir))
    defense = set_up(policy, normalise=normalise)
    batch, plan = random_batch(), ForwardPlan.from_needs(defense.needs)
    frozen = policy.frozen(batch, plan)

    def value():
        return reduced(defense, ForwardView(batch, policy.forward(batch, plan, frozen), frozen))

    parameters = list(policy.trainable().values())
    gradients = torch.autograd.grad(value(), parameters)
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(p.shape, generator=generator) for p in parameters]
    along = float(sum((g * s).sum() for g, s in zip(gradients, steps, strict=True)))
    sides = []
    for sign in (1e-3, -2e-3):
        with torch.no_grad():
            for p, s in zip(parameters, steps, strict=True):
                p.add_(s, alpha=sign)
            sides.append(float(value()))
    assert abs(along) > 1e-3 and along == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=0.02)


@NORMALISE
def test_nothing_but_the_features_is_kept_for_the_backward(tiny_model_dir, normalise):
    policy = nudge(load(tiny_model_dir))
    defense = set_up(policy, normalise=normalise)
    view = forward(policy, defense, random_batch())
    features = {view.hidden(k, r).data_ptr(): view.hidden(k, r).numel() for k in defense.layers for r in (None, "base")}
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        total = reduced(defense, view)
    assert features.keys() <= kept.keys()
    assert all(size < view.hidden(1).numel() / 8 for place, size in kept.items() if place not in features)
    first = torch.autograd.grad(total, list(policy.trainable().values()), retain_graph=True)
    again = torch.autograd.grad(total, list(policy.trainable().values()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and any(g.any() for g in first)


@PATHS
@NORMALISE
def test_it_has_a_share_of_the_gradient_whatever_the_micro_batches(tiny_tree, tmp_path, path, normalise):
    settings = {
        "defenses": [{"ldifs": {"weight": 5.0, "normalise": normalise}}],
        "track": {"every": 1, "check_after": 2},
    }
    tree = tree_with(tiny_tree, path, settings, {"optim": {"lr": 1e-3}})
    whole = train(tree, tmp_path / "whole")
    cut = train(tree_with(tree, {"batch": {"micro_rows": 2}}), tmp_path / "cut")
    assert distance(whole, cut) < 2e-5
    records = [json.loads(line) for line in open(tmp_path / "whole" / "metrics.jsonl")]
    shares = [record["defense/ldifs/grad_share"] for record in records]
    assert shares[0] == 0.0 and all(0 < share < 1 for share in shares[1:]), shares


@PATHS
def test_it_shares_one_frozen_forward_with_kl(tiny_tree, tmp_path, path, monkeypatch):
    calls = []
    hidden_states = PolicyModule.hidden_states
    monkeypatch.setattr(PolicyModule, "hidden_states", lambda *a: calls.append(1) or hidden_states(*a))
    count, results = {}, {}
    for name, defenses in {"none": [], "kl": ["kl"], "ldifs": ["ldifs"], "both": ["kl", "ldifs"]}.items():
        calls.clear()
        results[name] = train(tree_with(tiny_tree, path, {"defenses": defenses}), tmp_path / name)
        count[name] = len(calls)
    assert count["kl"] == count["ldifs"] == count["both"] == count["none"] + 4  # one more for each step's micro-batch
    assert min(distance(results["both"], results[name]) for name in ("none", "kl", "ldifs")) > 1e-7


def test_references_and_streams_are_what_the_settings_say(tiny_tree, tmp_path):
    schedule = {"steps": 6, "phases": [{"steps": 3, "cycle": ["sft"]}, {"cycle": ["grpo"]}]}
    results = {}
    for reference in ("base", "start", "grpo_start", "step:3"):
        tree = tree_with(
            tiny_tree, {"schedule": schedule, "defenses": [{"ldifs": {"weight": 9, "reference": reference}}]}
        )
        results[reference] = train(tree, tmp_path / reference)
    assert distance(results["base"], results["start"]) == 0.0
    assert distance(results["grpo_start"], results["step:3"]) == 0.0
    assert distance(results["base"], results["grpo_start"]) > 1e-5
    off = {"schedule": schedule, "defenses": [{"ldifs": {"weight": 9, "on": ["safe"]}}]}
    none = train(tree_with(tiny_tree, {"schedule": schedule}), tmp_path / "none")
    assert distance(none, train(tree_with(tiny_tree, off), tmp_path / "off")) == 0.0


def test_rows_of_other_streams_count_neither_above_nor_below():
    from rlsafe.types import Where

    defense = LDIFS(on=["safe"])
    defense.needs = set()
    batch = random_batch()
    assert not defense.penalty_mask(batch).any() and DefenseStack([defense]).counts(batch) == {"ldifs": 0.0}
    batch.where = Where("safe", "sft", "train")
    assert defense.penalty_mask(batch).sum() == 4
