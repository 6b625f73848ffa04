"""LoRA layers computed as one operation: PEFT's function and gradients, PEFT's own way wherever a layer does more."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_architectures import load, nudge, random_batch, save_architecture
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlsafe.config import LoraConfig
from rlsafe.policy import ForwardPlan, sharding
from rlsafe.policy.lora import FusedLinear, LowRank, check_fused, fuse, unfuse


def layers(policy):
    return list(policy.adapted().values())


def fused(policy):
    return [layer for layer in layers(policy) if type(layer) is FusedLinear]


def gradients(policy, batch=None):
    """Log-probs [B, T], and the gradient of each trained tensor of their sum."""
    out = policy.forward(batch or random_batch(), ForwardPlan(), {})
    return out.logp.detach(), torch.autograd.grad(out.logp.sum(), list(policy.trainable().values()))


def peft_layer(kind=torch.float32, inputs=24, outputs=40, rank=4, **settings):
    """One adapted layer as PEFT makes it, its B moved from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs)).to(kind)
    config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["0"], **settings)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.2)
    return layer


def run(layer, x, autocast=False):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return out.detach(), *torch.autograd.grad((out.double().sin()).sum(), (x, a, b))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_and_its_gradients_are_pefts_in_float64(rslora):
    layer = peft_layer(rank=3, use_rslora=rslora).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    theirs = run(layer, x)
    layer.__class__ = FusedLinear
    for ours, expected in zip(run(layer, x), theirs, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_in_half_precision_it_is_at_least_as_close_to_the_exact_layer_as_peft():
    layer = peft_layer(torch.bfloat16, 128, 96, rank=8)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(64, 128).bfloat16()
    exact = run(copy.deepcopy(layer).double(), x.double())
    theirs = run(layer, x, autocast=True)
    layer.__class__ = FusedLinear
    ours = run(layer, x, autocast=True)
    assert [value.dtype for value in ours] == [value.dtype for value in theirs]
    for own, other, right in zip(ours, theirs, exact, strict=True):
        size = right.norm()
        assert (own.double() - right).norm() / size < max(1.05 * (other.double() - right).norm() / size, 1e-3) < 0.02


class Copies(TorchDispatchMode):
    """How many operations make a tensor of 64 rows, and how many of them only cast it."""

    def __init__(self):
        super().__init__()
        self.long = self.casts = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and 64 in out.shape and not operation.is_view:
            self.long += 1
            self.casts += operation is torch.ops.aten._to_copy.default
        return out


def test_nothing_as_long_as_the_input_is_cast():
    layer = peft_layer(torch.bfloat16)
    x = torch.randn(64, 24).bfloat16().requires_grad_()
    seen = []
    for kind in (peft.tuners.lora.Linear, FusedLinear):
        layer.__class__ = kind
        with torch.autocast("cpu", torch.bfloat16), Copies() as copies:
            layer(x).sum().backward()
        seen.append(copies)
    theirs, ours = seen
    assert theirs.casts >= 4 and ours.casts == 0
    assert ours.long <= theirs.long / 2, (ours.long, theirs.long)


def test_its_hand_written_backward_passes_gradcheck():
    def made(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    weight, bias = made(5, 4).detach(), made(5).detach()
    arguments = (made(2, 3, 4), weight, bias, made(2, 4), made(5, 2), 1.7)
    assert torch.autograd.gradcheck(LowRank.apply, arguments)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi"])  # without biases, with three of them, with all
def test_a_whole_model_gives_the_same_log_probs_and_gradients(architecture, tmp_path):
    policy = nudge(load(save_architecture(tmp_path, architecture)))
    logp, theirs = gradients(policy)
    fuse(policy.core.model, True)
    assert len(fused(policy)) == len(layers(policy)) > 0
    again, ours = gradients(policy)
    assert torch.allclose(again, logp, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_checkpointed_blocks_give_the_same_gradients(tiny_model_dir):
    lora = LoraConfig(r=4, alpha=8, fused=True)
    plain, saving = (nudge(load(tiny_model_dir, lora=lora, gradient_checkpointing=c)) for c in (False, True))
    assert fused(saving)
    for a, b in zip(gradients(plain)[1], gradients(saving)[1], strict=True):
        assert torch.equal(a, b)


def test_small_float32_models_keep_pefts_bits_unless_asked(tiny_model_dir):
    """The organism's runs repeat bit for bit; half precision is where the casts are."""
    assert not fused(load(tiny_model_dir))
    half = load(tiny_model_dir, dtype="bfloat16")
    assert len(fused(half)) == len(layers(half))
    assert all(p.dtype == torch.float32 for p in half.trainable().values())
    assert not fused(load(tiny_model_dir, dtype="bfloat16", lora=LoraConfig(r=4, fused=False)))
    assert fused(load(tiny_model_dir, lora=LoraConfig(r=4, fused=True)))


def test_the_base_reference_is_the_model_without_its_adapter(tiny_model_dir):
    policy = nudge(load(tiny_model_dir, lora=LoraConfig(r=4, fused=True)))
    batch = random_batch()
    trained, base = policy.score(batch), policy.score(batch, reference="base")
    assert not torch.allclose(trained, base, atol=1e-3)
    unfuse(policy.core.model)
    assert torch.equal(policy.score(batch, reference="base"), base)


def test_dropout_in_training_is_pefts(tiny_model_dir):
    policy = nudge(load(tiny_model_dir, lora=LoraConfig(r=4, dropout=0.5, fused=True)))
    outs = []
    for way in (lambda model: None, unfuse):
        way(policy.core.model)
        torch.manual_seed(3)
        outs.append(gradients(policy))
    assert torch.equal(outs[0][0], outs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(outs[0][1], outs[1][1], strict=True))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_that_do_more_than_lora_stay_pefts(settings):
    layer = peft_layer(**settings)
    holder = nn.Module()
    holder.layer, holder.get_base_model = layer, None
    fuse(holder, True)
    assert type(layer) is peft.tuners.lora.Linear


def test_adapters_are_saved_as_without_it(tiny_model_dir, tmp_path):
    policy = nudge(load(tiny_model_dir, dtype="bfloat16"))
    assert fused(policy)
    policy.save_adapter(tmp_path / "fused")
    unfuse(policy.core.model)
    policy.save_adapter(tmp_path / "peft")
    names = sorted(file.name for file in (tmp_path / "fused").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "peft").iterdir())
    for name in names:
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert {t.dtype for t in load_file(tmp_path / "fused" / "adapter_model.safetensors").values()} == {torch.float32}


def test_sharded_models_are_pefts(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(sharding, "shard_module", lambda *arguments: None)
    policy = load(tiny_model_dir, dtype="bfloat16")
    policy.shard(torch.device("cpu"))
    assert layers(policy) and not fused(policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_device_that_computes_it_rightly_keeps_it(tiny_model_dir, dtype, caplog):
    policy = load(tiny_model_dir, dtype=dtype, lora=LoraConfig(r=4, fused=True))
    check_fused(policy.core.model)
    assert len(fused(policy)) == len(layers(policy)) and not caplog.records


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_a_device_that_does_not_is_given_pefts_layers_and_a_warning(tiny_model_dir, monkeypatch, caplog, fault):
    policy = load(tiny_model_dir, lora=LoraConfig(r=4, fused=True))
    honest = LowRank.backward

    def backward(ctx, grad):
        if fault == "missing":
            raise RuntimeError("no kernel image is available for execution on the device")
        x, _, _, a, b, _ = honest(ctx, grad)
        return x, None, None, a, b * 1.2, None

    monkeypatch.setattr(LowRank, "backward", staticmethod(backward))
    check_fused(policy.core.model)
    assert not fused(policy) and "model.lora.fused" in caplog.text and "PEFT's layers are used" in caplog.text


def test_it_is_tried_on_every_device_but_the_cpu(tiny_model_dir, monkeypatch):
    from rlsafe.config import ModelConfig
    from rlsafe.policy import load as loading
    from rlsafe.policy import lora

    tried = []
    monkeypatch.setattr(lora, "check_fused", lambda model: tried.append(next(model.parameters()).device.type))
    for device in ("cpu", "meta"):
        loading.load_model(
            ModelConfig(name=tiny_model_dir, lora=LoraConfig(r=4)), tiny_model_dir, 0, torch.device(device)
        )
    assert tried == ["meta"]
