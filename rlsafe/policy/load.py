"""Loading a causal LM and its tokenizer; every wrong input ends as one clear line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlsafe.config import ModelConfig, UserError, nearest
from rlsafe.data import Chat, configure_chat
from rlsafe.policy.adapters import attach_lora, load_adapter
from rlsafe.policy.quantize import check_quantization, prepare_quantized, quantization_settings

log = logging.getLogger("rlsafe")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(config: ModelConfig, path: str) -> Any:
    """The tokenizer with its chat template (or the one in `model.chat_template`) and a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # tokenizer files fail in many ways; all of them are about the user's directory
        raise UserError(f"model.name: {config.name}: its tokenizer does not load: {_first_line(error)}") from None
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
    """UserError unless a rendered message becomes tokens, the model's `rows` embeddings cover the vocabulary, and the template
    can do what `model.thinking` asks. From here on the tokenizer carries these chat settings."""
    message = [{"role": "user", "content": "x"}]
    try:
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template raises, it is the template
        raise UserError(f"model.name: {config.name}: its chat template does not render: {_first_line(error)}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"model.name: {config.name}: its tokenizer gives no tokens; is tokenizer.json missing?")
    # A few surplus added tokens are common and harmless: encoding tells where a text spells one. Ordinary ones may be in any.
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
    """ "auto": float32 on CPU, elsewhere what the checkpoint holds."""
    if config.dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return getattr(model_config.get_text_config(), "dtype", None) or torch.float32
    dtype = DTYPES[config.dtype]
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("model.dtype: float16 does not train on a CPU; expected float32 or bfloat16")
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError("model.dtype: this GPU does not support bfloat16; expected float32 or float16")
    return dtype


def load_model(config: ModelConfig, path: str, seed: int, device: torch.device, in_host_memory: bool = False) -> Any:
    """The model on `device`, with its adapter when `model.lora` is set; only what is trained requires gradients.

    in_host_memory: made for `device`, but left in the host's memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

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
    attention = config.attention
    if attention == "sdpa" and getattr(settings.get_text_config(), "attn_logit_softcapping", None):
        # Transformers 5.17 leaves the cap out there (Gemma 2): trainer and sampler would be two models
        attention = "eager"
        log.warning("model.attention: sdpa ignores this model's attention softcap; eager is used")
    try:
        with no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(
                path, revision=config.revision, trust_remote_code=config.trust_remote_code, dtype=dtype,
                attn_implementation=attention, **extra,
            )  # fmt: skip
    except ImportError as error:
        raise UserError(f"model.attention: {config.attention}: {_first_line(error)}") from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        about = "model.attention" if "attn" in str(error) or "attention" in str(error).lower() else "model.name"
        raise UserError(f"{about}: {config.name}: {_first_line(error)}") from None
    if quantized:
        prepare_quantized(model, dtype)
    if config.adapter:
        model = load_adapter(model, config.adapter)
    elif config.lora is not None:
        model = attach_lora(model, config.lora, seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if quantized or in_host_memory else model.to(device)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Transformers' own bars off: a run has one of its own."""
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
        return f"{path} is not a Hugging Face model directory: {_first_line(error)}"
    if local.parent.is_dir() and len(local.parts) > 1:
        siblings = [p.name for p in local.parent.iterdir() if (p / "config.json").is_file()]
        if siblings:
            return f"no such model directory{nearest(local.name, siblings)}"
    return f"neither a model directory nor a model that the hub gives us: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
