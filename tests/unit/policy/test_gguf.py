"""A GGUF file becomes an ordinary model: its weights, its head, its tokenizer; what is wrong with one is one line."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (the extra local)")

from rlsafe.config import ModelConfig, UserError  # noqa: E402
from rlsafe.config.gguf import gguf_file, is_gguf  # noqa: E402
from rlsafe.policy.gguf import gguf_directory, origin  # noqa: E402
from rlsafe.policy.source import model_source  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN, LAYERS = 64, 2


def byte_tokens() -> list[str]:
    """GPT-2's printable names of the 256 bytes, in the order of the bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


VOCABULARY = [*byte_tokens(), "ĊĊ", "Ġt", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD261]"]
KINDS = [1] * 258 + [3, 3, 3, 5]
END, START, STOP = 258, 259, 260


def tiny(tied: bool):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCABULARY), hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
        )
    )  # fmt: skip


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, block, inner = module.split(".", 3)
        return f"blk.{block}.{NAMES[inner]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def write(path, model, *, architecture="qwen2", pre="qwen2", eos=STOP, quantise=(), leave_out=(), template=TEMPLATE,
          merges=("Ċ Ċ", "Ġ t"), parts=0, scaling=None, extra=None):  # fmt: skip
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types(KINDS)
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(START)
    if eos is not None:
        writer.add_eos_token_id(eos)
    writer.add_pad_token_id(END)
    if template:
        writer.add_chat_template(template)
    if parts:
        writer.add_uint16("split.count", parts)
    for key, value in (scaling or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{architecture}.rope.{key}", value)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    for name, tensor in model.state_dict().items():
        if name in leave_out or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        data = tensor.numpy()
        if name in quantise:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, q8), raw_dtype=q8)
        else:
            writer.add_tensor(gguf_name(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def loaded(directory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_head_are_the_files(tmp_path, tied):
    source = tiny(tied)
    quantised = "model.layers.1.mlp.down_proj.weight"  # 96 columns: whole blocks of 32
    file = write(tmp_path / "tiny.gguf", source, quantise=[quantised])
    directory = model_source(ModelConfig(name=str(file)))
    model, _ = loaded(directory)
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    expected = source.state_dict()
    q8 = gguf.GGMLQuantizationType.Q8_0
    expected[quantised] = torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(expected[quantised].numpy(), q8), q8)
    )
    assert not torch.equal(expected[quantised], source.state_dict()[quantised])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    saved = json.loads((tmp_path / "home" / directory / "config.json").read_text())
    assert "quantization_config" not in saved and saved["architectures"] == ["Qwen2ForCausalLM"]
    assert origin(directory)["file"] == "tiny.gguf" and origin(directory)["license"] == "apache-2.0"


def test_the_tokenizer_has_the_files_special_tokens_and_cuts_text_as_the_file_says(tmp_path):
    model, tokenizer = loaded(model_source(ModelConfig(name=str(write(tmp_path / "a.gguf", tiny(True))))))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    )
    assert set(model.generation_config.eos_token_id) == {STOP, END}
    assert "[PAD261]" not in tokenizer.get_vocab()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "to"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == START and STOP in ids and tokenizer.decode(ids) == text


def test_digits_are_split_before_merging_where_the_file_says_smollm(tmp_path):
    directory = model_source(ModelConfig(name=str(write(tmp_path / "s.gguf", tiny(True), pre="smollm"))))
    _, tokenizer = loaded(directory)
    newlines, one = VOCABULARY.index("ĊĊ"), ord("1")
    assert tokenizer("\n\n1", add_special_tokens=False)["input_ids"] == [newlines, one]  # GPT-2's pattern: Ċ Ċ 1


@pytest.mark.parametrize(("pre", "whole", "first"), [("llama-bpe", True, [START]), ("gpt-2", False, [])])
def test_llama_3_takes_a_piece_that_is_a_token_without_merges_and_begins_a_text(tmp_path, pre, whole, first):
    """Some of its tokens are reached by no merge: cut further, text would be other than what the model was trained on."""
    file = write(tmp_path / "l.gguf", llama(), architecture="llama", pre=pre, merges=["Ġ t"])
    _, tokenizer = loaded(model_source(ModelConfig(name=str(file))))
    newline = VOCABULARY.index("Ċ")
    expected = [VOCABULARY.index("ĊĊ")] if whole else [newline, newline]
    assert tokenizer("\n\n", add_special_tokens=False)["input_ids"] == expected
    assert tokenizer("\n\n")["input_ids"] == [*first, *expected]


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), num_key_value_heads=2, tie_word_embeddings=True, **sizes, **settings
    )
    return LlamaForCausalLM(config)


