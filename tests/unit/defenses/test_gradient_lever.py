"""The gradient lever: the parts are the gradients that they say, nothing is visited in vain, and a share is a share."""

from __future__ import annotations

import json
import textwrap
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_architectures import load, nudge, random_batch
from tiny_runs import GRPO, SFT, distance, train, tree_with

from rlsafe.config import GrpoConfig, UserError, run_from_tree
from rlsafe.defenses import Defense, DefenseStack
from rlsafe.defenses.gradient_projection import GradientProjection
from rlsafe.defenses.interleaving import Interleaving
from rlsafe.defenses.kl import KL
from rlsafe.defenses.vectors import norm
from rlsafe.engine.plan.schedule import PlannedPart
from rlsafe.engine.run.life import run
from rlsafe.engine.train import gradients, update
from rlsafe.engine.train.gradients import PartGradients, edit
from rlsafe.engine.train.loss import Micro, NotFinite, StepLoss, count
from rlsafe.policy import ForwardPlan
from rlsafe.types import Where

MIXED = {"schedule": {"steps": 4, "phases": [{"cycle": ["both"]}], "kinds": {
    "both": [{"path": "grpo"}, {"path": "sft", "rows": 3, "weight": 0.5}]}}}  # fmt: skip
PATHS = pytest.mark.parametrize(
    "path", [SFT, GRPO, pytest.param(MIXED, marks=pytest.mark.integration)], ids=["sft", "grpo", "mixed"]
)


class Watching(Defense):
    """Sees parts and changes nothing."""

    name = "watching"
    apart = frozenset({"narrow", "safe", "penalty"})

    def gradients(self, policy, gradients):
        self.step = {key: value.clone() for key, value in gradients.step.items()}
        self.parts = gradients.parts


class Own(KL):
    """KL whose gradient is only looked at."""

    name = "own"
    apart = frozenset({"own"})

    def gradients(self, policy, gradients):
        self.step, self.parts = gradients.step, gradients.parts


def batches():
    """Narrow rows in two micro-batches and safe ones in a third."""
    narrow, more, safe = random_batch(seed=1), random_batch(rows=2, seed=2), random_batch(rows=3, seed=3)
    safe.where = Where("safe", "sft", "train")
    return [Micro(narrow), Micro(more), Micro(safe, weight=0.5)]


def backward(policy, defenses, micros, added=()):
    """One step's backwards as `update` does them; gives the gradients that the optimizer would get. added: parts whose share is
    measured."""
    stack = DefenseStack(defenses)
    for defense in defenses:
        defense.needs = defense.needs or set()
    world = SimpleNamespace(
        policy=policy,
        stack=stack,
        accelerator=Accelerator(cpu=True),
        several=False,
        backward=lambda loss: loss.backward(),
        measured=frozenset({0}),
    )
    plan = ForwardPlan.from_needs(stack.needs)
    loss = StepLoss(GrpoConfig(), stack, plan, count(micros, stack, GrpoConfig()))
    parts = PartGradients.of(world, SimpleNamespace(index=0, parts=added))
    for micro in micros:
        total, terms = loss.forward(policy, micro, policy.frozen(micro.batch, plan))
        parts.backward(micro, total, terms) if parts else total.backward()
    if stack.reshaping:
        edit(world, parts)
    return {key: p.grad for key, p in policy.trainable().items()}


def by_hand(policy, batches, kl_weight=0.0):
    """{stream or "penalty": {parameter: gradient}} in float64, from the model's own logits and whole-step means."""
    model = policy.core.model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    names = list(policy.trainable())
    tokens = sum(int(m.batch.loss_mask.sum()) for m in batches)
    predicted = sum(int(m.batch.predicted_mask.sum()) for m in batches)
    terms = {}
    for micro in batches:
        batch = micro.batch
        ours = model(batch.ids).logits.log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            theirs = model(batch.ids).logits.log_softmax(-1)
        logp = ours[:, :-1].gather(2, batch.ids[:, 1:, None]).squeeze(2)
        loss = -(logp * batch.loss_mask[:, 1:]).sum() * micro.weight / tokens
        terms[batch.where.stream] = terms.get(batch.where.stream, 0) + loss
        kl = (ours.exp() * (ours - theirs)).sum(-1)[:, :-1]
        terms["penalty"] = terms.get("penalty", 0) + kl_weight * (kl * batch.predicted_mask[:, 1:]).sum() / predicted
    found = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        found[name] = dict(zip(names, grads, strict=True))
    return found


def close(one, other):
    return norm({key: one[key] - other[key] for key in other}) < 1e-4 * norm(other)


def test_parts_agree_with_a_float64_derivation(tiny_model_dir):
    policy, micros, watching = nudge(load(tiny_model_dir)), batches(), Watching()
    backward(policy, [KL(weight=0.5), watching], micros)
    expected = by_hand(policy, micros, kl_weight=0.5)
    assert watching.parts.keys() == {"narrow", "safe", "penalty"}
    for name, part in watching.parts.items():
        assert close(part, expected[name]) and norm(part) > 1e-3, name
    whole = {key: sum(part[key] for part in expected.values()) for key in expected["narrow"]}
    assert close(watching.step, whole)


