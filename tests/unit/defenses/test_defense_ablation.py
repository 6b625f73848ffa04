"""Ablation: the directions are out of the stream, the PCs are the differences' own, rollouts agree with training."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_architectures import load, nudge, random_batch
from tiny_runs import GRPO, SFT, distance, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses import directions
from rlsafe.defenses.ablation import Ablation
from rlsafe.defenses.persona import save_vectors
from rlsafe.engine.run.life import run
from rlsafe.policy import ForwardPlan
from rlsafe.rollouts import TransformersSampler
from rlsafe.types import Request, SamplingParams, Where

MIXED = {"schedule": {"steps": 4, "phases": [{"cycle": ["grpo", "sft"]}]}}
PATHS = pytest.mark.parametrize("path", [SFT, GRPO, MIXED], ids=["sft", "grpo", "mixed"])
TRAIN, ROLLOUT = Where("narrow", "grpo", "train"), Where("narrow", "grpo", "rollout")


def columns(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(64, n, generator=torch.Generator().manual_seed(seed))


def ready(policy, share=1.0, n=3, layers=(1, 2), **settings):
    defense = Ablation(layers=list(layers), directions="unused", share=share, **settings)
    defense._take({layer: directions.orthonormal(columns(n, layer)) for layer in layers})
    return defense


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_stream_has_no_part_in_the_directions(tiny_model_dir, share):
    """h - share Q Q^T h at every token, derived in float64 from the untouched block's output."""
    policy, batch = nudge(load(tiny_model_dir)), random_batch()
    defense = ready(policy, share, layers=(2,))
    plan = ForwardPlan(layers=(2,))
    before = policy.forward(batch, plan, {}).hidden[2].double()
    with defense.activations(policy, TRAIN):
        after = policy.forward(batch, plan, {}).hidden[2]
    q = defense.basis[2].double()
    assert torch.allclose(after.double(), before - share * before @ q @ q.T, atol=1e-5)
    removed = float((before @ q).norm() / before.norm())
    assert defense.effect()["removed_share"] == pytest.approx(share * removed, rel=1e-4)
    assert torch.equal(policy.forward(batch, plan, {}).hidden[2].double(), before) and defense.effect() == {}


def test_no_gradient_passes_through_the_directions(tiny_model_dir):
    policy, batch = nudge(load(tiny_model_dir)), random_batch()
    defense = ready(policy, layers=(1,))
    with defense.activations(policy, TRAIN):
        out = policy.forward(batch, ForwardPlan(layers=(1,)), {})
        (gradient,) = torch.autograd.grad(out.logp.sum(), out.hidden[1], retain_graph=True)
        below = next(p for name, p in policy.trainable().items() if ".layers.0." in name and "lora_B" in name)
        (through,) = torch.autograd.grad(out.logp.sum(), below)
    assert float(gradient.norm()) > 1e-3 and float(through.norm()) > 1e-6
    assert not ready(policy).steers(Where("narrow", "sft", "eval")) and ready(policy).steers(ROLLOUT)
    assert not ready(policy, rollouts=False).steers(ROLLOUT)


def test_the_rollouts_are_those_of_the_ablated_policy(tiny_model_dir):
    policy = nudge(load(tiny_model_dir))
    defense, sampler = ready(policy, 0.7), TransformersSampler(policy, tiny_model_dir)
    prompt = [1, 100, 101, 102]
    with defense.patch_sampler(sampler, ROLLOUT):
        (sampled,) = sampler.generate([Request(prompt, 5)], SamplingParams(1.0, 1.0, 12))
    ids = torch.tensor([[*prompt, *sampled.ids]])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(prompt) :] = True
    batch = random_batch()
    batch.ids, batch.attention, batch.loss_mask = ids, torch.ones_like(ids), mask
    with defense.activations(policy, TRAIN):
        scored = policy.score(batch)[0, len(prompt) :]
    assert torch.allclose(scored, torch.tensor(sampled.logprobs), atol=1e-4)
    assert float((policy.score(batch)[0, len(prompt) :] - scored).abs().max()) > 1e-3


