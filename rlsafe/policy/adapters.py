"""LoRA through PEFT: attaching an adapter, checking it, merging it into fresh weights, reading it back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlsafe.config import LoraConfig, UserError, first_line, nearest
from rlsafe.policy.quantize import is_quantized, plain_weight
from rlsafe.policy.sharding import whole

PEFT_PREFIX = "base_model.model."
ADAPTER = "default"


def attach_lora(model: Any, config: LoraConfig, seed: int) -> Any:
    """A PeftModel with a freshly initialised adapter (B = 0). UserError when a target matches no linear module."""
    import peft

    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    if isinstance(targets, list):
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        names = [name for name, _ in model.named_modules()]
        for target in targets:
            if not any(name == target or name.endswith("." + target) for name in names):
                raise UserError(
                    f"model.lora.targets: {target!r} matches no module of the model{nearest(target, linear)}"
                )
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora, bias="none",
        target_modules=targets, task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {targets!r}: {first_line(error)}") from None
    check_adapter(wrapped, "model.lora.targets")
    return wrapped


def load_adapter(model: Any, directory: str) -> Any:
    """A PeftModel that goes on training the adapter in `directory`; UserError unless it is LoRA for this model, all of it."""
    import peft

    settings = read_adapter_config(directory, "model.adapter")
    absent = [
        name for name in settings.target_modules or () if not any(n.endswith(name) for n, _ in model.named_modules())
    ]
    if isinstance(settings.target_modules, set) and absent:
        raise UserError(f"model.adapter: {directory}: adapts {absent[0]!r}, which this model does not have")
    try:
        with warnings.catch_warnings():  # what is missing is refused below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            wrapped = peft.PeftModel.from_pretrained(model, directory, is_trainable=True)
        _check_all_read(wrapped, model, directory)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise UserError(f"model.adapter: {directory}: does not fit this model: {first_line(error)}") from None
    check_adapter(wrapped, f"model.adapter: {directory}")
    return wrapped


def _check_all_read(wrapped: Any, model: Any, directory: str) -> None:
    """UserError unless the adapter's file holds the matrices of every adapted layer of `wrapped`, over `model`, and no others: PEFT
    leaves a layer that the file does not name as it is without an adapter."""
    import peft

    # Read as PEFT did (only it knows what older versions called the same matrices), for what it made of the names.
    mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    saved = peft.load_peft_weights(directory, device="cpu", key_mapping=mapping)
    found = peft.set_peft_model_state_dict(wrapped, saved, ADAPTER)
    missing, extra = (
        [name.removeprefix(PEFT_PREFIX).replace(f".{ADAPTER}.", ".") for name in names if ".lora_" in name]
        for names in (found.missing_keys, found.unexpected_keys)
    )
    if extra:
        raise UserError(
            f"model.adapter: {directory}: its file holds {extra[0]}, and this model has no such adapted layer"
            f"{nearest(extra[0], missing)}"
        )
    if missing:
        raise UserError(
            f"model.adapter: {directory}: its file lacks {missing[0]}, a layer that its adapter_config.json adapts in this model; "
            "expected matrices for all of them (layers_to_transform names those of some layers only)"
        )


def save_model(model: Any, directory: Path, name: str, state: Mapping[str, Tensor] | None) -> None:
    """PEFT's files over the base model `name`, the same bytes from any process; without an adapter the whole model's.
    state: tensors to write in place of the model's own, each in its own shape."""
    directory.mkdir(parents=True, exist_ok=True)
    lora = hasattr(model, "peft_config")
    other: dict[str, Any] = {"save_embedding_layers": False} if lora else {}
    if lora:  # the card would be empty, and cost more than all the rest of a small adapter, at every sync
        model.create_or_update_model_card = _no_card
    model.save_pretrained(str(directory), **other, **({} if state is None else {"state_dict": dict(state)}))
    if lora:
        file = directory / "adapter_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
        if isinstance(targets := settings["target_modules"], list):  # a set of PEFT's, in an order of this process
            settings["target_modules"] = sorted(targets)
        file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _no_card(directory: str) -> None:
    """In place of PEFT's model card."""