def test_an_own_penalty_is_shown_and_left_out_of_the_step(tiny_model_dir):
    policy, micros, own = nudge(load(tiny_model_dir)), batches(), Own(weight=0.5)
    given = backward(policy, [own], micros)
    given = {key: value.clone() for key, value in given.items()}
    expected = by_hand(policy, micros, kl_weight=0.5)
    assert close(own.parts["own"], expected["penalty"])
    assert close(given, {key: expected["narrow"][key] + expected["safe"][key] for key in given})


def test_safe_rows_whose_share_is_measured_are_a_part_as_ever(tiny_model_dir):
    policy, micros = nudge(load(tiny_model_dir)), batches()
    micros[2].source = "interleaving"
    seen = []
    for added in ((), (PlannedPart("safe", "sft", 3, defense="interleaving"),)):
        for parameter in policy.trainable().values():
            parameter.grad = None
        watching = Watching()
        given = backward(policy, [watching], micros, added)
        seen.append({**watching.parts, "step": {key: value.clone() for key, value in given.items()}})
    assert seen[0].keys() == seen[1].keys() == {"narrow", "safe", "step"}
    assert all(close(seen[1][name], seen[0][name]) for name in seen[0])


@pytest.mark.parametrize("part", ["step", "own/gradient-projection"])
def test_a_gradient_that_is_not_finite_reaches_no_defense(tiny_model_dir, part):
    """They would fail on it, or remember it in the steps to come."""
    policy = load(tiny_model_dir)
    trusted, dosed = GradientProjection(method="trusted"), Interleaving(dose="gradient", target_share=0.3)
    dosed.owed = 0.25
    for parameter in policy.trainable().values():
        parameter.grad = torch.full_like(parameter, float("nan") if part == "step" else 1.0)
    guide = {key: torch.full_like(p, float("inf" if part != "step" else 1.0)) for key, p in policy.trainable().items()}
    parts = SimpleNamespace(finish=lambda: {"own/gradient-projection": guide}, shows=lambda name: False)
    run = SimpleNamespace(policy=policy, stack=DefenseStack([trusted, dosed]))
    with pytest.raises(NotFinite, match="the gradient norm is nan" if part == "step" else f"norm of {part} is inf"):
        edit(run, parts)
    assert trusted.recent == [] and dosed.owed == 0.25


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_target_share_is_the_share_of_the_norms(tiny_model_dir, share):
    policy, micros = nudge(load(tiny_model_dir)), batches()
    given = {key: value.clone() for key, value in backward(policy, [KL(target_share=share)], micros).items()}
    expected = by_hand(policy, micros, kl_weight=1.0)
    rest = {key: expected["narrow"][key] + expected["safe"][key] for key in given}
    scale = share / (1 - share) * norm(rest) / norm(expected["penalty"])
    assert close(given, {key: rest[key] + scale * expected["penalty"][key] for key in given})
    added = {key: given[key] - rest[key] for key in given}
    assert norm(added) / (norm(added) + norm(rest)) == pytest.approx(share, rel=1e-3)


def test_a_term_may_have_any_name(tiny_model_dir):
    """A stroke in it is none of the defense's name: the penalty still gets its share."""

    class Stroked(KL):
        name = "stroked"

        def penalty(self, view):
            return {f"per/{name}": value for name, value in super().penalty(view).items()}

    policy, micros = nudge(load(tiny_model_dir)), batches()
    named = {key: value.clone() for key, value in backward(policy, [KL(target_share=0.5)], micros).items()}
    for parameter in policy.trainable().values():
        parameter.grad = None
    assert close(backward(policy, [Stroked(target_share=0.5)], micros), named)


# ------------------------------------------------------------------------------------------------ in runs

WATCHER = """
import rlsafe

@rlsafe.defense("watcher")
class Watcher(rlsafe.Defense):
    apart = frozenset({"narrow", "safe", "penalty"})

    def gradients(self, policy, gradients):
        self.seen = {name: sum(float(g.norm()) for g in part.values()) for name, part in gradients.parts.items()}

    def effect(self):
        return self.seen

@rlsafe.defense("halver")
class Halver(rlsafe.Defense):
    '''A newcomer's: nothing but the hook.'''

    def __init__(self, scale: float = 0.5):
        self.scale = scale

    def gradients(self, policy, gradients):
        for gradient in gradients.step.values():
            gradient *= self.scale
"""


@pytest.fixture
def watcher(tmp_path) -> str:
    file = tmp_path / "watcher.py"
    file.write_text(textwrap.dedent(WATCHER))
    return str(file)