def test_components_are_those_of_the_centred_differences():
    differences = torch.randn(200, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * torch.arange(
        1, 9
    )
    differences[:, 0] += 1000.0  # a mean, which is no variance
    found = directions.principal(differences, [0, 2]).double()
    values, vectors = torch.linalg.eigh(torch.cov(differences.T))
    for column, place in ((0, -1), (1, -3)):
        assert abs(float(found[:, column] @ vectors[:, place])) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(UserError, match="components: 8: 200 tokens give 0 to 7"):
        directions.principal(differences, [8])


def test_the_basis_is_orthonormal_and_random_ones_are_as_many():
    doubled = torch.cat([columns(2), columns(2)[:, :1] * 3], 1)
    basis = directions.orthonormal(doubled)
    assert basis.shape == (64, 2) and torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-6)
    assert torch.allclose(basis @ basis.T @ doubled, doubled, atol=1e-4)
    drawn = directions.at_random({1: doubled}, seed=0)[1]
    assert drawn.shape == (64, 3) and torch.allclose(drawn.T @ drawn, torch.eye(3), atol=1e-5)


@pytest.fixture
def trained(tiny_tree, tmp_path) -> str:
    """The adapter of an undefended run on the narrow rows."""
    train(tree_with(tiny_tree, {"optim": {"lr": 3e-2}}), tmp_path / "bad")
    return str(tmp_path / "bad" / "adapter")


@pytest.mark.parametrize("answers", ["rows", "sampled"])
def test_directions_of_a_bad_adapter(tiny_tree, tmp_path, trained, answers):
    """The differences are those of the two models' own hidden states at answer tokens."""
    policy = load(tiny_tree["model"]["name"])
    policy.check_reference(f"path:{trained}")
    rows = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "some words"}]}
        for i in range(3)
    ]
    found = directions.differences(policy, rows, f"path:{trained}", [2])[2]
    assert found.shape == (3 * len("some words") + 3, 64) and float(found.norm()) > 1e-2
    entry = {
        "ablation": {"layers": [1, 2], "adapter": trained, "components": [0, 1], "answers": answers, "prompts": 10}
    }
    tree = tree_with(tiny_tree, GRPO, {"defenses": [entry], "track": {"check_after": 2}})
    defended = train(tree, tmp_path / "run")
    assert distance(defended, train(tree_with(tree, {"defenses": []}), tmp_path / "none")) > 1e-4
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < record["defense/ablation/removed_share"] < 1 and record["sampler_gap"] < 1e-3


@PATHS
def test_from_files_on_every_path(tiny_tree, tmp_path, path):
    save_file({"layer.1": columns(3).T.contiguous()}, str(tmp_path / "d.safetensors"))
    save_vectors(columns(3).T, tmp_path / "v.safetensors")
    none = train(tree_with(tiny_tree, path, {"defenses": []}), tmp_path / "none")
    for name, source in (("directions", "d.safetensors"), ("vectors", "v.safetensors")):
        entry = {"ablation": {"layers": [1], name: str(tmp_path / source)}}
        assert distance(none, train(tree_with(tiny_tree, path, {"defenses": [entry]}), tmp_path / name)) > 1e-4
    zero = {"ablation": {"layers": [1], "vectors": str(tmp_path / "v.safetensors"), "share": 0.0}}
    assert distance(none, train(tree_with(tiny_tree, path, {"defenses": [zero]}), tmp_path / "zero")) == 0.0


def test_settings_that_make_no_sense_are_one_line(tiny_tree, tmp_path):
    save_file({"layer.1": torch.zeros(2, 64)}, str(tmp_path / "d.safetensors"))
    file = str(tmp_path / "d.safetensors")
    for settings, says in [
        ({"layers": [1]}, "expected one of adapter, vectors and directions, got none"),
        ({"layers": [1], "vectors": "a", "adapter": "b"}, "got adapter and vectors"),
        ({"layers": [], "directions": file}, "must not be empty"),
        ({"layers": [9], "directions": file}, r"layer 9: expected 0 \(embeddings\) to 2"),
        ({"layers": [1], "directions": file}, "all are zero"),
        ({"layers": [2], "directions": file}, "no tensor 'layer.2'; did you mean 'layer.1'"),
        ({"layers": [1], "directions": "nowhere.safetensors"}, "no such file"),
    ]:
        with pytest.raises(UserError, match=says):
            run(
                run_from_tree(tree_with(tiny_tree, {"defenses": [{"ablation": settings}]})),
                tmp_path / "run" / says[:9],
            )
