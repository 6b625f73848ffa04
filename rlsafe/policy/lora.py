"""LoRA layers as one autograd node: W x + s B (A x) without a float32 copy of the input, one rounding, two tensors kept.

PEFT computes base, A, B, scale and sum as separate operations, and under a half-precision base it casts the input of each adapted
layer to float32 and back. Here the same adapter (its parameters, its files, its settings are PEFT's) runs as three products forward
and five backward, the sum made inside the product. The parameters stay float32, for the optimizer; their casts are made per forward.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from rlsafe.config import first_line
from rlsafe.policy.adapters import ADAPTER, adapter_layers

log = logging.getLogger("rlsafe")
TOLERANCE = 0.05
"""Relative error above which a fused layer is not PEFT's; bfloat16 rounds to .004."""
SMALL = 16_000_000
"""Parameters up to which a float32 model keeps PEFT's order of additions, so that runs of the organism repeat bit for bit."""


class LowRank(torch.autograd.Function):
    """x [..., in] -> x W^T + bias + scale x A^T B^T [..., out]; W and bias frozen, A [r, in] and B [out, r] trained.

    Computes in W's dtype; the gradients of A and B have theirs. Keeps x, A x and the cast A and B for the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x [..., I], weight [O, I], bias [O], a [R, I], b [O, R] -> [..., O], in the dtype of `weight`."""
        rows = x.reshape(-1, x.shape[-1])
        low, wide = a.to(weight.dtype), (b * scale).to(weight.dtype)
        inner = rows @ low.t()
        out = linear(rows, weight, bias).addmm_(inner, wide.t())
        ctx.save_for_backward(rows, inner, weight, low, wide)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """grad [..., O] -> the gradients of x [..., I], a [R, I] and b [O, R]; None for what is frozen."""
        rows, inner, weight, low, wide = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = grad @ wide
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner, low).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            grad_a = (grad_inner.t() @ rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            grad_b = (grad.t() @ inner).to(ctx.dtypes[1]) * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None


class FusedLinear(Linear):
    """PEFT's LoRA layer, computed by `LowRank` wherever that is the same function; PEFT's own way in every other case."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        weight: Any = self.base_layer.weight
        dropped = self.training and not isinstance(self.lora_dropout[ADAPTER], nn.Identity)
        if self.disable_adapters or self.merged or dropped or args or kwargs or self.active_adapters != [ADAPTER]:
            return super().forward(x, *args, **kwargs)
        kind = x.device.type
        if x.dtype != weight.dtype or (
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != weight.dtype
        ):
            return super().forward(x)
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return LowRank.apply(x, weight, self.base_layer.bias, a, b, self.scaling[ADAPTER])


def fuse(model: Any, setting: bool | str) -> None:
    """Let the adapted layers of a PeftModel compute as one node each. setting: "auto" leaves small float32 models alone."""
    if setting == "auto":
        weight = model.get_base_model().get_output_embeddings().weight
        setting = weight.dtype != torch.float32 or model.num_parameters() > SMALL
    for layer in adapter_layers(model).values() if setting else ():
        if _plain(layer):
            layer.__class__ = FusedLinear


def check_fused(model: Any) -> None:
    """Give the layers back to PEFT, with a warning, where the device that they are on does not compute `LowRank` as it should. The
    smallest fused layer is tried, forward and backward, against the same in float32."""
    fused = [layer for layer in adapter_layers(model).values() if type(layer) is FusedLinear]
    if not fused:
        return
    base: Any = min((layer.base_layer for layer in fused), key=lambda one: one.weight.numel())
    try:
        error = _error(base.weight, base.bias)
    except RuntimeError as raised:  # a kernel that is not there
        if isinstance(raised, torch.OutOfMemoryError):
            raise
        log.warning(
            "model.lora.fused: does not run on %s (%s); PEFT's layers are used", base.weight.device, first_line(raised)
        )
        return unfuse(model)
    if not error < TOLERANCE:
        log.warning("model.lora.fused: is off by %.2g on %s; PEFT's layers are used", error, base.weight.device)
        unfuse(model)


def _error(weight: Tensor, bias: Tensor | None) -> float:
    """Largest relative error of `LowRank`'s output and gradients over W [O, I], with random inputs, A and B."""
    generator, kind = torch.Generator().manual_seed(0), weight.device.type
    x, a, b, grad = (
        torch.randn(*shape, generator=generator).to(weight.device)
        for shape in ((8, weight.shape[1]), (4, weight.shape[1]), (weight.shape[0], 4), (8, weight.shape[0]))
    )
    x = x.to(weight.dtype)
    found: list[list[Tensor]] = []
    for exact in (False, True):
        inputs = [one.detach().requires_grad_() for one in (x.float() if exact else x, a, b)]
        with torch.autocast(kind, weight.dtype, enabled=weight.dtype in (torch.bfloat16, torch.float16) and not exact):
            if exact:
                out = linear(inputs[0], weight.float(), None if bias is None else bias.float())
                out = out + 0.5 * (inputs[0] @ inputs[1].t()) @ inputs[2].t()
            else:
                out = LowRank.apply(inputs[0], weight, bias, inputs[1], inputs[2], 0.5)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))])
    return max(float((one.float() - right).norm() / right.norm()) for one, right in zip(*found, strict=True))


def unfuse(model: Any) -> None:
    """Give the layers back to PEFT, for wrappers that gather each parameter when its own module runs."""
    for layer in adapter_layers(model).values():
        if type(layer) is FusedLinear:
            layer.__class__ = Linear


def _plain(layer: Any) -> bool:
    """Whether the layer is W x + s B (A x) over an unpacked, frozen W and nothing else."""
    base = layer.get_base_layer()
    return (
        type(layer) is Linear
        and layer.base_layer is base
        and type(base) is nn.Linear
        and list(layer.lora_A) == [ADAPTER]
        and not (layer.lora_variant or layer.fan_in_fan_out or any(layer.lora_bias.values()))
        and not any(p.requires_grad for p in base.parameters())
    )