def read_adapter_config(directory: str, where: str) -> Any:
    """The PEFT settings of an adapter directory; UserError unless it is one that can be merged as W + scale * B A."""
    import peft

    path = Path(directory)
    if not path.is_dir():
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"{where}: {directory}: no such directory{nearest(str(path), siblings) if siblings else ''}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise UserError(f"{where}: {directory}: has no {name}; expected a PEFT adapter directory")
    try:
        settings = peft.PeftConfig.from_pretrained(directory)
    except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: {directory}/adapter_config.json: {first_line(error)}") from None
    if not isinstance(settings, peft.LoraConfig):
        raise UserError(f"{where}: {directory}: is a {settings.peft_type} adapter; expected LoRA")
    _check_known(json.loads((path / "adapter_config.json").read_text("utf-8")), settings, path, where)
    check_plain(settings, path, where)
    return settings


def _check_known(written: Mapping[str, Any], settings: Any, directory: Path, where: str) -> None:
    """UserError for a setting that is in force and that this PEFT, which leaves it out with a warning, does not know: it may change
    what the adapter computes. Those of newer versions that are off (null, false, empty) change nothing."""
    if unknown := sorted(key for key, value in written.items() if value and key not in vars(settings)):
        raise UserError(
            f"{where}: {directory}: {unknown[0]}={written[unknown[0]]!r} in its adapter_config.json is unknown to the PEFT that is "
            "installed, so that the adapter may do more than plain LoRA, which is expected; a newer PEFT can merge it"
        )


PLAIN = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "runtime_config"),
    *("task_type", "peft_type", "peft_version", "auto_mapping"),
    *("base_model_name_or_path", "revision", "inference_mode"),
}
"""Settings of a PEFT LoRA that leave it W + scale * B A over an untouched base."""
HARMLESS = (True, False, "gaussian", "orthogonal")
"""Initialisations that only choose the first A and B."""


