"""Reading and steering the residual stream, with and without gradient checkpointing."""

import pytest
import torch
from tiny_architectures import ARCHITECTURES, load, nudge, random_batch, save_architecture

from rlsafe.config import UserError
from rlsafe.policy import ForwardPlan
from rlsafe.policy.taps import decoder_blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tap_k_is_the_output_of_block_k_minus_one(architecture, tmp_path):
    policy = load(save_architecture(tmp_path, architecture))
    batch = random_batch()
    with torch.no_grad():
        own = policy.model.get_decoder()(batch.ids, output_hidden_states=True).hidden_states
    n = policy.n_layers
    with policy.taps(range(n + 1)) as hidden:
        policy.score(batch)
    assert n == 3 and set(hidden) == set(range(n + 1))
    for k in range(n):  # Transformers reports the last one after the final norm
        assert torch.allclose(hidden[k], own[k], atol=1e-5)
    block_output = []
    hook = decoder_blocks(policy.model, n)[n - 1].register_forward_hook(
        lambda _, __, out: block_output.append(out[0] if isinstance(out, tuple) else out)
    )
    policy.score(batch)
    hook.remove()
    assert torch.allclose(hidden[n], block_output[0], atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_addition_changes_exactly_its_layer_and_what_follows(tiny_model_dir, layer):
    policy = nudge(load(tiny_model_dir))
    batch, vector = random_batch(), torch.randn(policy.hidden_size)
    with policy.taps(range(3)) as plain:
        before = policy.score(batch)
    handle = policy.add_to_residual(layer, vector)
    with policy.taps(range(3)) as steered:
        after = policy.score(batch)
    for k in range(layer):
        assert torch.equal(plain[k], steered[k])
    assert torch.allclose(steered[layer], plain[layer] + vector, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-2)
    with policy.hooks_off():
        assert torch.equal(policy.score(batch), before)
    handle.remove()
    handle.remove()
    assert torch.equal(policy.score(batch), before)


def test_a_function_sees_the_batch_and_can_steer_some_positions(tiny_model_dir):
    policy = load(tiny_model_dir)
    batch, vector = random_batch(), torch.randn(policy.hidden_size)

    def on_answers(hidden, batch):
        return batch.loss_mask.unsqueeze(-1) * vector

    with policy.taps([1]) as plain:
        policy.score(batch)
    handle = policy.add_to_residual(1, on_answers)
    with policy.taps([1]) as steered:
        policy.score(batch)
    handle.remove()
    moved = (steered[1] - plain[1]).abs().sum(-1) > 0
    assert torch.equal(moved, batch.loss_mask)


def test_frozen_forwards_are_never_steered(tiny_model_dir):
    policy = nudge(load(tiny_model_dir))
    batch = random_batch()
    plan = ForwardPlan(references=("base",), ref_logprobs=("base",), layers=(1,), layer_references=("base",))
    plain = policy.frozen(batch, plan)["base"]
    with_handle = policy.add_to_residual(1, torch.randn(policy.hidden_size))
    steered = policy.frozen(batch, plan)["base"]
    assert torch.equal(plain.last, steered.last) and torch.equal(plain.logp, steered.logp)
    assert torch.equal(plain.layers[1], steered.layers[1])
    assert torch.equal(policy.score(batch, reference="base"), plain.logp)
    with_handle.remove()


@pytest.mark.parametrize("steered", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model_dir, steered):
    """Also through taps and additions, although every block is run again in the backward."""
    gradients = []
    for checkpointing in (False, True):
        policy = nudge(load(tiny_model_dir, gradient_checkpointing=checkpointing))
        batch = random_batch()
        plan = ForwardPlan(references=("base",), layers=(0, 1, 2), layer_references=("base",))
        frozen = policy.frozen(batch, plan)
        vector = torch.linspace(-1, 1, policy.hidden_size)
        handles = [policy.add_to_residual(1, vector)] if steered else []
        if steered:
            handles.append(policy.add_to_residual(2, lambda h, b: h * b.loss_mask.unsqueeze(-1) * 0.5))
        out = policy.forward(batch, plan, frozen)
        distance = sum((out.hidden[k] - frozen["base"].layers[k]).square().mean() for k in (0, 1, 2))
        (out.logp.sum() + out.kl["base"].sum() + distance).backward()
        for handle in handles:
            handle.remove()
        gradients.append({name: p.grad for name, p in policy.trainable().items()})
    assert any(float(g.abs().sum()) > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name


def test_the_gradient_flows_through_the_steered_log_probs(tiny_model_dir):
    policy = nudge(load(tiny_model_dir))
    batch = random_batch()

    def gradient():
        logp = policy.forward(batch, ForwardPlan(), {}).logp
        return torch.autograd.grad(logp.sum(), list(policy.trainable().values()))

    plain = gradient()
    handle = policy.add_to_residual(1, torch.randn(policy.hidden_size))
    steered = gradient()
    handle.remove()
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(plain, steered, strict=True))


@pytest.mark.parametrize(
    ("layer", "vector", "says"),
    [
        (3, torch.zeros(64), r"layer 3: expected 0 \(embeddings\) to 2"),
        (-1, torch.zeros(64), "layer -1"),
        (1, torch.zeros(63), r"expected shape \[64\], got \[63\]"),
        (1, torch.zeros(2, 64), "expected shape"),
        (1, torch.full((64,), float("nan")), "NaN"),
    ],
)
def test_a_vector_that_does_not_fit_is_an_error(tiny_model_dir, layer, vector, says):
    """Trap 9: steering that silently does nothing."""
    policy = load(tiny_model_dir)
    with pytest.raises(UserError, match=says):
        policy.add_to_residual(layer, vector)
    with pytest.raises(UserError, match="layer 7"), policy.taps([7]):
        pass
