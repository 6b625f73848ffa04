"""Feature blocking: the one-sided penalty in float64, what is free, what a file may say, and that it acts on both paths."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_architectures import load, nudge, random_batch
from tiny_runs import GRPO, SFT, distance, train, tree_with

from rlsafe.defenses.feature_block import FeatureBlock
from rlsafe.engine.train.loss import ForwardView
from rlsafe.policy import ForwardPlan

PATHS = pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(0))


def blocked(policy, defense, batch):
    plan = ForwardPlan.from_needs(defense.needs)
    frozen = policy.frozen(batch, plan)
    ((values, mask),) = defense.penalty(ForwardView(batch, policy.forward(batch, plan, frozen), frozen)).values()
    return (values * mask).sum() / mask.sum()


@pytest.mark.parametrize("sae", [False, True])
def test_it_agrees_with_a_float64_derivation(tiny_model_dir, tmp_path, sae):
    """Signed features: raised ones are penalised above the base's, lowered ones below it."""
    policy, batch = nudge(load(tiny_model_dir)), random_batch()
    given = {"layer.2": rows(5), "signs.2": torch.tensor([1.0, 1, -1, 1, -1])}
    save_file(given | ({"bias.2": torch.linspace(-1, 1, 5)} if sae else {}), str(tmp_path / "d.safetensors"))
    defense = FeatureBlock(layer=2, directions=str(tmp_path / "d.safetensors"))
    context = type("Context", (), {"policy": policy})
    defense.setup(context)
    found = blocked(policy, defense, batch)
    gradients = torch.autograd.grad(found, list(policy.trainable().values()))
    assert sum(float(g.square().sum()) for g in gradients) > 1e-8
    model = policy.core.model.double()
    with torch.no_grad():
        ours = model(batch.ids, output_hidden_states=True)
        states = {}
        hook = policy.core.residual
        with hook.tap([2]) as tapped:
            model(batch.ids)
        states["ours"] = tapped[2]
        with model.disable_adapter(), hook.tap([2]) as tapped:
            model(batch.ids)
        states["base"] = tapped[2]
    assert ours.logits.dtype == torch.float64
    d = rows(5).double()
    if sae:
        z = {name: (h @ d.T + torch.linspace(-1, 1, 5, dtype=torch.float64)).relu() for name, h in states.items()}
    else:
        z = {name: h @ (d / d.norm(dim=1, keepdim=True)).T for name, h in states.items()}
    total = 0.0
    for row, t in batch.loss_mask.nonzero().tolist():
        for k, sign in enumerate([1, 1, -1, 1, -1]):
            total += max(0.0, sign * float(z["ours"][row, t, k] - z["base"][row, t, k])) ** 2
    assert float(found) == pytest.approx(total / int(batch.loss_mask.sum()), rel=1e-4) and total > 1e-3


@PATHS
def test_it_acts_in_runs_and_zero_is_none(tiny_tree, tmp_path, path):
    save_file({"layer.1": rows(8)}, str(tmp_path / "d.safetensors"))
    entry = {"layer": 1, "directions": str(tmp_path / "d.safetensors")}
    tree = tree_with(tiny_tree, path, {"track": {"check_after": 2}})
    none = train(tree_with(tree, {"defenses": []}), tmp_path / "none")
    assert (
        distance(none, train(tree_with(tree, {"defenses": [{"feature-block": entry | {"weight": 0}}]}), tmp_path / "0"))
        == 0
    )
    excess = []
    for weight in (1.0, 100.0):
        out = tmp_path / str(weight)
        assert (
            distance(none, train(tree_with(tree, {"defenses": [{"feature-block": entry | {"weight": weight}}]}), out))
            > 1e-4
        )
        excess.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["defense/feature-block/excess"])
    assert 0 <= excess[1] < excess[0]
