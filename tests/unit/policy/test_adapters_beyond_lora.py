"""What a PEFT adapter may carry beyond LoRA matrices is refused before training, by its settings and by its file; so are matrices
that do not fit the model's layers one to one."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_architectures import load
from transformers import AutoModelForCausalLM

from rlsafe.config import ModelConfig, UserError
from rlsafe.policy.adapters import read_adapter_config


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return tiny_model_dir


def adapter(base: str, directory: Path, **settings) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings)
    peft.get_peft_model(model, config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa': .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora'"),
        ({"use_dora": True}, r"use_dora=True is not supported; expected plain LoRA"),
        ({"bias": "lora_only"}, r"bias='lora_only' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=.*lm_head"),
        ({"trainable_token_indices": [3, 4]}, r"trainable_token_indices=.* is not supported"),
        ({"lora_bias": True}, r"lora_bias=True"),
    ],
)
def test_what_its_settings_say(base, tmp_path, settings, says):
    with pytest.raises(UserError, match=f"model.adapter: {tmp_path}/a: {says}"):
        read_adapter_config(str(adapter(base, tmp_path / "a", **settings)), "model.adapter")


def test_a_setting_of_a_newer_peft_is_refused_where_it_is_in_force(base, tmp_path):
    directory = adapter(base, tmp_path / "a")
    file = directory / "adapter_config.json"
    written = json.loads(file.read_text())
    for off in (None, False, [], {}, ""):
        file.write_text(json.dumps(written | {"use_new_thing": off, "peft_version": "99.0"}))
        read_adapter_config(str(directory), "model.adapter")
    file.write_text(json.dumps(written | {"use_new_thing": True}))
    with pytest.raises(
        UserError, match="model.adapter: .*use_new_thing=True in its adapter_config.json is unknown to the PEFT"
    ):
        read_adapter_config(str(directory), "model.adapter")


def test_what_only_its_file_shows(base, tmp_path):
    """PEFT saves a resized embedding without a word in adapter_config.json."""
    directory = adapter(base, tmp_path / "a")
    read_adapter_config(str(directory), "model.adapter")
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    for extra in (
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.bias",
    ):
        save_file({**tensors, extra: torch.zeros(4, 4)}, file)
        name = extra.removeprefix("base_model.model.")
        with pytest.raises(UserError, match=f"its file holds {name} beside LoRA matrices"):
            read_adapter_config(str(directory), "model.adapter")
    file.write_bytes(b"")
    with pytest.raises(UserError, match="adapter_model.safetensors: "):
        read_adapter_config(str(directory), "model.adapter")


def test_plain_adapters_of_all_kinds_pass(base, tmp_path):
    for number, settings in enumerate(
        [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"rank_pattern": {"q_proj": 1}}]
    ):
        read_adapter_config(str(adapter(base, tmp_path / str(number), **settings)), "model.adapter")


def rewritten(directory: Path, change) -> str:
    """The adapter with a file of other names: `change` gives each matrix's, or None to leave it out."""
    file = directory / "adapter_model.safetensors"
    save_file({new: t for name, t in load_file(file).items() if (new := change(name))}, file)
    return str(directory)


def test_names_without_the_prefix_of_peft_are_said_to_lack_it(base, tmp_path):
    directory = rewritten(adapter(base, tmp_path / "a"), lambda name: name.removeprefix("base_model.model."))
    says = "a: its names lack PEFT's prefix 'base_model.model.', such as model.layers.0.self_attn.q_proj.lora_A.weight$"
    with pytest.raises(UserError, match=says):
        load(base, adapter=directory)
    with pytest.raises(UserError, match=says):
        read_adapter_config(directory, "reference")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (  # saved from a multimodal class over the same language model
            lambda name: name.replace("model.layers.", "model.language_model.layers."),
            "its file holds model.language_model.layers.0.self_attn.q_proj.lora_A.weight, and this model has no such adapted layer; "
            "did you mean 'model.layers.0.self_attn.q_proj.lora_A.weight'",
        ),
        (
            lambda name: None if ".layers.1." in name else name,
            "its file lacks model.layers.1.self_attn.q_proj.lora_A.weight, a layer that",
        ),
        (
            lambda name: None if name.endswith("1.self_attn.q_proj.lora_B.weight") else name,
            "its file lacks model.layers.1.self_attn.q_proj.lora_B.weight, a layer that",
        ),
        (  # of a deeper model
            lambda name: name.replace(".layers.1.", ".layers.7."),
            "its file holds model.layers.7.self_attn.q_proj.lora_A.weight, and this model",
        ),
    ],
)
def test_matrices_that_the_model_would_not_take_are_refused(base, tmp_path, change, says):
    """PEFT would leave these layers without an adapter, with a warning at most."""
    with pytest.raises(UserError, match=f"model.adapter: {tmp_path}/a: {says}") as error:
        load(base, adapter=rewritten(adapter(base, tmp_path / "a"), change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"q_proj": 3}},
        {"use_rslora": True, "task_type": None},
    ],
)
def test_adapters_of_some_layers_are_loaded_whole(base, tmp_path, settings):
    directory = adapter(base, tmp_path / "a", init_lora_weights=False, **settings)
    policy = load(base, adapter=str(directory))
    saved = load_file(directory / "adapter_model.safetensors")
    held = {name.replace(".default.", "."): tensor for name, tensor in policy.trainable().items()}
    assert set(held) == set(saved) and all(torch.equal(held[name], saved[name]) for name in saved)


def test_another_method_is_named(base, tmp_path):
    directory = adapter(base, tmp_path / "a")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "VERA", "task_type": "CAUSAL_LM", "r": 2}))
    with pytest.raises(UserError, match="is a .*VERA.* adapter; expected LoRA"):
        read_adapter_config(str(directory), "model.adapter")


def test_a_run_is_refused_before_the_model_is_loaded(base, tmp_path, tiny_tree):
    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.build import prepare

    tiny_tree["model"]["adapter"] = str(adapter(base, tmp_path / "a", init_lora_weights="pissa"))
    with pytest.raises(UserError, match="init_lora_weights='pissa'"):
        prepare(run_from_tree(tiny_tree))
    assert ModelConfig(**tiny_tree["model"]).adapter