@PATHS
def test_looking_at_parts_changes_nothing(tiny_tree, tmp_path, watcher, path):
    others = [{"kl": {"weight": 0.5}}, {"interleaving": {"fraction": 0.5}}]
    tree = tree_with(tiny_tree, path, {"batch": {"micro_rows": 2}, "plugins": [watcher], "defenses": others})
    plain = train(tree, tmp_path / "plain")
    watched = train(tree_with(tree, {"defenses": [*others, "watcher"]}), tmp_path / "watched")
    assert distance(plain, watched) < 1e-4  # sums in another order, which Adam makes steps of
    records = [json.loads(line) for line in open(tmp_path / "watched" / "metrics.jsonl")]
    last = records[-1]
    assert all(last[f"defense/watcher/{part}"] > 0 for part in ("narrow", "safe", "penalty"))
    plain_records = [json.loads(line) for line in open(tmp_path / "plain" / "metrics.jsonl")]
    for one, other in zip(plain_records, records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_the_change_comes_before_clipping(tiny_tree, tmp_path, watcher):
    tree = tree_with(tiny_tree, {"plugins": [watcher], "schedule": {"steps": 1}})
    norms = []
    for scale in (1.0, 0.5):
        train(tree_with(tree, {"defenses": [{"halver": {"scale": scale}}]}), tmp_path / str(scale))
        norms.append(json.loads((tmp_path / str(scale) / "metrics.jsonl").read_text())["grad_norm"])
    assert norms[1] == pytest.approx(norms[0] / 2, rel=1e-4)


@PATHS
def test_without_such_a_defense_nothing_is_visited(tiny_tree, tmp_path, monkeypatch, path):
    def never(*_):
        raise AssertionError("visited")

    monkeypatch.setattr(update, "edit", never)
    monkeypatch.setattr(gradients.PartGradients, "__init__", never)
    train(tree_with(tiny_tree, path, {"defenses": [{"kl": {"weight": 0.5}}]}), tmp_path / "run")


@pytest.mark.parametrize("offload", [False, True], ids=["zero3", "offload"])
def test_where_gradients_are_not_whole_it_is_refused(monkeypatch, offload):
    stack = DefenseStack([Watching()])
    policy = SimpleNamespace(is_sharded=True, core=SimpleNamespace())
    monkeypatch.setattr(gradients, "engine_of", lambda root: None if offload else object())
    monkeypatch.setattr(gradients, "offloads", lambda: offload)
    with pytest.raises(UserError, match="'watching' changes gradients, which are not whole under"):
        gradients.check(stack, policy)
    gradients.check(DefenseStack([KL()]), policy)


def test_an_unknown_part_is_an_error():
    class Wrong(Watching):
        apart = frozenset({"narow"})

    with pytest.raises(UserError, match="unknown part 'narow'.*did you mean 'narrow'"):
        DefenseStack([Wrong()])


# ------------------------------------------------------------------------------------------------ rows without cross-entropy


@PATHS
def test_rows_set_aside_have_no_loss_but_their_owners_penalty(tiny_tree, tmp_path, path, safe_file):
    """A KL on them is all that they change; other penalties, and the means of the step, do not see them."""
    tree = tree_with(tiny_tree, path, {"batch": {"micro_rows": 2}})
    kl = {"kl": {"weight": 3.0, "source": safe_file, "rows": 3, "reference": "step:3"}}  # has no gradient before step 3
    plain = train(tree_with(tree, {"defenses": [{"ldifs": {"weight": 0.5}}]}), tmp_path / "plain")
    aside = train(tree_with(tree, {"defenses": [{"ldifs": {"weight": 0.5}}, kl]}), tmp_path / "aside")
    assert distance(plain, aside) < 1e-6
    strong = {"kl": {"weight": 3.0, "source": safe_file, "rows": 3}}
    acts = train(tree_with(tree, {"defenses": [{"ldifs": {"weight": 0.5}}, strong]}), tmp_path / "acts")
    assert distance(plain, acts) > 1e-3
    for line in open(tmp_path / "acts" / "metrics.jsonl"):
        record = json.loads(line)
        assert record["defense/kl/rows_added"] == 3
        terms = sum(record.get(f"loss/{one}", 0.0) for one in ("sft", "grpo"))
        terms += 3.0 * record.get("defense/kl/full", 0.0) + 0.5 * record["defense/ldifs/distance"]
        assert record["loss"] == pytest.approx(terms, abs=1e-5)


def test_a_share_of_zero_is_not_there(tiny_tree, tmp_path):
    plain = train(tree_with(tiny_tree, {"defenses": []}), tmp_path / "plain")
    zero = train(tree_with(tiny_tree, {"defenses": [{"kl": {"target_share": 0.0}}]}), tmp_path / "zero")
    assert distance(plain, zero) == 0.0
    run(run_from_tree(tree_with(tiny_tree, {"defenses": [{"ldifs": {"target_share": 0.3}}]})), tmp_path / "some")
    last = json.loads((tmp_path / "some" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["defense/ldifs/weight"] > 0
