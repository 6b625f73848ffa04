"""A frozen base in 4 or 8 bits (bitsandbytes) with LoRA on top: QLoRA, Dettmers et al. 2023 (arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlsafe.config import ModelConfig, UserError

_PACKED: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
WITHOUT = "set model.quantization=null (bfloat16) or train a smaller model"


def check_quantization(config: ModelConfig, settings: Any, device: torch.device) -> bool:
    """Whether the base is to be quantised: `model.quantization` asks for it, or the checkpoint is stored that way.

    UserError without LoRA (nothing could be trained), for a checkpoint quantised by anything but bitsandbytes, and where
    bitsandbytes is missing or does not support this device.
    """
    stored = getattr(settings, "quantization_config", None)
    if stored is None and config.quantization is None:
        return False
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        method = str(getattr(method, "value", method))
        if method != "bitsandbytes":
            raise UserError(
                f"model.name: {config.name}: its checkpoint is quantised by {method}, which cannot be trained here; "
                "expected an unquantised or a bitsandbytes checkpoint"
            )
        if config.quantization is not None:
            raise UserError(
                f"model.quantization: {config.quantization}: the checkpoint of {config.name} is quantised already; "
                "leave it null"
            )
    where = f"model.quantization: {config.quantization}" if config.quantization else f"model.name: {config.name}"
    if config.lora is None:
        raise UserError(f"{where}: quantised weights cannot be trained themselves; full fine-tuning (model.lora: null) "
                        "needs model.quantization=null and an unquantised checkpoint")  # fmt: skip
    _require_bitsandbytes(where, device)
    return True


def _require_bitsandbytes(where: str, device: torch.device) -> None:
    try:
        import bitsandbytes
    except Exception as error:  # absent, or broken native libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{where}: needs bitsandbytes, which does not import here ({reason}); {WITHOUT}") from None
    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device.type not in supported:
        raise UserError(
            f"{where}: this bitsandbytes runs on {', '.join(sorted(supported))}, not on {device.type}; {WITHOUT}"
        )


def quantization_settings(bits: Literal["4bit", "8bit"], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained`. The head is not quantised: losses and KLs are computed from its probabilities."""
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": four}


def prepare_quantized(model: Any, dtype: torch.dtype) -> None:
    """Apply PEFT's preparation (everything frozen, norms in float32), put embeddings and head back in `dtype`, and keep packed weights
    as they were stored. In float32 embeddings and head would take a third of a 4-bit model's memory.
    """
    import peft

    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.to(dtype)
    # On a processor with bfloat16 of its own, bitsandbytes 0.50 repacks a 4-bit weight at its first forward without gradients, with
    # scales rounded to bfloat16: other numbers than in training, and an error where rows are no multiple of its blocks.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def plain_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer: the parameter itself, or a dequantised copy."""
    weight: Any = module.weight
    if type(weight).__name__ != "Int8Params":
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(module)
    # On a CPU PEFT's function would leave the layer without the scales of its rows. They move to the layer's state as it first runs.
    from bitsandbytes.functional import int8_vectorwise_dequant

    state: Any = module.state
    return int8_vectorwise_dequant(weight.data, state.SCB if weight.SCB is None else weight.SCB)


def quantized_as(module: nn.Module) -> Literal["4bit", "8bit"] | None:
    """How a layer's weight is stored in bitsandbytes' packed form; None when it is not."""
    return _PACKED.get(type(getattr(module, "weight", None)).__name__)


def is_quantized(module: nn.Module) -> bool:
    return quantized_as(module) is not None
