"""The policy's one forward: the model's own log-probs, exact KLs, gradients where they belong."""

import sys

import pytest
import torch
from tiny_architectures import ARCHITECTURES, load, nudge, random_batch, save_architecture

from rlsafe.policy import ForwardPlan, mean_nll, nll
from rlsafe.types import Need


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return nudge(load(tiny_model_dir))


def own_logprobs(policy, batch):
    """[B, T, V] log-probs predicting each token, by the Hugging Face model's own logits."""
    logits = policy.core.model(input_ids=batch.ids, attention_mask=batch.attention).logits
    return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1].float().log_softmax(-1)], 1)


@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_those_of_the_models_own_logits(architecture, rank, tmp_path, monkeypatch):
    """Softcaps (Gemma 2), logit scales (Cohere, Granite) and head biases (Phi) included, over several chunks."""
    monkeypatch.setattr(sys.modules["rlsafe.losses.head"], "MIN_CHUNK", 5)
    monkeypatch.setattr(sys.modules["rlsafe.losses.head"], "CHUNK_LOGITS", {"cpu": 1, "cuda": 1})
    policy = nudge(load(save_architecture(tmp_path, architecture), rank=rank), 0.1 if rank else 0.02)
    batch = random_batch()
    full = own_logprobs(policy, batch)
    own = full.gather(2, batch.ids.unsqueeze(2)).squeeze(2) * batch.loss_mask
    plan = ForwardPlan(references=("base",))
    out = policy.forward(batch, plan, policy.frozen(batch, plan))
    assert torch.allclose(out.logp, own, atol=1e-5)
    assert torch.allclose(policy.score(batch), own, atol=1e-5)
    with torch.no_grad(), policy._references.active("base"):
        reference = own_logprobs(policy, batch)
    p, q = full.detach().double(), reference.double()
    exact = (p.exp() * (p - q)).sum(-1) * batch.loss_mask
    assert torch.allclose(out.kl["base"].double(), exact, atol=1e-5) and float(exact.sum()) > 0.01
    assert out.logp[batch.loss_mask].abs().min() > 0
    if own.requires_grad:
        parameters = list(policy.trainable().values())
        ours = torch.autograd.grad(out.logp.sum(), parameters)
        theirs = torch.autograd.grad(own.sum(), parameters)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)


def test_padding_and_batch_mates_change_nothing(policy):
    batch = random_batch()
    together = policy.score(batch)
    for i in range(len(batch)):
        n = int(batch.attention[i].sum())
        alone = random_batch()
        alone.ids, alone.attention, alone.loss_mask = (
            x[i : i + 1, :n] for x in (batch.ids, batch.attention, batch.loss_mask)
        )
        assert torch.allclose(policy.score(alone)[0], together[i, :n], atol=1e-5)
        assert not together[i, n:].any()


@pytest.mark.parametrize("mask", ["answer", "all"])
def test_kl_is_the_full_vocabulary_kl_where_the_mask_says(policy, mask):
    batch = random_batch()
    plan = ForwardPlan(references=("base",), mask=mask)
    out = policy.forward(batch, plan, policy.frozen(batch, plan), temperature=0.7)
    with torch.no_grad():
        p = (policy.core.model(batch.ids).logits.double() / 0.7).log_softmax(-1)
        with policy.core.model.disable_adapter():
            q = (policy.core.model(batch.ids).logits.double() / 0.7).log_softmax(-1)
    exact = torch.zeros(batch.ids.shape, dtype=torch.double)
    exact[:, 1:] = (p.exp() * (p - q)).sum(-1)[:, :-1]
    where = batch.loss_mask if mask == "answer" else batch.attention.bool()
    where = where.clone()
    where[:, 0] = False
    assert torch.allclose(out.kl["base"].double(), exact * where, atol=1e-5)
    assert bool((out.kl["base"][where] > 0).all())
    assert not out.logp[~batch.loss_mask].any()
    assert out.entropy is not None and not out.entropy.requires_grad and not out.entropy[~batch.loss_mask].any()


def test_an_unused_position_zero_is_never_a_target(policy):
    batch = random_batch()
    batch.loss_mask[:] = batch.attention.bool()
    plan = ForwardPlan(references=("base",), mask="all")
    out = policy.forward(batch, plan, policy.frozen(batch, plan))
    assert not out.logp[:, 0].any() and not out.kl["base"][:, 0].any()


