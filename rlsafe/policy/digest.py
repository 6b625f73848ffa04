"""The digest of a policy's weights: what is kept on disk about a model is kept under it."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from rlsafe.policy.sharding import whole

if TYPE_CHECKING:
    from rlsafe.policy.policy import Policy

SAMPLED_VALUES = 1 << 16  # values of a tensor that the digest reads one by one
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(policy: Policy, base: bool = False) -> str:
    """Digest of the weights that the policy samples with, or of the model that it began as: of every tensor the sum of its bits
    and evenly spaced values.

    base: leave the adapter out, or take a fully trained model's first weights. A fresh adapter (B = 0) changes nothing yet, so
    its random A is left out in any case, and runs of several seeds share a digest.
    """
    digest = hashlib.sha256()
    left_out = policy.trainable() if policy.is_lora and (base or policy.config.adapter is None) else {}
    with policy.at("base") if base else nullcontext():
        for name, parameter in policy.core.model.named_parameters():
            if name not in left_out:
                flat = whole(parameter).detach().contiguous().flatten()
                values = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].to("cpu", torch.float32)
                bits = int(
                    flat.view(_BITS[flat.element_size()]).sum(dtype=torch.int64)
                )  # integers: the same in any order
                digest.update(f"{name} {tuple(parameter.shape)} {flat.dtype} {bits}".encode())
                digest.update(values.numpy().tobytes())
    return digest.hexdigest()
