"""Weights for samplers and disks: merged fresh, never in place; saved as PEFT reads them."""

import copy
import json

import peft
import pytest
import torch
from tiny_architectures import load, nudge, random_batch, save_architecture


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "phi3"])
def test_merged_weights_are_those_of_pefts_own_merge(architecture, tmp_path):
    policy = nudge(load(save_architecture(tmp_path, architecture)))
    merged = dict(policy.merged_weights())
    theirs = copy.deepcopy(policy.core.model).merge_and_unload()
    state = theirs.state_dict()
    assert len(merged) == len(policy.adapted()) and set(merged) <= set(state)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, state[name], atol=1e-6), name
    plain = load(str(tmp_path)).model
    batch = random_batch()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            hf_name = name.replace(".base_layer.", ".")
            if hf_name in merged:
                parameter.copy_(merged[hf_name])
        assert torch.allclose(plain(batch.ids).logits, theirs(batch.ids).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_hundred_merges_leave_the_base_bitwise_unchanged(tiny_model_dir, dtype):
    """Trap 10: merging in place and out again corrupts a half-precision base."""
    policy = nudge(load(tiny_model_dir, dtype=dtype))
    before = {name: p.clone() for name, p in policy.core.named_parameters()}
    first = dict(policy.merged_weights())
    for _ in range(200):
        last = dict(policy.merged_weights())
    assert all(torch.equal(before[name], p) for name, p in policy.core.named_parameters())
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert all(t.dtype == policy.dtype and not t.requires_grad for t in last.values())


def test_half_precision_merges_are_rounded_once(tiny_model_dir):
    policy = nudge(load(tiny_model_dir, dtype="bfloat16"))
    for name, layer in policy.adapted().items():
        exact = layer.get_base_layer().weight.double()
        exact = exact + layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * (8 / 2)
        assert torch.equal(dict(policy.merged_weights())[f"{name}.weight"], exact.float().to(torch.bfloat16))
        break


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_base_the_merged_weights_are_the_bases(tiny_model_dir, dtype):
    policy = nudge(load(tiny_model_dir, dtype=dtype))
    trained = dict(policy.merged_weights())
    with policy.at("base"):
        base = dict(policy.merged_weights())
    for name, layer in policy.adapted().items():
        weight = layer.get_base_layer().weight
        assert torch.equal(base[f"{name}.weight"], weight) and not torch.equal(trained[f"{name}.weight"], weight)
        assert base[f"{name}.weight"].data_ptr() != weight.data_ptr()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in policy.merged_weights())


def test_full_fine_tuning_gives_every_tensor_once(tiny_model_dir):
    policy = nudge(load(tiny_model_dir, rank=None))
    merged = dict(policy.merged_weights())
    assert set(merged) == {name for name, _ in policy.model.named_parameters()}
    assert "lm_head.weight" not in merged  # tied to the embeddings


def test_a_saved_adapter_loads_in_plain_peft(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = nudge(load(tiny_model_dir))
    policy.save_adapter(tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == policy.config.name and settings["use_rslora"]
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), str(tmp_path / "adapter")
    )
    batch = random_batch()
    with torch.no_grad():
        assert torch.allclose(plain(batch.ids).logits, policy.core.model(batch.ids).logits, atol=1e-6)


def test_state_dict_is_a_copy_and_loads_in_place(tiny_model_dir):
    policy = load(tiny_model_dir)
    parameters = policy.trainable()
    state = policy.state_dict()
    nudge(policy)
    assert not any(torch.equal(state[name], p) for name, p in parameters.items())
    policy.load_state_dict(state)
    assert all(torch.equal(state[name], p) for name, p in parameters.items())
    assert policy.trainable() == parameters
    with pytest.raises(ValueError, match="other tensors"):
        policy.load_state_dict({})


def test_the_seed_draws_the_adapter_and_nothing_else(tiny_model_dir):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    a, b = load(tiny_model_dir).state_dict(), load(tiny_model_dir).state_dict()
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not a[name].any() for name in a if "lora_B" in name)


def test_a_fresh_adapter_of_another_seed_is_the_same_model(tiny_tree):
    from rlsafe.config import ModelConfig
    from rlsafe.policy import Policy
    from rlsafe.policy.digest import weights_digest

    config = ModelConfig(**tiny_tree["model"])
    one, other = (Policy.load(config, seed=seed) for seed in (0, 1))
    assert weights_digest(one) == weights_digest(other)
    full = Policy.load(config.model_copy(update={"lora": None}))
    before = weights_digest(full)
    with torch.no_grad():
        next(iter(full.trainable().values())).view(-1)[0] += 1e-3
    assert weights_digest(full) != before