def test_penalties_on_hidden_states_have_a_gradient_and_the_reference_has_none(policy):
    """Trap 1: published LDIFS features were detached, so the penalty did nothing."""
    batch = random_batch()
    plan = ForwardPlan(references=("base",), ref_logprobs=("base",), layers=(0, 2), layer_references=("base",))
    frozen = policy.frozen(batch, plan)
    out = policy.forward(batch, plan, frozen)
    reference = frozen["base"]
    assert not any(x.requires_grad for x in (reference.last, reference.logp, *reference.layers.values()))
    distance = (out.hidden[2] - reference.layers[2]).square().sum()
    gradients = torch.autograd.grad(distance, list(policy.trainable().values()), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0
    assert out.kl["base"].requires_grad and out.logp.requires_grad


def test_reference_log_probs_are_the_base_models(policy):
    batch = random_batch()
    frozen = policy.frozen(batch, ForwardPlan(ref_logprobs=("base",)))["base"]
    with policy.core.model.disable_adapter(), torch.no_grad():
        own = own_logprobs(policy, batch).gather(2, batch.ids.unsqueeze(2)).squeeze(2) * batch.loss_mask
    assert torch.allclose(frozen.logp, own, atol=1e-5)
    assert torch.allclose(policy.score(batch, reference="base"), own, atol=1e-5)
    assert not torch.allclose(policy.score(batch), own, atol=1e-2)


def test_one_frozen_forward_per_distinct_reference(policy, monkeypatch):
    calls = []
    original = policy.core.hidden_states
    monkeypatch.setattr(policy.core, "hidden_states", lambda ids: calls.append(1) or original(ids))
    batch = random_batch()
    plan = ForwardPlan.from_needs(
        [
            Need("divergence", "base"),
            Need("hidden_states", "start", layers=(0, 1)),
            Need("hidden_states", "step:1", layers=(1, 2), mask="all"),
        ],
        ref_logprobs=("base",),
    )
    assert plan.layers == (0, 1, 2) and plan.mask == "answer"
    policy.snapshot("step:1")
    frozen = policy.frozen(batch, plan)
    assert set(frozen) == {"base", "start", "step:1"}
    assert len(calls) == 2  # without a starting adapter "start" is the base
    assert frozen["step:1"].last is None and set(frozen["step:1"].layers) == {0, 1, 2}
    assert not policy.frozen(batch, ForwardPlan()) and len(calls) == 2


def test_a_batch_without_targets_gives_a_zero_with_a_gradient(policy):
    """A rank without rows runs a dummy: its collectives must match."""
    batch = random_batch()
    batch.loss_mask[:] = False
    plan = ForwardPlan(references=("base",))
    out = policy.forward(batch, plan, policy.frozen(batch, plan))
    (out.logp.sum() + out.kl["base"].sum()).backward()
    assert float(out.logp.abs().sum()) == 0
    policy.core.zero_grad()


def test_dropout_is_off_in_frozen_forwards_and_scores(tiny_model_dir):
    policy = nudge(load(tiny_model_dir, lora={"r": 4, "alpha": 8, "dropout": 0.5}))
    batch = random_batch()
    assert torch.equal(policy.score(batch), policy.score(batch))
    torch.manual_seed(0)
    noisy = [policy.forward(batch, ForwardPlan(), {}).logp for _ in range(2)]
    assert not torch.equal(*noisy)
    assert policy.core.training


RATES = {  # modules, numbers that functions take, and numbers that are read from the config
    "phi": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attention_dropout": 0.2, "num_key_value_heads": 2},
    "persimmon": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "qwen2": {"attention_dropout": 0.2},
}


@pytest.mark.parametrize("architecture", RATES)
def test_the_base_models_own_dropout_is_off_in_training_too(architecture, tmp_path, monkeypatch, caplog):
    """Rollouts are sampled without it, references are read without it; the adapter's is the user's."""
    monkeypatch.setitem(ARCHITECTURES, architecture, RATES[architecture])
    directory = save_architecture(tmp_path, architecture)
    policy, batch = nudge(load(directory)), random_batch()
    assert policy.core.training and "the model's own dropout (0.2) is off" in caplog.text
    trained = [policy.forward(batch, ForwardPlan(), {}).logp for _ in range(2)]
    assert torch.equal(*trained) and torch.allclose(trained[0], policy.score(batch), atol=1e-6)
    own = nudge(load(directory, lora={"r": 4, "alpha": 8, "dropout": 0.5}))
    assert not torch.equal(*(own.forward(batch, ForwardPlan(), {}).logp for _ in range(2)))


def test_a_model_without_dropout_is_not_told_of(tiny_model_dir, caplog):
    load(tiny_model_dir)
    assert "dropout" not in caplog.text


def test_half_precision_policy_agrees_with_float32(tiny_model_dir):
    exact, half = nudge(load(tiny_model_dir)), nudge(load(tiny_model_dir, dtype="bfloat16"))
    batch = random_batch()
    plan = ForwardPlan(references=("base",))
    out = half.forward(batch, plan, half.frozen(batch, plan))
    assert half.dtype == torch.bfloat16 and out.logp.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in half.trainable().values())
    assert float((out.logp - exact.score(batch)).abs().mean()) < 0.1
    assert torch.allclose(out.logp, half.score(batch), atol=1e-6)
    out.kl["base"].sum().backward()
    assert any(float(p.grad.abs().sum()) > 0 for p in half.trainable().values())


def test_nll_is_the_mean_over_each_rows_own_answer(policy):
    batch = random_batch()
    logp = policy.score(batch)
    expected = [-float(logp[i][batch.loss_mask[i]].mean()) for i in range(len(batch))]
    assert nll(policy, [batch]) == pytest.approx(expected, rel=1e-5)
    wider = random_batch(width=14)
    wider.ids = torch.nn.functional.pad(batch.ids, (0, 9), value=7)
    wider.attention = torch.nn.functional.pad(batch.attention, (0, 9))
    wider.loss_mask = torch.nn.functional.pad(batch.loss_mask, (0, 9))
    assert nll(policy, [wider]) == pytest.approx(expected, rel=1e-5)
    assert nll(policy, [batch], reference="base") != pytest.approx(expected, rel=1e-3)
    assert torch.isnan(mean_nll(logp, torch.zeros_like(batch.loss_mask))).all()
