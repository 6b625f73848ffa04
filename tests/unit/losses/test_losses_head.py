"""The chunked head against full logits in float64; it may neither keep logits nor depend on chunks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlsafe.losses import Reference, head
from rlsafe.policy.policy import predicting, scatter

N, H, V = 23, 8, 37
SHAPES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"temperature": 1.3, "softcap": 2.5, "logit_scale": 0.8},
    "KL at another temperature": {"temperature": 0.7, "kl_temperature": 1.0},
    "softcap and KL at another": {"temperature": 0.7, "kl_temperature": 1.2, "softcap": 2.5},
}


def tensors(seed=0, dtype=torch.float64, n=N):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return {
        "hidden": make(n, H),
        "weight": make(V, H),
        "bias": make(V),
        "targets": torch.randint(0, V, (n,), generator=g),
        "refs": [Reference(make(n, H)), Reference(make(n, 5), make(V, 5), make(V)), Reference(make(n, H), make(V, H))],
    }


def full(hidden, weight, bias, temperature=1.0, softcap=None, logit_scale=1.0):
    z = hidden @ weight.t()
    z = (z if bias is None else z + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, -1)


def naive(hidden, weight, targets, refs, bias, direction="forward", kl_temperature=None, **shape):
    log_p = full(hidden, weight, bias, **shape)
    of_kl = {**shape, "temperature": kl_temperature or shape.get("temperature", 1.0)}
    kl_log_p = full(hidden, weight, bias, **of_kl)
    kls = []
    for ref in refs:
        ref_bias = bias if ref.bias is None else ref.bias
        log_q = full(ref.hidden, weight if ref.weight is None else ref.weight, ref_bias, **of_kl).detach()
        a, b = (kl_log_p, log_q) if direction == "forward" else (log_q, kl_log_p)
        kls.append((a.exp() * (a - b)).sum(-1))
    return log_p.gather(1, targets[:, None]).squeeze(1), kls, -(log_p.exp() * log_p).sum(-1)


def total(logp, kls):
    """A scalar with a different weight on every entry of every output, so that no gradient can cancel or be swapped."""
    weights = torch.linspace(0.3, 1.7, logp.shape[0], dtype=logp.dtype)
    return sum((k + 1.5) * (weights.roll(k) * x).sum() for k, x in enumerate([logp, *kls]))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_head_equals_full_logits_in_float64(shape, with_bias, train_head, direction):
    t = tensors()
    results = []
    for ours in (True, False):
        leaves = [t["hidden"].clone(), t["weight"].clone(), *([t["bias"].clone()] if with_bias else [])]
        leaves[0].requires_grad_()
        for leaf in leaves[1:]:
            leaf.requires_grad_(train_head)
        bias = leaves[2] if with_bias else None
        if ours:
            out = head(
                leaves[0], leaves[1], t["targets"], t["refs"], bias=bias, chunk=5, direction=direction,
                with_entropy=True, **SHAPES[shape],
            )  # fmt: skip
            assert not out.entropy.requires_grad
            values = (out.logp, out.kls, out.entropy)
        else:
            values = naive(leaves[0], leaves[1], t["targets"], t["refs"], bias, direction, **SHAPES[shape])
        total(values[0], values[1]).backward()
        results.append([values[0], *values[1], values[2], *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    assert len(results[0]) == len(results[1])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("train_head", [False, True])
def test_chunk_size_changes_nothing(train_head):
    t = tensors()
    seen = []
    for chunk in (1, 7, N, 1000, None):
        hidden, weight = t["hidden"].clone().requires_grad_(), t["weight"].clone().requires_grad_(train_head)
        out = head(hidden, weight, t["targets"], t["refs"], temperature=0.8, chunk=chunk)
        total(out.logp, out.kls).backward()
        seen.append([out.logp, *out.kls, hidden.grad, *([weight.grad] if train_head else [])])
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("train_head", [False, True])
def test_no_more_than_one_chunk_of_logits_is_ever_alive(train_head):
    """Trap 12: full logits kept for large vocabularies."""
    t = tensors(n=200)
    hidden, weight = t["hidden"].clone().requires_grad_(), t["weight"].clone().requires_grad_(train_head)
    with LargestTensor() as seen:
        out = head(hidden, weight, t["targets"], t["refs"], chunk=50, with_entropy=True)
        total(out.logp, out.kls).backward()
    assert seen.largest == 50 * V
    assert 50 * V < 200 * V


def full_kl(hidden, ref_hidden, weight, **options):
    return head(hidden, weight, torch.zeros(N, dtype=torch.long), [Reference(ref_hidden)], **options).kls[0]


@pytest.mark.parametrize("train_head", [False, True])
def test_kl_is_zero_for_itself_and_positive_elsewhere(train_head):
    t = tensors(dtype=torch.float32)
    hidden, weight = t["hidden"].requires_grad_(), t["weight"].requires_grad_(train_head)
    for direction in ("forward", "reverse"):
        same = full_kl(hidden, t["hidden"].detach(), weight, temperature=0.8, direction=direction)
        assert torch.equal(same, torch.zeros(N))
        (grad,) = torch.autograd.grad(same.sum(), hidden)
        assert grad.abs().max() < 1e-6
        near = full_kl(hidden, t["hidden"].detach() + 1e-3, weight, direction=direction)
        far = full_kl(hidden, t["refs"][0].hidden, weight, direction=direction)
        assert near.min() > -1e-6
        assert far.min() > 1e-2


def test_the_two_directions_differ_and_swap_with_the_roles():
    t = tensors()
    a, b, weight = t["hidden"], t["refs"][0].hidden, t["weight"]
    forward, reverse = full_kl(a, b, weight), full_kl(a, b, weight, direction="reverse")
    torch.testing.assert_close(forward, full_kl(b, a, weight, direction="reverse"))
    assert (forward - reverse).abs().max() > 0.1


def test_the_reference_is_a_constant():
    t = tensors()
    frozen = [x.requires_grad_() for x in t["refs"][1][:3]]
    hidden = t["hidden"].requires_grad_()
    out = head(hidden, t["weight"], t["targets"], [Reference(*frozen)])
    out.kls[0].sum().backward()
    assert hidden.grad.abs().max() > 0
    assert all(x.grad is None for x in frozen)


def test_a_monitored_reference_has_a_value_and_no_gradient():
    t = tensors()
    refs = [t["refs"][0], t["refs"][0]._replace(grad=False)]
    out = head(t["hidden"].requires_grad_(), t["weight"], t["targets"], refs)
    torch.testing.assert_close(out.kls[0], out.kls[1])
    assert out.kls[0].requires_grad and not out.kls[1].requires_grad


def test_each_output_can_be_used_alone():
    t = tensors()
    for train_head in (False, True):
        for pick in range(3):
            grads = []
            for ours in (True, False):
                hidden = t["hidden"].clone().requires_grad_()
                weight = t["weight"].clone().requires_grad_(train_head)
                if ours:
                    out = head(hidden, weight, t["targets"], t["refs"][:2], chunk=4)
                    outputs = [out.logp, *out.kls]
                else:
                    logp, kls, _ = naive(hidden, weight, t["targets"], t["refs"][:2], None)
                    outputs = [logp, *kls]
                grads.append(torch.autograd.grad(outputs[pick].square().sum(), hidden)[0])
            torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_values_are_float32_for_half_precision():
    t = tensors(dtype=torch.bfloat16)
    out = head(t["hidden"], t["weight"], t["targets"], temperature=0.7, with_entropy=True)
    assert out.logp.dtype == out.entropy.dtype == torch.float32
    exact = head(t["hidden"].double(), t["weight"].double(), t["targets"], temperature=0.7).logp
    assert exact.dtype == torch.float64
    assert (out.logp - exact).abs().max() < 0.1


@pytest.mark.parametrize("train_head", [False, True])
def test_half_precision_gradients_stay_close_to_exact_ones(train_head):
    t = tensors(dtype=torch.bfloat16)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        hidden = t["hidden"].to(dtype, copy=True).requires_grad_()
        weight = t["weight"].to(dtype, copy=True).requires_grad_(train_head)
        refs = [Reference(t["refs"][0].hidden.to(dtype))]
        out = head(hidden, weight, t["targets"], refs, temperature=0.8, chunk=6)
        (out.logp.double().sum() + out.kls[0].double().sum()).backward()
        assert hidden.grad.dtype == dtype
        grads.append([x.grad.double() for x in (hidden, weight) if x.grad is not None])
    for mine, exact in zip(*grads, strict=True):
        assert (mine - exact).norm() / exact.norm() < 0.02


def test_autocast_decides_the_dtype_and_gradients_come_back_in_the_leaf_dtype():
    t = tensors(dtype=torch.float32)
    hidden, weight = t["hidden"].requires_grad_(), t["weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = head(hidden, weight, t["targets"], [t["refs"][0]])
    out.logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    half = head(hidden.detach().bfloat16(), weight.detach().bfloat16(), t["targets"])
    assert torch.equal(out.logp, half.logp)


def test_no_tokens_is_not_an_error():
    t = tensors(n=0)
    hidden = t["hidden"].requires_grad_()
    out = head(hidden, t["weight"], t["targets"], t["refs"])
    (out.logp.sum() + sum(k.sum() for k in out.kls)).backward()
    assert hidden.grad.shape == (0, H)


def test_states_and_tokens_are_shifted_by_one():
    """A token is predicted by the state before it; the grid has the token's own place."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 6, H, generator=g, dtype=torch.float64)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    ids = torch.randint(0, V, (3, 6), generator=g)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    positions = predicting(mask)
    values = head(hidden.flatten(0, 1)[positions], weight, ids[mask]).logp
    grid = scatter(values, positions, mask.shape)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        expected[b, t] = torch.log_softmax(weight @ hidden[b, t - 1], 0)[ids[b, t]]
    torch.testing.assert_close(grid, expected)


def test_the_grid_passes_the_gradient_back():
    mask = torch.tensor([[False, True, True], [False, False, True]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (
        scatter(values, predicting(mask), mask.shape) * torch.tensor([[9.0, 1.0, 10.0], [9.0, 9.0, 100.0]])
    ).sum().backward()
    assert values.grad.tolist() == [1.0, 10.0, 100.0]
