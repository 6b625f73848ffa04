"""SFT and GRPO terms by hand: advantages, masks, counts, and sums that do not depend on how a step is cut up."""

import math

import pytest
import torch

from rlsafe.losses import (
    advantages,
    grpo_count,
    grpo_values,
    grpo_weights,
    head,
    importance_ratio,
    k3,
    sampler_gap,
    truncated_correction,
)

NAN = math.nan
NORMALIZATIONS = ["grpo", "dr_grpo", "dapo", "bnpo"]


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 4.0, 6.0, 8.0]], dtype=torch.float64)
    values, valid, stats = advantages(rewards)
    first, second = math.sqrt(4 * 0.25 / 3) + 1e-4, math.sqrt((9 + 1 + 1 + 9) / 3) + 1e-4  # ddof 1, eps 1e-4
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-3.0, -1.0, 1.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(values, expected / torch.tensor([[first], [second]], dtype=torch.float64))
    assert valid.all()
    assert (stats.mean, stats.groups, stats.zero_variance, stats.missing) == (2.75, 2, 0, 0)
    assert stats.group_std == pytest.approx((first + second) / 2 - 1e-4)

    plain, _, _ = advantages(rewards, scale="none")
    assert torch.equal(plain, expected)
    batch, _, _ = advantages(rewards, scale="batch")
    torch.testing.assert_close(batch, expected / (rewards.std() + 1e-4))