def check_plain(settings: Any, directory: Path, where: str) -> None:
    """UserError for an adapter that holds or does more than LoRA matrices on a base as it is: by its settings, then its file."""
    from safetensors import SafetensorError, safe_open

    plain = type(settings)()
    for key in sorted(vars(settings).keys() - PLAIN):
        value, usual = getattr(settings, key), getattr(plain, key, None)
        if value and value != usual:
            raise UserError(
                f"{where}: {directory}: {key}={value!r} is not supported; expected plain LoRA ({key}={usual!r})"
            )
    if (start := settings.init_lora_weights) not in HARMLESS:
        raise UserError(
            f"{where}: {directory}: init_lora_weights={start!r}: loading such an adapter changes or presumes other base weights, so "
            "that the model without it is not the base; convert it to plain LoRA (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it and name the merged model"
        )
    try:
        with safe_open(str(directory / "adapter_model.safetensors"), framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: {directory}/adapter_model.safetensors: {first_line(error)}") from None
    if more := [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        others = f" and {len(more) - 1} more" if len(more) > 1 else ""
        raise UserError(
            f"{where}: {directory}: its file holds {more[0].removeprefix(PEFT_PREFIX)}{others} beside LoRA matrices; such parts "
            "are not supported: save it without them (PEFT: save_embedding_layers=False), or merge it and name the merged model"
        )
    if bare := [name for name in names if not name.startswith(PEFT_PREFIX)]:
        raise UserError(f"{where}: {directory}: its names lack PEFT's prefix {PEFT_PREFIX!r}, such as {bare[0]}")


def check_adapter(model: Any, where: str) -> None:
    """UserError when the adapter touches anything but linear layers of the decoder (an adapted head or embedding)."""
    output = model.get_base_model().get_output_embeddings()
    for name, layer in adapter_layers(model).items():
        what = "the output head" if layer is output else None if len(layer.lora_A) else "not a linear layer"
        if what:
            raise UserError(
                f"{where}: {name} is {what}; LoRA is supported on the decoder's linear layers, e.g. 'all-linear'"
            )


def adapter_layers(model: Any) -> dict[str, Any]:
    """{Hugging Face module name: PEFT LoRA layer}, in model order; empty without an adapter."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Inside, the model computes without its adapter."""
    layers = list(adapter_layers(model).values())
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def scaled(model: Any, factor: float) -> Iterator[None]:
    """Inside, the adapter's update is `factor` times what it is: every B is. UserError without an adapter."""
    factors = [layer.lora_B[ADAPTER].weight for layer in adapter_layers(model).values()]
    if not factors:
        raise UserError("evaluate.scale: scales an adapter, and a fully trained model has none; set evaluate.scale=[]")
    before = [b.detach().clone() for b in factors]
    with torch.no_grad():
        for b in factors:
            b.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for b, value in zip(factors, before, strict=True):
                b.copy_(value)


@torch.no_grad()
def merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, W + scale * B A [out, in]) of every adapted weight, added in float32 and rounded once; W inside
    `adapters_off`.

    The base stays as it is, so that merging again and again adds no rounding error. In the model's order: a sampler loads a
    block's part at once.
    """
    for name, layer in adapter_layers(model).items():
        weight = layer.get_base_layer().weight
        yield f"{name}.weight", (weight.float() + _delta(layer)).to(weight.dtype)


@torch.no_grad()
def merged_apart(model: Any) -> Iterator[tuple[str, Tensor]]:
    """`merged`, [out, in], of a model whose weights do not lie there as they are: sharded ones are gathered first (a collective).

    Over a quantised base W is the dequantised weight, and layers without an adapter are given too: a sampler that loaded
    the original checkpoint then computes with the same quantised weights as the trainer.
    """
    layers = adapter_layers(model)
    half = model.get_base_model().get_output_embeddings().weight.dtype
    for name, module in model.get_base_model().named_modules():  # in its order: a sampler loads a block's part at once
        if (layer := layers.get(name)) is not None:
            linear = layer.get_base_layer()
            weight = whole(plain_weight(linear))
            yield f"{name}.weight", (weight.float() + _delta(layer)).to(half if is_quantized(linear) else weight.dtype)
        elif is_quantized(module) and name.removesuffix(".base_layer") not in layers:
            yield f"{name}.weight", plain_weight(module).to(half)


def _delta(layer: Any) -> Tensor | float:
    """scale * B A in float32, as PEFT computes it; sharded factors are gathered first. 0 while the layer's adapter is off."""
    if layer.disable_adapters:
        return 0.0
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    if whole(a) is a:
        return layer.get_delta_weight(ADAPTER).float()
    product = whole(b) @ whole(a)
    return ((product.T if layer.fan_in_fan_out else product) * layer.scaling[ADAPTER]).float()


def read_reference(directory: str, model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{parameter name: tensor} of a saved run, each in its parameter's own shape, to be swapped in as a reference.

    LoRA: an adapter directory; its rank may differ, its scale is folded into B, modules it does not adapt get B = 0.
    Full fine-tuning: a model directory. UserError when a tensor is missing or has another shape.
    """
    where = f"reference 'path:{directory}'"
    layers = adapter_layers(model)
    if not layers:
        return _read_full(Path(directory), parameters, where)
    from safetensors.torch import load_file

    settings = read_adapter_config(directory, where)
    saved = load_file(str(Path(directory) / "adapter_model.safetensors"))
    out: dict[str, Tensor] = {}
    for name, layer in layers.items():
        pair = [saved.pop(f"{PEFT_PREFIX}{name}.lora_{side}.weight", None) for side in "AB"]
        own = [parameters[f"{PEFT_PREFIX}{name}.lora_{side}.{ADAPTER}.weight"] for side in "AB"]
        if pair[0] is None or pair[1] is None:
            a, b = own[0].detach().clone(), torch.zeros_like(own[1])
        else:
            scale = _scale(settings, name) / layer.scaling[ADAPTER]
            a, b = pair[0].to(own[0]), pair[1].to(own[1]) * scale
        if a.shape[1:] != own[0].shape[1:] or b.shape[:1] != own[1].shape[:1]:
            raise UserError(f"{where}: {name} has another shape than this model's")
        for side, tensor in zip("AB", (a, b), strict=True):
            out[f"{PEFT_PREFIX}{name}.lora_{side}.{ADAPTER}.weight"] = tensor
    if saved:
        raise UserError(
            f"{where}: adapts {next(iter(saved))}, which this run's adapter (model.lora.targets) does not cover"
        )
    return out


def _scale(settings: Any, name: str) -> float:
    rank = _pattern(settings.rank_pattern, name, settings.r)
    alpha = _pattern(settings.alpha_pattern, name, settings.lora_alpha)
    return alpha / (rank**0.5 if settings.use_rslora else rank)


def _pattern(pattern: dict[str, Any] | None, name: str, default: Any) -> float:
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(list(pattern or {}), name)
    return float((pattern or {}).get(key, default))


def _read_full(directory: Path, parameters: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted(directory.glob("model*.safetensors")) if directory.is_dir() else []
    if not files:
        raise UserError(f"{where}: no model*.safetensors there; full fine-tuning expects a model directory")
    saved: dict[str, Tensor] = {}
    for file in files:
        saved |= load_file(str(file))
    for name, parameter in parameters.items():
        if name not in saved or saved[name].shape != parameter.shape:
            raise UserError(f"{where}: {name} is missing or has another shape")
    return {name: saved[name].to(parameter) for name, parameter in parameters.items()}
