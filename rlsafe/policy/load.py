"""Loading a causal LM and its tokenizer; every wrong input ends as one clear line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from rlsafe.config import ModelConfig, UserError, first_line, nearest
from rlsafe.data import Chat, configure_chat
from rlsafe.policy.adapters import attach_lora, load_adapter
from rlsafe.policy.quantize import check_quantization, prepare_quantized, quantization_settings

log = logging.getLogger("rlsafe")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(config: ModelConfig, path: str) -> Any:
    """The tokenizer with its chat template (or the one in `model.chat_template`) and a padding token.

    UserError when it does not load or has no template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # tokenizer files fail in many ways; all of them are about the user's directory
        raise UserError(f"model.name: {config.name}: its tokenizer does not load: {first_line(error)}") from None
    if config.chat_template is not None:
        template = Path(config.chat_template)
        if not template.is_file():
            siblings = [str(p) for p in template.parent.glob("*.jinja*")] if template.parent.is_dir() else []
            raise UserError(
                f"model.chat_template: {template}: no such file{nearest(str(template), siblings) if siblings else ''}"
            )
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise UserError(
            f"model.name: {config.name}: the tokenizer has no chat template; name a Jinja file in model.chat_template"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name: {config.name}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(config: ModelConfig, tokenizer: Any, rows: int) -> None:
    """Check the tokenizer against the model and store the chat settings of the config on it.

    rows: of the model's embedding matrix. UserError unless a rendered message becomes tokens, the rows cover the
    vocabulary, and the template can do what `model.thinking` asks.
    """
    message = [{"role": "user", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template raises, it is the template
        raise UserError(f"model.name: {config.name}: its chat template does not render: {first_line(error)}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"model.name: {config.name}: its tokenizer gives no tokens; is tokenizer.json missing?")
    # A few added tokens beyond the embeddings are common and harmless: encoding reports a text that contains one. Missing
    # ordinary tokens are refused here, because any text may contain them.
    added = tokenizer.get_added_vocab()
    ordinary = (index for token, index in tokenizer.get_vocab().items() if token not in added)
    largest = max(*ids, tokenizer.eos_token_id, tokenizer.pad_token_id, *ordinary)
    if largest >= rows:
        raise UserError(
            f"model.name: {config.name}: its tokenizer has ids up to {largest}, the model embeds only {rows} tokens; expected "
            "the tokenizer that the model was trained with"
        )
    configure_chat(tokenizer, Chat(config.thinking, config.train_thinking, rows))


def resolve_dtype(config: ModelConfig, device: torch.device, model_config: Any) -> torch.dtype:
    """ "auto": float32 on CPU, elsewhere what the checkpoint holds, or float32 where the GPU has no bfloat16. UserError for a dtype
    that the device does not support."""
    if config.dtype == "auto":
        stored = getattr(model_config.get_text_config(), "dtype", None) or torch.float32
        if device.type == "cpu" or stored == torch.bfloat16 and not has_bfloat16(device):
            return torch.float32
        return stored
    dtype = DTYPES[config.dtype]
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("model.dtype: float16 does not train on a CPU; expected float32 or bfloat16")
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        raise UserError("model.dtype: this GPU does not support bfloat16; expected float32 or float16")
    return dtype


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself; GPUs before Ampere only emulate it, slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def load_model(config: ModelConfig, path: str, seed: int, device: torch.device, in_host_memory: bool = False) -> Any:
    """The model on `device`, with its adapter when `model.lora` is set; only what is trained requires gradients.

    in_host_memory: dtype and kernels are chosen for `device`, but the weights stay on the CPU (for sharding).
    UserError for whatever keeps it from loading.
    """
    from transformers import AutoConfig

    if config.adapter and config.lora is None:
        raise UserError(
            "model.adapter: full fine-tuning (model.lora: null) cannot start from an adapter; merge it first"
        )
    try:
        settings = AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name: {config.name}: {_explain(path, error)}") from None
    dtype = resolve_dtype(config, device, settings)
    if config.lora is None and dtype != torch.float32:
        log.warning(
            "full fine-tuning in %s: steps smaller than the weights' rounding are lost; model.dtype=float32 keeps them",
            str(dtype).removeprefix("torch."),
        )
    quantized = check_quantization(config, settings, device)
    extra = quantization_settings(config.quantization, dtype) if config.quantization else {}
    if quantized:  # quantised weights are made on their device and stay there
        extra["device_map"] = {"": "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"}
    model = _read_model(config, path, dtype=dtype, attn_implementation=_attention(config, settings), **extra)
    without_dropout(model, config.name)
    if quantized:
        prepare_quantized(model, dtype)
    if config.adapter:
        model = load_adapter(model, config.adapter)
    elif config.lora is not None:
        model = attach_lora(model, config.lora, seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = model if quantized or in_host_memory else model.to(device)
    if config.lora is not None:
        from rlsafe.policy import lora

        lora.fuse(model, config.lora.fused)
        if device.type != "cpu" and not in_host_memory:  # tests prove it on CPUs; shards are not fused
            lora.check_fused(model)
    return model


HEADS = ("classifier", "summary")  # whose dropout a config names too, and which a causal language model does not have


def without_dropout(model: Any, name: str) -> None:
    """Switch the model's own dropout off (GPT-2, OPT and Phi-2 have some), and say so. Sampler, references and scores have none: a
    training forward with it would be of another policy than the one that sampled, and a KL to the start would measure its noise."""
    parts = [*model.modules(), model.config, model.config.get_text_config()]
    named = [(part, "p") for part in parts if isinstance(part, _DropoutNd)]
    # Modules also call functions with a rate of their own, or with their config's.
    named += [(part, key) for part in parts for key in vars(part) if "drop" in key and not key.startswith(HEADS)]
    rates = set()
    for part, key in named:
        rate = getattr(part, key)
        if isinstance(rate, float) and 0 < rate < 1:
            setattr(part, key, 0.0)
            rates.add(rate)
    if rates:
        shown = ", ".join(f"{rate:g}" for rate in sorted(rates))
        log.warning(
            "model.name: %s: the model's own dropout (%s) is off in training, as it is in sampling", name, shown
        )


def _attention(config: ModelConfig, settings: Any) -> str:
    """The attention kernels to use: `model.attention`, unless they would compute another model."""
    if config.attention == "sdpa" and getattr(settings.get_text_config(), "attn_logit_softcapping", None):
        # Transformers 5.17 ignores the cap there (Gemma 2), so trainer and sampler would compute different models
        log.warning("model.attention: sdpa ignores this model's attention softcap; eager is used")
        return "eager"
    return config.attention


def _read_model(config: ModelConfig, path: str, **settings: Any) -> Any:
    """`from_pretrained` with its errors as UserErrors."""
    from transformers import AutoModelForCausalLM

    try:
        with no_progress_bar():
            return AutoModelForCausalLM.from_pretrained(
                path, revision=config.revision, trust_remote_code=config.trust_remote_code, **settings
            )
    except ImportError as error:
        raise UserError(f"model.attention: {config.attention}: {first_line(error)}") from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        about = "model.attention" if "attn" in str(error) or "attention" in str(error).lower() else "model.name"
        raise UserError(f"{about}: {config.name}: {first_line(error)}") from None


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Inside, Transformers shows no progress bars: a run shows its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _explain(path: str, error: Exception) -> str:
    local = Path(path)
    if local.is_dir():
        return f"{path} is not a Hugging Face model directory: {first_line(error)}"
    if local.parent.is_dir() and len(local.parts) > 1:
        siblings = [p.name for p in local.parent.iterdir() if (p / "config.json").is_file()]
        if siblings:
            return f"no such model directory{nearest(local.name, siblings)}"
    return f"neither a model directory nor a model that the hub gives us: {first_line(error)}"