def test_missing_rewards_leave_mean_spread_and_loss():
    rewards = torch.tensor([[1.0, NAN, 3.0, NAN], [NAN] * 4, [5.0, NAN, NAN, NAN]], dtype=torch.float64)
    values, valid, stats = advantages(rewards)
    scaled = 1 / (math.sqrt(2) + 1e-4)
    assert valid.tolist() == [[True, False, True, False], [False] * 4, [True, False, False, False]]
    assert values[0].tolist() == pytest.approx([-scaled, 0, scaled, 0])
    assert not values[1:].any()
    assert (stats.groups, stats.zero_variance, stats.missing, stats.mean) == (2, 1, 9, 3.0)
    alone, _, _ = advantages(torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    assert values[0, [0, 2]].tolist() == alone[0].tolist()
    assert not advantages(torch.full((2, 3), NAN))[0].any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_without_spread_get_exactly_zero(scale):
    rewards = torch.tensor([[0.1] * 7, [0.0, 1.0] * 3 + [0.5]])  # the float32 mean of seven 0.1 is not 0.1
    values, valid, stats = advantages(rewards, scale=scale)
    assert not values[0].any() and values[1].any() and valid.all()
    assert (stats.groups, stats.zero_variance) == (2, 1)


def batch(seed=0, rows=6, length=9):
    g = torch.Generator().manual_seed(seed)
    make = lambda scale: torch.randn(rows, length, generator=g, dtype=torch.float64) * scale  # noqa: E731
    lengths = torch.randint(1, length - 1, (rows,), generator=g)
    starts = torch.randint(1, 3, (rows,), generator=g)
    position = torch.arange(length)
    mask = (position >= starts[:, None]) & (position < (starts + lengths)[:, None])
    logp = make(0.5) - 2
    return {
        "logp": logp * mask,
        "old": (logp + make(0.3)) * mask,
        "ref": (logp + make(0.3)) * mask,
        "sampler": (logp + make(0.5)) * mask,
        "advantages": torch.randn(rows, generator=g, dtype=torch.float64),
        "mask": mask,
    }


def loss_sum(b, normalization, level, correction="token"):
    """The step's numerator and denominator of one micro-batch, all GRPO features on."""
    weights = grpo_weights(b["mask"], normalization, dtype=torch.float64)
    corrected = truncated_correction(b["old"], b["sampler"], b["mask"], 1.5, correction)
    values, info = grpo_values(
        b["logp"],
        b["old"],
        b["advantages"],
        b["mask"],
        clip_low=0.1,
        clip_high=0.15,
        level=level,
        correction_weights=corrected,
    )
    values = values + 0.1 * k3(b["logp"], b["ref"], importance_ratio(b["logp"], b["old"], b["mask"], level))
    return (values * weights).sum(), grpo_count(b["mask"], normalization, 12), info


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_micro_batches_give_the_loss_and_gradient_of_the_whole_step(normalization, level):
    whole = batch()
    whole["logp"].requires_grad_()
    numerator, count, info = loss_sum(whole, normalization, level)
    (numerator / count).backward()

    leaf = whole["logp"].detach().clone().requires_grad_()
    parts = [loss_sum({k: v[s] for k, v in (whole | {"logp": leaf}).items()}, normalization, level)
             for s in (slice(0, 1), slice(1, 4), slice(4, 6))]  # fmt: skip
    counts = sum(part[1] for part in parts)
    for part in parts:
        (part[0] / counts).backward()
    assert counts == count
    torch.testing.assert_close(sum(part[0] for part in parts) / counts, numerator / count, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(leaf.grad, whole["logp"].grad, rtol=1e-12, atol=1e-14)
    for name, value in info.items():
        torch.testing.assert_close(sum(part[2][name] for part in parts), value)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_padding_and_dummy_rows_change_nothing(normalization, level):
    plain = batch()
    plain["logp"].requires_grad_()
    numerator, count, info = loss_sum(plain, normalization, level)
    numerator.backward()

    padded = {k: v.detach().clone() for k, v in plain.items()}
    for k, v in padded.items():
        if v.dim() == 2:
            junk = torch.full((8, 14), 0.0 if v.dtype == torch.bool else -7.3).to(
                v.dtype
            )  # two more rows, five more tokens
            junk[:6, :9] = torch.where(plain["mask"], v, junk[:6, :9])
            padded[k] = junk
    padded["advantages"] = torch.cat([plain["advantages"], torch.tensor([3.0, -3.0], dtype=torch.float64)])
    padded["sampler"][6:] = NAN
    padded["old"] += 5.0 * ~padded["mask"]
    padded["logp"].requires_grad_()
    other, other_count, other_info = loss_sum(padded, normalization, level)
    other.backward()
    assert other_count == count
    torch.testing.assert_close(other, numerator, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(padded["logp"].grad[:6, :9], plain["logp"].grad, rtol=1e-12, atol=1e-14)
    assert not padded["logp"].grad[~padded["mask"]].any()
    for name, value in info.items():
        torch.testing.assert_close(other_info[name], value)


def test_counts_by_hand():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert [int(grpo_count(mask, n, 10)) for n in NORMALIZATIONS] == [2, 20, 4, 4]
    everyone = torch.ones(3, dtype=torch.bool)
    assert [int(grpo_count(mask, n, 10, everyone)) for n in NORMALIZATIONS] == [3, 30, 4, 4]
    torch.testing.assert_close(grpo_weights(mask, "grpo").sum(1), torch.tensor([1.0, 1.0, 0.0]))
    for name in NORMALIZATIONS[1:]:
        assert torch.equal(grpo_weights(mask, name), mask.float())


def test_a_rollout_used_once_needs_no_old_log_probs():
    b = batch()
    b["logp"].requires_grad_()
    values, info = grpo_values(b["logp"], None, b["advantages"], b["mask"])
    (grad,) = torch.autograd.grad((values * b["mask"]).sum(), b["logp"])
    torch.testing.assert_close(grad, -b["advantages"][:, None] * b["mask"])
    assert info["ratio"] == info["count"] and info["clip_low"] == info["clip_high"] == 0


def test_clipping_cuts_the_gradient_only_where_it_should():
    logp = torch.log(torch.tensor([[0.5, 1.5], [0.5, 1.5]], dtype=torch.float64)).requires_grad_()
    mask = torch.ones(2, 2, dtype=torch.bool)
    values, info = grpo_values(
        logp, torch.zeros_like(logp), torch.tensor([1.0, -1.0]), mask, clip_low=0.2, clip_high=0.3
    )
    assert values.tolist() == [pytest.approx([-0.5, -1.3]), pytest.approx([0.8, 1.5])]
    (grad,) = torch.autograd.grad(values.sum(), logp)
    assert grad.tolist() == [pytest.approx([-0.5, 0.0]), pytest.approx([0.0, 1.5])]
    assert (info["clip_low"], info["clip_high"], info["count"]) == (1, 1, 4)


def test_truncated_correction_by_hand():
    trainer = torch.log(torch.tensor([[1.0, 0.9, 0.2, 0.5]], dtype=torch.float64)).requires_grad_()
    sampler = torch.log(torch.tensor([[1.0, 0.1, 0.4, 0.5]], dtype=torch.float64))
    mask = torch.tensor([[False, True, True, False]])
    token = truncated_correction(trainer, sampler, mask, 2.0)
    assert token.tolist() == [pytest.approx([1.0, 2.0, 0.5, 1.0])] and not token.requires_grad
    assert truncated_correction(trainer, sampler, mask, 10.0, "sequence").tolist() == [[pytest.approx(4.5)]]
    assert truncated_correction(trainer, sampler, mask, 3.0, "sequence").tolist() == [[3.0]]
    gap, compared = sampler_gap(trainer, sampler, mask)
    assert gap.item() == pytest.approx(math.log(9) + math.log(2)) and compared == 2

    sampler[0, 1] = NAN  # not reported: no correction, and not part of the gap
    assert truncated_correction(trainer, sampler, mask, 2.0).tolist() == [pytest.approx([1.0, 1.0, 0.5, 1.0])]
    gap, compared = sampler_gap(trainer, sampler, mask)
    assert gap.item() == pytest.approx(math.log(2)) and compared == 1


def test_sampled_estimators_average_to_the_full_divergence():
    g = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(torch.randn(12, generator=g, dtype=torch.float64), 0).requires_grad_()
    log_q = torch.log_softmax(torch.randn(12, generator=g, dtype=torch.float64), 0)
    p = log_p.exp()
    exact = (p * (log_p - log_q)).sum()
    torch.testing.assert_close((p * k3(log_p, log_q)).sum(), exact)
    assert k3(log_p, log_q).min() >= 0


def test_the_ratio_makes_the_gradient_of_k3_that_of_the_divergence():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(12, generator=g, dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(z, 0)
    log_q = torch.log_softmax(torch.randn(12, generator=g, dtype=torch.float64), 0)
    mask = torch.ones(12, 1, dtype=torch.bool)
    ratio = importance_ratio(log_p[:, None], log_p.detach()[:, None], mask).squeeze(1)
    sampled = log_p.detach().exp()  # expectation over tokens drawn from the policy, which has no gradient
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), z, retain_graph=True)
    (biased,) = torch.autograd.grad((sampled * k3(log_p, log_q)).sum(), z, retain_graph=True)
    (unbiased,) = torch.autograd.grad((sampled * k3(log_p, log_q, ratio)).sum(), z)
    torch.testing.assert_close(unbiased, exact)
    assert (biased - exact).abs().max() > 1e-2


def test_sft_is_cross_entropy_over_the_step():
    """Same number as transformers' loss with num_items_in_batch, over two micro-batches of different length."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlsafe.policy.policy import predicting, scatter

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=1)).double()  # fmt: skip
    ids = torch.randint(0, 31, (4, 10))
    mask = torch.zeros(4, 10, dtype=torch.bool)
    for row, (start, end) in enumerate([(1, 3), (4, 10), (2, 5), (6, 7)]):
        mask[row, start:end] = True
    labels = ids.masked_fill(~mask, -100)
    parts = [slice(0, 1), slice(1, 4)]
    count = sum(mask[s].sum() for s in parts)
    grads, losses = [], []
    for ours in (True, False):
        model.zero_grad()
        loss = 0
        for s in parts:
            if ours:
                hidden = model.model(ids[s]).last_hidden_state
                at = predicting(mask[s])
                logp = head(hidden.flatten(0, 1)[at], model.lm_head.weight, ids[s][mask[s]], chunk=3).logp
                part = (-scatter(logp, at, mask[s].shape) * mask[s]).sum() / count
            else:
                logits = model(ids[s]).logits[:, :-1].flatten(0, 1)  # float64 reference
                part = torch.nn.functional.cross_entropy(logits, labels[s][:, 1:].flatten(), reduction="sum") / count
            part.backward()
            loss += part.item()
        losses.append(loss)
        grads.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # transformers itself takes the loss in float32
        theirs = sum(model(ids[s], labels=labels[s], num_items_in_batch=count).loss.item() for s in parts)
    assert losses[0] == pytest.approx(theirs, abs=1e-5)
