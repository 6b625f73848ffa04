"""A GGUF file as an ordinary model directory: dequantised once, with its tokenizer and chat template, and checked.

The directory lies in the cache under a hash of the file's bytes and the dtype. Everything else (training, vLLM, merging,
references) then sees a model in Hugging Face's layout, without a mark of quantisation: the weights are what the file's blocks
stand for, rounded once to the dtype.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from rlsafe.config import ModelConfig, UserError
from rlsafe.config.files import file_hash
from rlsafe.config.gguf import gguf_file

log = logging.getLogger("rlsafe")
FORMAT = "3"  # of what is written here: another one makes the directories anew
ORIGIN = "gguf.json"
"""Beside the weights: where they come from."""
DIVISORS = "rope_freqs.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""How Llama 3.1, 3.2 and 3.3 scale their rotary frequencies, all but the factor; their files hold what comes of it, DIVISORS."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def gguf_directory(config: ModelConfig) -> str:
    """The model directory of the GGUF file that `model.name` names; made on first use, which can take a minute.

    dtype "auto" is float32 on a CPU (as everywhere here) and bfloat16 on a GPU. UserError for a missing or damaged file, one
    whose architecture or tokenizer is not supported, and where the package `gguf` is missing.
    """
    path = gguf_file(config.name)
    dtype = config.dtype
    if dtype == "auto":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.name: {config.name}: is not a GGUF file (its first bytes say so)")
    content = file_hash(path)
    key = hashlib.sha256(f"{FORMAT}|{content}|{dtype}".encode()).hexdigest()[:24]
    directory = Path.home() / ".cache" / "rlsafe" / "gguf" / key
    if not (directory / "config.json").is_file():
        _make(config.name, path, content, dtype, directory)
    return str(directory)


def origin(directory: str | Path) -> dict[str, str]:
    """What `gguf_directory` noted: {"file", "sha256", "dtype", and of the file's own words "name", "organization", "license"}; {}
    for a directory that is not from a GGUF file."""
    file = Path(directory) / ORIGIN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _make(name: str, path: Path, content: str, dtype: str, directory: Path) -> None:
    """Convert into a temporary directory beside `directory`, then rename: the directory is whole or absent."""
    if find_spec("gguf") is None:
        raise UserError(
            f"model.name: {name}: reading GGUF files needs the package gguf; pip install -e '.[local]', or run "
            "scripts/demo --real"
        )
    log.warning("%s: dequantising to %s once, into %s", name, dtype, directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with _one_reader(name, path) as reader, redirect_stderr(io.StringIO()):  # progress bars of the libraries
            fields = dict(reader.fields)
            if "split.count" in fields and (parts := int(fields["split.count"].contents())) > 1:
                raise UserError(
                    f"model.name: {name}: is one of {parts} parts of a model; join them into one file first (llama.cpp: "
                    "llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf)"
                )
            _save(name, path, fields, {tensor.name: tensor for tensor in reader.tensors}, DTYPES[dtype], temporary)
        about = {"file": path.name, "sha256": content, "dtype": dtype}
        for key in ("name", "organization", "license"):
            if f"general.{key}" in fields:
                about[key] = str(fields[f"general.{key}"].contents())
        (temporary / ORIGIN).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        with suppress(OSError):  # another process was first
            temporary.rename(directory)
        if not (directory / "config.json").is_file():
            raise UserError(f"model.name: {name}: {directory} cannot be written")
    except OSError as error:
        raise UserError(f"model.name: {name}: cannot be converted: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _one_reader(name: str, path: Path) -> Iterator[Any]:
    """The file's reader, which Transformers is given too: it would parse the vocabulary again for every part it wants (for
    150,000 tokens several seconds each)."""
    import gguf

    original = gguf.GGUFReader
    try:
        reader = original(str(path))
    except Exception as error:  # cut short or overwritten: the reader stumbles somewhere
        raise UserError(f"model.name: {name}: damaged or cut short: {_first_line(error)}") from None
    with patch.object(gguf, "GGUFReader", lambda asked: reader if Path(asked) == path else original(asked)):
        yield reader


def _save(
    name: str, path: Path, fields: dict[str, Any], tensors: dict[str, Any], dtype: torch.dtype, directory: Path
) -> None:
    from rlsafe.policy.gguf_tokenizer import build_tokenizer, check, check_saved, is_byte_level, stop_ids

    architecture = str(fields["general.architecture"].contents()) if "general.architecture" in fields else "unnamed"
    tokenizer = build_tokenizer(name, path, architecture, fields)
    model = _load(name, path, architecture, dtype)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied == ("output.weight" in tensors):
        raise UserError(f"model.name: {name}: its head was not read as the file has it (output.weight)")
    _restore_scaling(name, model.config.get_text_config(), fields, tensors)
    check(name, tokenizer, model.get_input_embeddings().weight.shape[0])
    model.config.tie_word_embeddings = tied
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    for key in ("_model_name_or_path", "_name_or_path"):  # the file's title, or this machine's path
        vars(model.config).pop(key, None)
    model.generation_config.eos_token_id = stop_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    if is_byte_level(fields):
        check_saved(name, tokenizer, directory)


def _restore_scaling(name: str, config: Any, fields: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Note in `config` how the file scales its rotary frequencies, which Transformers 5.17 reads for few architectures.

    UserError where that is not known exactly: the model would compute with other positions than it was trained with.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds - {"default"}:  # was read, or goes without saying
        return
    said = {key.partition(".")[2]: field.contents() for key, field in fields.items() if ".rope.scal" in key}
    kind = said.get("rope.scaling.type", "linear")  # what llama.cpp takes it for
    factor = said.get("rope.scaling.factor", said.get("rope.scale_linear", 1))
    found = [tensor for tensor in tensors if "rope_f" in tensor]
    if kind not in ("none", "linear") or kind == "linear" and factor not in (0, 1):
        found.append(f"rope.scaling: {kind}, factor {factor:g}")
    if found and not (found == [DIVISORS] and _as_llama_3(config, tensors[DIVISORS])):
        raise UserError(
            f"model.name: {name}: scales its rotary positions in a way that is not read from GGUF files ({found[0]}); use the "
            "model's own checkpoint (safetensors) instead"
        )


def _as_llama_3(config: Any, tensor: Any) -> bool:
    """Give `config` the scaling of Llama 3, if the file's divisors [head_dim / 2] of the frequencies are those that it makes."""
    import gguf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = config.rope_parameters
    divisors = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).flatten().float()
    if bool((divisors == 1).all()):
        return True
    if "rope_type" not in plain:  # one for each kind of layer
        return False

    def frequencies(factor: float) -> torch.Tensor:
        config.rope_parameters = {**plain, "rope_type": "llama3", "factor": factor, **LLAMA_3}
        return ROPE_INIT_FUNCTIONS["llama3"](config)[0]

    expected = frequencies(1.0) / frequencies(float(divisors.max()))
    return expected.shape == divisors.shape and torch.allclose(expected, divisors, rtol=1e-4)


def _load(name: str, path: Path, architecture: str, dtype: torch.dtype) -> Any:
    """The dense model, every one of its weights read from the file, without a mark that it ever was quantised."""
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=dtype, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
    except Exception as error:  # Transformers' own limits, or data that are not what the header says
        reason = _first_line(error)
        if "not supported" in reason or isinstance(error, NotImplementedError):
            raise UserError(
                f"model.name: {name}: Transformers cannot read GGUF files of the architecture {architecture!r} ({reason}); "
                "expected one such as llama, qwen2, qwen3, gemma3 or phi3"
            ) from None
        raise UserError(f"model.name: {name}: damaged, or not a causal language model: {reason}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model.name: {name}: the file lacks {len(missing)} of the model's weights, such as {missing[0]}"
        )
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
