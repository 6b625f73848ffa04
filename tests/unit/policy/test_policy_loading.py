"""Loading a model: every user mistake is one clear line."""

import json
import shutil
from functools import partial

import pytest
import torch
from tiny import byte_tokenizer, save_tiny_model
from tiny_architectures import load, nudge, random_batch, save_architecture
from transformers import AutoTokenizer

from rlsafe.config import LoraConfig, UserError
from rlsafe.data import encode_prompt, encode_row


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_missing_model_names_the_nearest(model):
    with pytest.raises(UserError, match="did you mean 'model'"):
        load(str(model.parent / "modle"))


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match="model.name"):
        load(str(tmp_path))


def test_no_chat_template(model):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", chat_template=None)
    with pytest.raises(UserError, match="no chat template; name a Jinja file in model.chat_template"):
        load(str(model))
    template = model / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert "m['content']" in load(str(model), chat_template=str(template)).tokenizer.chat_template
    with pytest.raises(UserError, match="no such file; did you mean"):
        load(str(model), chat_template=str(model / "mime.jinja"))
    template.write_text("{{ raise_exception('never') }}")
    with pytest.raises(UserError, match="does not render: never"):
        load(str(model), chat_template=str(template))


def test_no_tokenizer(model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="is tokenizer.json missing"):
        load(str(model))


def test_a_tokenizer_of_another_model(model):
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"x":', '"moved":').replace('"moved":', '"x": 900, "moved":', 1))
    with pytest.raises(UserError, match="its tokenizer has ids up to 900, the model embeds only 259 tokens"):
        load(str(model))


def test_a_tokenizer_with_more_tokens_than_the_model_embeds(tmp_path):
    """Also where the template's own tokens are covered: some text would fail deep inside."""
    few = save_tiny_model(tmp_path / "few", vocab_size=240)
    assert max(byte_tokenizer()("<|im_start|>user x\n<|im_end|>")["input_ids"]) < 240
    with pytest.raises(UserError, match=f"model.name: {few}: .* ids up to 258, the model embeds only 240 tokens"):
        load(few)


def test_an_added_token_that_the_model_does_not_embed_is_told_where_a_text_holds_it(model):
    """A few such tokens are common (those of images, in a model of text), and harmless where no text spells them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<image>"])  # one that is special is a control token: a text's spelling of it stays text
    tokenizer.save_pretrained(model)
    tokenizer = load(str(model)).tokenizer
    row = [{"role": "user", "content": "see"}, {"role": "assistant", "content": "an image"}]
    assert max(encode_row(tokenizer, row)[0]) < 259
    for where in (0, 1):
        held = [{**turn, "content": turn["content"] + ("<image>" if i == where else "")} for i, turn in enumerate(row)]
        for encode in (encode_row, partial(encode_row, train_on="all")):
            with pytest.raises(UserError, match=r"'<image>' is a token .2\d\d. that the model does not embed; .*see"):
                encode(tokenizer, held)
    with pytest.raises(UserError, match="'<image>' is a token"):
        encode_prompt(tokenizer, [{"role": "user", "content": "see <image>"}])


@pytest.mark.parametrize("given", ["q_proj", "q_proj,down_proj", " q_proj , down_proj "])
def test_plain_names_of_modules_may_be_a_text(tiny_model_dir, given):
    """PEFT would take them for a regular expression of a whole path, which no module has."""
    names = [name.strip() for name in given.split(",")]
    one, other = (load(tiny_model_dir, lora={"r": 2, "alpha": 2, "targets": targets}) for targets in (given, names))
    assert one.trainable().keys() == other.trainable().keys() and one.config.lora.targets == names
    for other_text in ("all-linear", r".*\.q_proj"):
        assert LoraConfig(targets=other_text).targets == other_text


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_prj"], r"'q_prj' matches no module of the model; did you mean 'q_proj'"),
        (["q_proj", "lm_head"], "lm_head is the output head"),
        (["embed_tokens"], "embed_tokens is not a linear layer"),
        ("nothing.*here", "model.lora.targets"),
    ],
)
def test_lora_targets_that_cannot_be_adapted(tiny_model_dir, targets, says):
    with pytest.raises(UserError, match=says):
        load(tiny_model_dir, lora={"r": 2, "alpha": 2, "targets": targets})


def test_bad_adapters(model, tmp_path):
    policy = nudge(load(str(model)))
    policy.save_adapter(tmp_path / "good")

    def copy(name, **changes):
        directory = shutil.copytree(tmp_path / "good", tmp_path / name)
        edit(directory / "adapter_config.json", **changes)
        return directory

    cases = [
        (tmp_path / "god", "no such directory; did you mean"),
        (model, "has no adapter_config.json"),
        (copy("dora", use_dora=True), "use_dora=True is not supported"),
        (copy("ia3", peft_type="IA3"), "expected LoRA"),
        (copy("rank", r=7), "does not fit this model"),
        (copy("targets", target_modules=["w_pack"]), "adapts 'w_pack', which this model does not have"),
    ]
    (copy("empty") / "adapter_model.safetensors").unlink()
    cases.append((tmp_path / "empty", "has no adapter_model.safetensors"))
    for directory, says in cases:
        with pytest.raises(UserError, match=says):
            load(str(model), adapter=str(directory))
    with pytest.raises(UserError, match="full fine-tuning"):
        load(str(model), rank=None, adapter=str(tmp_path / "good"))


def test_float16_is_refused_on_a_cpu(tiny_model_dir):
    with pytest.raises(UserError, match="model.dtype: float16"):
        load(tiny_model_dir, dtype="float16")


def test_flash_attention_that_is_not_installed(tiny_model_dir):
    with pytest.raises(UserError, match="model.attention"):
        load(tiny_model_dir, attention="flash_attention_2")


def test_sdpa_is_not_used_where_it_would_drop_the_attention_softcap(tmp_path, caplog):
    capped = load(save_architecture(tmp_path / "capped", "gemma2", attn_logit_softcapping=0.5))
    assert capped.model.config._attn_implementation == "eager" and "attention softcap" in caplog.text
    free = load(save_architecture(tmp_path / "free", "gemma2", attn_logit_softcapping=None))
    assert free.model.config._attn_implementation == "sdpa"
    batch = random_batch()
    assert not torch.allclose(capped.score(batch), free.score(batch), atol=1e-4)


def test_a_model_whose_logits_are_something_else_is_refused(tiny_model_dir, monkeypatch):
    from transformers import Qwen2ForCausalLM

    original = Qwen2ForCausalLM.forward

    def scaled(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="logits are not head"):
        load(tiny_model_dir)


def test_what_is_trained(tiny_model_dir):
    adapted, full = load(tiny_model_dir), load(tiny_model_dir, rank=None)
    assert all("lora_" in name for name in adapted.trainable()) and adapted.lora_rank == 4 and adapted.is_lora
    assert not full.is_lora and full.lora_rank is None and "model.norm.weight" in full.trainable()
    assert adapted.dtype == torch.float32 and adapted.n_layers == 2 and adapted.hidden_size == 64