def divisors(**settings):
    """What llama.cpp writes for a Llama of version 3.1 and later, as rope_freqs.weight."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    scaling |= {"original_max_position_embeddings": 8192, **settings}
    scaled = llama(rope_parameters=scaling).model.rotary_emb.inv_freq
    return (llama().model.rotary_emb.inv_freq / scaled).numpy(), scaled


def as_llama(path, **settings):
    file = write(path, llama(), architecture="llama", pre="llama-bpe", merges=["Ġ t"], **settings)
    return model_source(ModelConfig(name=str(file)))


def test_llama_3s_scaling_of_its_positions_is_read_from_what_the_file_divides_by(tmp_path):
    data, scaled = divisors()
    assert 1 < data[-2] < data[-1] == 32  # one between the two bounds, one beyond
    model, _ = loaded(as_llama(tmp_path / "scaled.gguf", extra={"rope_freqs.weight": data}))
    assert torch.equal(model.model.rotary_emb.inv_freq, scaled)
    assert model.config.rope_parameters["rope_type"] == "llama3" and model.config.rope_parameters["factor"] == 32
    for number, none in enumerate(
        [
            {"extra": {"rope_freqs.weight": data * 0 + 1}},
            {"scaling": {"scaling.type": "none"}},
            {"scaling": {"scaling.type": "linear", "scaling.factor": 1.0, "scaling.original_context_length": 64.0}},
        ]
    ):
        plain, _ = loaded(as_llama(tmp_path / f"{number}.gguf", **none))
        assert plain.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lambda: {"extra": {"rope_freqs.weight": divisors(high_freq_factor=8.0)[0]}}, "rope_freqs.weight"),
        (lambda: {"extra": {"rope_freqs.weight": divisors()[0][3:]}}, "rope_freqs.weight"),
        (
            lambda: {"extra": {f"rope_factors_{kind}.weight": divisors()[0] for kind in ("long", "short")}},
            "rope_factors_long",
        ),
        (lambda: {"scaling": {"scaling.type": "yarn", "scaling.factor": 4.0}}, "yarn, factor 4"),
        (lambda: {"scaling": {"scaling.factor": 4.0}}, "linear, factor 4"),
        (lambda: {"scaling": {"scale_linear": 8.0}}, "linear, factor 8"),
    ],
)
def test_any_other_scaling_of_positions_is_refused_in_one_line(tmp_path, settings, said):
    """Transformers would drop it in silence: another model."""
    with pytest.raises(UserError, match=rf"rotary positions .*{said}.*\(safetensors\) instead") as error:
        as_llama(tmp_path / "scaled.gguf", **settings())
    assert "\n" not in str(error.value)


def test_a_second_start_converts_nothing_and_other_bytes_or_another_dtype_do(tmp_path, monkeypatch):
    from rlsafe.policy import gguf as module

    made = []
    real = module._make
    monkeypatch.setattr(module, "_make", lambda *a: made.append(a[0]) or real(*a))
    file = write(tmp_path / "tiny.gguf", tiny(True))
    first = gguf_directory(ModelConfig(name=str(file)))
    assert gguf_directory(ModelConfig(name=str(file))) == first and len(made) == 1
    half = gguf_directory(ModelConfig(name=str(file), dtype="bfloat16"))
    assert half != first and loaded(half)[0].dtype == torch.bfloat16
    write(file, tiny(False))
    assert gguf_directory(ModelConfig(name=str(file))) not in (first, half) and len(made) == 3
    assert not list((tmp_path / "home/.cache/rlsafe/gguf").glob(".*")), "a temporary directory stayed"


def test_a_gpu_that_only_emulates_bfloat16_is_not_given_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, n=native: n or including_emulation
        )
        directory = model_source(ModelConfig(name=str(write(tmp_path / f"{native}.gguf", tiny(True)))))
        assert origin(directory)["dtype"] == dtype


def test_a_file_inside_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "site" / "weights_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write(package / "Tiny.Q8_0.gguf", tiny(True))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    name = "gguf:weights-of-mine/Tiny.Q8_0.gguf"
    assert is_gguf(name) and gguf_file(name) == package / "Tiny.Q8_0.gguf"
    assert os.path.isfile(os.path.join(model_source(ModelConfig(name=name)), "model.safetensors"))
    assert "weights_of_mine" not in sys.modules
    with pytest.raises(UserError, match="holds no file 'Tiny.Q4_0.gguf'; did you mean 'Tiny.Q8_0.gguf'"):
        gguf_file("gguf:weights_of_mine/Tiny.Q4_0.gguf")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gguf:no_such_package_here/a.gguf", "no package 'no_such_package_here' is installed here"),
        ("gguf:only_a_package", "expected gguf:PACKAGE/FILE.gguf"),
        ("missing/file.gguf", "no such file"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(name, said):
    with pytest.raises(UserError, match=said) as error:
        model_source(ModelConfig(name=name))
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_file_is_one_line(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole.gguf", tiny(True)).read_bytes()

    def said(content: bytes | None = None, **changes) -> str:
        file = tmp_path / "bad.gguf"
        file.unlink(missing_ok=True)
        if content is None:
            write(file, tiny(True), **changes)
        else:
            file.write_bytes(content)
        with pytest.raises(UserError) as error:
            model_source(ModelConfig(name=str(file)))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "not a GGUF file" in said(b"not a model at all")
    assert "damaged or cut short" in said(whole[: len(whole) // 2])
    assert "damaged or cut short" in said(whole[:3000])
    assert "architecture 'nosuch'" in said(architecture="nosuch")
    assert "pre-tokenizer 'qwen9'" in said(pre="qwen9")
    assert "end-of-sequence" in said(eos=None)
    assert "chat template" in said(template="{{ nothing.at.all }}")
    assert "lacks" in said(leave_out=["model.norm.weight"])
    assert "one of 3 parts" in said(parts=3)
    # Transformers reads every tokenizer of Qwen2's architecture as Qwen2's
    assert "cuts text into other tokens" in said(pre="llama-bpe", merges=["Ġ t"])
    assert not list((tmp_path / "home/.cache/rlsafe/gguf").iterdir())
    import rlsafe.policy.gguf as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "'.[local]'" in said()
