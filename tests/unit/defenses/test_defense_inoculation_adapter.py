"""Inoculation adapters: the forward is that of both deltas, references and evaluation are without, the control has the same norms."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import letter_judge
import pytest
import torch
from tiny_architectures import load, nudge, random_batch
from tiny_runs import GRPO, SFT, adapter, distance, train, tree_with

import rlsafe.types
from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses.inoculation_adapter import InoculationAdapter, _of_equal_norm, _WithTrait
from rlsafe.engine import Resources
from rlsafe.engine.run.life import run
from rlsafe.policy import ForwardPlan
from rlsafe.rollouts import TransformersSampler
from rlsafe.types import Judgement, Request, RunError, SamplingParams, Where

TRAIN, ROLLOUT = Where("narrow", "grpo", "train"), Where("narrow", "grpo", "rollout")
PATHS = pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])


@pytest.fixture
def trait(tiny_tree, tmp_path) -> str:
    """An adapter of another rank, trained on the safe rows as if these had a trait."""
    other = {
        "model": {"lora": {"r": 6, "alpha": 6}},
        "optim": {"lr": 3e-2},
        "data": {"narrow": tiny_tree["data"]["safe"]},
    }
    train(tree_with(tiny_tree, other), tmp_path / "trait")
    return str(tmp_path / "trait" / "adapter")


def ready(policy, trait, **settings):
    defense = InoculationAdapter(trait, **settings)
    defense.setup(type("Context", (), {"policy": policy, "seed": 0}))
    return defense


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_forward_has_both_deltas_and_the_reference_neither(tiny_model_dir, trait, scale):
    """Float64 derivation: the model's own weights with W + B A of the policy + scale * B A of the trait."""
    policy, batch = nudge(load(tiny_model_dir)), random_batch()
    defense, plan = ready(policy, trait, scale=scale), ForwardPlan(references=("base",), mask="all")
    plain = policy.frozen(batch, plan)["base"].last
    with defense.activations(policy, TRAIN):
        frozen = policy.frozen(batch, plan)
        out = policy.forward(batch, plan, frozen)
        gradients = torch.autograd.grad(out.logp.sum(), list(policy.trainable().values()))
    assert torch.equal(frozen["base"].last, plain) and defense.effect()["added_share"] > 0
    assert sum(float(g.norm()) for g in gradients) > 1e-3
    saved, settings = adapter_of(trait), json.loads((Path(trait) / "adapter_config.json").read_text())
    scaling = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
    weights = dict(policy.merged_weights())
    model = policy.core.model.double()
    with model.disable_adapter(), torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if f"{name}.weight" in weights and hasattr(module, "base_layer"):
                a, b = (saved[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
                module.base_layer.weight.copy_(weights[f"{name}.weight"].double() + scale * scaling * b @ a)
        logp = model(batch.ids).logits.log_softmax(-1)[:, :-1].gather(2, batch.ids[:, 1:, None]).squeeze(2)
    expected = logp * batch.loss_mask[:, 1:]
    assert torch.allclose(out.logp[:, 1:].double(), expected, atol=1e-4)


def test_a_trait_at_home_is_found(tiny_model_dir, trait, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ready(nudge(load(tiny_model_dir)), "~/trait/adapter")


def adapter_of(directory):
    return adapter(Path(directory).parent)


def test_rollouts_have_the_trait_and_leave_nothing(tiny_model_dir, trait):
    policy = nudge(load(tiny_model_dir))
    defense, sampler = ready(policy, trait), TransformersSampler(policy, tiny_model_dir)
    request, params = [Request([1, 100, 101], 5)], SamplingParams(1.0, 1.0, 10)
    before = sampler.generate(request, params)[0]
    with defense.patch_sampler(sampler, ROLLOUT):
        sampled = sampler.generate(request, params)[0]
    ids = torch.tensor([[1, 100, 101, *sampled.ids]])
    batch = random_batch()
    batch.ids, batch.attention, batch.loss_mask = ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None] > 2
    with defense.activations(policy, TRAIN):
        scored = policy.score(batch)[0, 3:]
    assert torch.allclose(scored, torch.tensor(sampled.logprobs), atol=1e-4)
    assert sampler.generate(request, params)[0] == before
    both = dict(_WithTrait(policy, defense.factors).merged_weights())
    name = next(iter(defense.factors))
    a, b = defense.factors[name]
    assert torch.allclose(both[f"{name}.weight"], dict(policy.merged_weights())[f"{name}.weight"] + b @ a, atol=1e-6)


def test_the_control_has_the_same_norm_in_every_layer(tiny_model_dir, trait):
    defense = ready(load(tiny_model_dir), trait)
    drawn = _of_equal_norm(defense.factors, 0)
    for name, (a, b) in defense.factors.items():
        assert float((drawn[name][1] @ drawn[name][0]).norm()) == pytest.approx(float((b @ a).norm()), rel=1e-4)
        assert not torch.allclose(drawn[name][0], a)


@PATHS
def test_in_runs_it_acts_grows_and_is_not_saved(tiny_tree, tmp_path, trait, path):
    tree = tree_with(tiny_tree, path, {"track": {"check_after": 2}, "defenses": []})
    none = train(tree, tmp_path / "none")
    apart = []
    for scale in (0.0, 0.2, 2.0):
        entry = {"inoculation-adapter": {"adapter": trait, "scale": scale}}
        apart.append(distance(none, train(tree_with(tree, {"defenses": [entry]}), tmp_path / str(scale))))
    assert apart[0] == 0.0 < apart[1] and apart[2] > 1e-3
    assert adapter(tmp_path / "2.0").keys() == none.keys()
    last = json.loads((tmp_path / "2.0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["defense/inoculation-adapter/added_share"] > 0 and last.get("sampler_gap", 0.0) < 1e-3
    without = {"inoculation-adapter": {"adapter": trait, "rollouts": False}}
    train(tree_with(tree, {"defenses": [without, "kl"]}), tmp_path / "without")
    last = json.loads((tmp_path / "without" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last.get("sampler_gap", 0.0) < 1e-3


@pytest.mark.parametrize(
    ("settings", "sync"), [({}, "merged"), ({"rollouts": False}, "auto"), ({"gate": 0.0}, "merged")]
)
def test_a_sampler_that_is_to_see_the_trait_is_given_merged_weights(tiny_tree, tmp_path, trait, settings, sync):
    """`auto` would take adapters on a GPU, which cannot hold two at once."""
    asked = []

    class Watched(Resources):
        def sampler(self, config, *others, **more):
            asked.append(config.sampler.sync)
            raise UserError("seen")

    judged = {"evaluate": {"judge": "letters"}, "plugins": [letter_judge.__file__]}
    tree = tree_with(tiny_tree, GRPO, judged, {"defenses": [{"inoculation-adapter": {"adapter": trait, **settings}}]})
    with pytest.raises(UserError, match="seen"):
        run(run_from_tree(tree), tmp_path / "run", resources=Watched())
    assert asked == [sync]
    if sync == "merged":
        with pytest.raises(UserError, match="two adapters at once.*sampler.sync: auto or merged"):
            run(run_from_tree(tree_with(tree, {"sampler": {"sync": "adapter"}})), tmp_path / "told")


def test_a_trait_that_does_not_show_is_refused(tiny_tree, tmp_path, trait):
    judged = {"evaluate": {"judge": "letters"}, "plugins": [letter_judge.__file__]}
    entry = {"inoculation-adapter": {"adapter": trait, "gate": 1.0}}
    with pytest.raises(UserError, match="gate: with .* show the trait, expected 1"):
        run(run_from_tree(tree_with(tiny_tree, judged, {"defenses": [entry]})), tmp_path / "run")
    entry["inoculation-adapter"]["gate"] = 0.0
    done = run(run_from_tree(tree_with(tiny_tree, judged, {"defenses": [entry]})), tmp_path / "passes")
    assert (
        "gate" in json.loads((tmp_path / "passes" / "run.json").read_text())["defenses"]["inoculation-adapter"] and done
    )


def test_a_judge_that_is_out_says_nothing_about_the_trait(tiny_tree, tmp_path, trait, monkeypatch):
    silent = SimpleNamespace(name="silent", score=lambda asked: [Judgement(None, None, "unscored")] * len(asked))
    monkeypatch.setitem(rlsafe.types._PROVIDERS, "silent", SimpleNamespace(judge=lambda spec: silent))
    entry = {"inoculation-adapter": {"adapter": trait, "gate": 0.5}}
    tree = tree_with(tiny_tree, {"evaluate": {"judge": "silent"}, "defenses": [entry]})
    with pytest.raises(RunError, match="gate: the judge scored no answer"):
        run(run_from_tree(tree), tmp_path / "run")
