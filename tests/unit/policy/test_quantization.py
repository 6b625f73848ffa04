"""A base in 4 or 8 bits: what cannot be is refused in one line; precisions meet where they should."""

import json
import sys

import pytest
import torch
from tiny_architectures import load, nudge, random_batch, save_architecture

from rlsafe.config import UserError
from rlsafe.policy import ForwardPlan, Policy
from rlsafe.policy.quantize import prepare_quantized


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_without_bitsandbytes_the_line_says_what_to_do(tiny_model_dir, bits, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=f"model.quantization: {bits}: needs bitsandbytes, .*model.quantization=null"):
        load(tiny_model_dir, quantization=bits)


def test_quantised_weights_cannot_be_trained_themselves(tiny_model_dir):
    with pytest.raises(UserError, match=r"full fine-tuning \(model.lora: null\) needs model.quantization=null"):
        load(tiny_model_dir, rank=None, quantization="4bit")


@pytest.mark.parametrize(
    ("method", "quantization", "says"),
    [
        ("gptq", None, "quantised by gptq, which cannot be trained here"),
        ("bitsandbytes", "4bit", "is quantised already; leave it null"),
    ],
)
def test_a_checkpoint_that_is_quantised_already(tmp_path, method, quantization, says):
    directory = save_architecture(tmp_path / "model", "qwen2")
    file = tmp_path / "model" / "config.json"
    stored = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    with pytest.raises(UserError, match=says):
        load(directory, quantization=quantization)


def test_the_preparation_leaves_head_and_embeddings_in_the_compute_dtype(tiny_model_dir, monkeypatch):
    """The mixture that a quantised policy computes in (float32 norms over a half-precision head), without packed weights."""
    from rlsafe.policy import load as loading

    original = loading.attach_lora
    monkeypatch.setattr(
        loading,
        "attach_lora",
        lambda model, *rest: [prepare_quantized(model, torch.bfloat16), original(model, *rest)][1],
    )
    mixed = nudge(load(tiny_model_dir, dtype="bfloat16"))
    assert mixed.dtype == torch.bfloat16 and mixed.model.model.norm.weight.dtype == torch.float32
    assert mixed.model.get_input_embeddings().weight.dtype == torch.bfloat16
    exact, batch, plan = nudge(load(tiny_model_dir)), random_batch(), ForwardPlan(references=("base",))
    out = mixed.forward(batch, plan, mixed.frozen(batch, plan))
    assert float((out.logp - exact.score(batch)).abs().mean()) < 0.1
    (out.logp.sum() + out.kl["base"].sum()).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in mixed.trainable().values())
    from rlsafe.rollouts import TransformersSampler, self_test

    assert self_test(TransformersSampler(mixed, tiny_model_dir), mixed, [[1, 40, 41]] * 3, 0, None, "test") < 0.05


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_merged_weights_are_what_the_packed_numbers_stand_for(tmp_path, bits):
    """A plain model with the merged weights is the quantised policy, layers without an adapter included."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    directory = save_architecture(tmp_path, "qwen2", hidden_size=128, intermediate_size=128)
    from rlsafe.config import LoraConfig, ModelConfig

    lora = LoraConfig(r=4, alpha=8, targets=["q_proj", "down_proj"])
    settings = ModelConfig(name=directory, lora=lora, quantization=bits, dtype="bfloat16")
    policy = nudge(Policy.load(settings, seed=1, device=device))
    merged = dict(policy.merged_weights())
    assert policy.is_quantized and any("o_proj" in name for name in merged)
    plain = load(directory, rank=None)
    with torch.no_grad():
        for name, parameter in plain.trainable().items():
            if name in merged:
                assert float((merged[name].float().cpu() - parameter).abs().max()) > 0
                parameter.copy_(merged[name])
    batch = random_batch()
    gap = (plain.score(batch) - policy.score(batch.to(device)).cpu())[batch.loss_mask].abs().mean()
    assert float(gap) < 0.1


def test_a_cpu_with_bfloat16_of_its_own_gives_training_and_scoring_the_same_4_bit_weights(tiny_model_dir, monkeypatch):
    """bitsandbytes would repack them there at the first forward without gradients."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    policy, batch = nudge(load(tiny_model_dir, dtype="bfloat16", quantization="4bit")), random_batch()
    packed = [module for module in policy.model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    before = [module.weight.data.clone() for module in packed]
    scored = policy.score(batch)
    with torch.enable_grad():
        trained = policy.forward(batch, ForwardPlan(), policy.frozen(batch, ForwardPlan())).logp.detach()
    assert packed and all(torch.equal(module.weight.data, was) for module, was in zip(packed, before, strict=True))
    torch.testing.assert_close(scored, trained)
