"""LoRA layers as one autograd node: W x + s B (A x) without a float32 copy of the input, one rounding, two tensors kept.

PEFT computes base, A, B, scale and sum as separate operations, and under a half-precision base it casts the input of each adapted
layer to float32 and back. Here the same adapter (its parameters, its files, its settings are PEFT's) runs as three products forward
and five backward, the sum made inside the product. The parameters stay float32, for the optimizer; their casts are made per forward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from rlsafe.policy.adapters import ADAPTER, adapter_layers

SMALL = 16_000_000
"""Parameters up to which a float32 model keeps PEFT's order of additions, so that runs of the organism repeat bit for bit."""


class LowRank(torch.autograd.Function):
    """x [..., in] -> x W^T + bias + scale x A^T B^T [..., out]; W and bias frozen, A [r, in] and B [out, r] trained.

    Computes in W's dtype; the gradients of A and B have theirs. Keeps x, A x and the cast A and B for the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x [..., in], weight [out, in], bias [out], a [r, in], b [out, r] -> [..., out]."""
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
        """grad [..., out] -> the gradients of x [..., in], a [r, in] and b [out, r]; those of a and b summed over all rows."""
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
        """x [..., in] -> [..., out]."""
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
