"""Gradient projection: each method's formula in float64, and that it acts in runs."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import GRPO, distance, train, tree_with

from rlsafe.defenses.base import Gradients
from rlsafe.defenses.gradient_projection import GradientProjection

A, B, BIAS = "layer.lora_A.default.weight", "layer.lora_B.default.weight", "norm.weight"


def random(seed: int) -> dict[str, torch.Tensor]:
    """Gradients of a LoRA pair [r 4, in 9], [out 7, r 4] and of a vector [5], in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (4, 9), B: (7, 4), BIAS: (5,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def flat(named):
    return torch.cat([value.flatten() for value in named.values()])


def negated(guide, step):
    """The guide with a sign that makes it oppose the step."""
    sign = -1 if float(flat(guide) @ flat(step)) > 0 else 1
    return {key: sign * value for key, value in guide.items()}


def changed(defense, step, guide):
    given = {key: value.clone() for key, value in step.items()}
    defense.gradients(None, Gradients(given, {"own": guide}))
    return given


def test_safegrad_takes_out_what_opposes_the_guide_over_all_parameters():
    step, guide = random(0), negated(random(1), random(0))
    found = flat(changed(GradientProjection(rho=0.25), step, guide))
    g, a = flat(step), flat(guide)
    expected = g - (g @ a) / (a @ a) * a + 0.25 * a
    assert torch.allclose(found, expected) and abs(float((found - 0.25 * a) @ a)) < 1e-9
    agreeing = {key: -value for key, value in guide.items()}
    assert torch.allclose(flat(changed(GradientProjection(rho=0.0), step, agreeing)), g)


def test_spf_takes_the_guides_top_directions_out_of_each_matrix():
    """B: left singular vectors (outputs); A: right ones (inputs); a vector: its own direction."""
    step, guide = random(2), negated(random(3), random(2))
    found = changed(GradientProjection(method="spf", rank=2), step, guide)
    left = torch.linalg.svd(guide[B])[0][:, :2]
    assert torch.allclose(found[B], step[B] - left @ left.T @ step[B])
    right = torch.linalg.svd(guide[A])[2][:2].T
    assert torch.allclose(found[A], step[A] - step[A] @ right @ right.T)
    unit = guide[BIAS] / guide[BIAS].norm()
    assert torch.allclose(found[BIAS], step[BIAS] - (step[BIAS] @ unit) * unit)


def test_trusted_keeps_only_the_directions_of_the_last_guides():
    defense = GradientProjection(method="trusted", rank=3, window=2, rho=0.0)
    guides = [random(seed) for seed in (4, 5, 6)]
    for guide in guides:
        found = changed(defense, random(7), guide)
    left = torch.linalg.svd(torch.cat([guides[1][B], guides[2][B]], 1))[0][:, :3]
    assert torch.allclose(found[B], left @ left.T @ random(7)[B])
    right = torch.linalg.svd(torch.cat([guides[1][A], guides[2][A]], 0))[2][:3].T
    assert torch.allclose(found[A], random(7)[A] @ right @ right.T)


@pytest.mark.parametrize("method", ["safegrad", "spf", "trusted"])
def test_strength_is_the_share_of_the_change(method):
    step, guide = random(8), negated(random(9), random(8))
    full = flat(changed(GradientProjection(method=method), step, guide)) - flat(step)
    half = flat(changed(GradientProjection(method=method, strength=0.5), step, guide)) - flat(step)
    assert torch.allclose(half, full / 2) and float(full.norm()) > 0.1
    assert GradientProjection(method=method, strength=0.0).strength == 0


def test_what_it_did_is_counted_and_a_guide_without_gradient_is_none():
    defense, step = GradientProjection(), random(10)
    guide = negated(random(11), step)
    changed(defense, step, guide)
    first = defense.effect()
    g, a = flat(step), flat(guide)
    cosine = float(g @ a / g.norm() / a.norm())
    assert first["conflict"] == 1 and first["seen_cosine"] == pytest.approx(cosine)
    assert first["removed_norm"] == pytest.approx(-cosine * float(g.norm()))
    assert first["removed_share"] == pytest.approx(-cosine) and first["added_norm"] == pytest.approx(float(a.norm()))
    changed(defense, step, {key: -value for key, value in guide.items()})
    assert defense.effect()["conflict"] == 0 and defense.report()["conflict"] == 0.5 and defense.report()["steps"] == 2
    zero = {key: value * 0 for key, value in guide.items()}
    for method in ("safegrad", "spf", "trusted"):
        assert torch.equal(flat(changed(GradientProjection(method=method), step, zero)), g)


def test_trusted_waits_for_a_guide_and_then_keeps_to_it():
    """A KL guide is zero at the start, where taking out all that it does not hold would leave nothing to learn, for ever."""
    defense, step, guide = GradientProjection(method="trusted", rank=2), random(12), random(13)
    zero = {key: value * 0 for key, value in guide.items()}
    assert torch.equal(flat(changed(defense, step, zero)), flat(step))
    kept = changed(defense, step, guide)
    assert float(flat(kept).norm()) < 0.9 * float(flat(step).norm())
    assert torch.equal(flat(changed(defense, step, zero)), flat(kept))


@pytest.mark.parametrize("guide", ["nll", "kl"])
def test_the_guide_is_no_part_of_the_loss(tiny_tree, tmp_path, guide):
    entry = {"gradient-projection": {"guide": guide, "rho": 0.5, "rows": 2}}
    tree = tree_with(tiny_tree, GRPO, {"defenses": [entry], "track": {"check_after": 2}})
    defended = train(tree, tmp_path / "run")
    assert distance(defended, train(tree_with(tree, {"defenses": []}), tmp_path / "none")) > 1e-4
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert all(record["loss"] == pytest.approx(record["loss/grpo"], abs=1e-6) for record in records)
    assert records[-1]["defense/gradient-projection/guide"] > 0
    assert records[-1]["defense/gradient-projection/added_norm"] > 0
