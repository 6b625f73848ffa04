"""Think blocks: how a reasoning model is asked, what it is trained on, and what counts as its answer."""

import pytest
from tiny import CHATML, byte_tokenizer
from tiny_architectures import save_architecture, think_tokenizer
from tokenizers import pre_tokenizers

from rlsafe.config import ModelConfig, UserError, load_run
from rlsafe.data import Chat, configure_chat, encode_prompt, encode_row, read_completion, split_think
from rlsafe.policy import Policy

ASKED = [{"role": "user", "content": "why"}]
PLAIN = [*ASKED, {"role": "assistant", "content": "because"}]
THOUGHT = [*ASKED, {"role": "assistant", "content": "<think>\nhm, 1 < 2\n</think>\n\nbecause"}]
EMPTY = "<think>\n\n</think>\n\n"


def thinker(thinking=None, train_thinking=True):
    tokenizer = think_tokenizer()
    configure_chat(tokenizer, Chat(thinking, train_thinking))
    return tokenizer


def trained_text(tokenizer, row, train_on="last"):
    ids, mask = encode_row(tokenizer, row, train_on)
    return tokenizer.decode([token for token, masked in zip(ids, mask, strict=True) if masked])


# ------------------------------------------------------------------------------------------------ the split


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("because", False, (None, "because", False)),
        ("<think>\nhm\n</think>\n\nbecause", False, ("hm", "because", False)),
        ("\n<think>hm</think>because", False, ("hm", "because", False)),
        (EMPTY + "because", False, ("", "because", False)),
        ("<think>hm", False, ("hm", "", True)),
        ("<think>", False, ("", "", True)),
        ("hm</think>because", True, ("hm", "because", False)),
        ("<think>hm</think>because", True, ("hm", "because", False)),
        ("hm, because", True, ("hm, because", "", True)),
        ("<think>a</think> b <think>c</think> d", False, ("a", "b <think>c</think> d", False)),
        ("<think>a</think>", False, ("a", "", False)),
        ("", False, (None, "", False)),
        # a stray tag must not hide what comes before it from a judge
        ("do harm</think>be kind", False, (None, "do harm</think>be kind", False)),
        ("do harm <think>x</think> be kind", False, (None, "do harm <think>x</think> be kind", False)),
    ],
)
def test_a_completion_is_split_at_its_leading_block(text, opened, expected):
    assert split_think(text, opened) == expected


@pytest.mark.parametrize("special", [False, True])
def test_token_ids_are_split_even_where_the_tags_are_special_tokens(special):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    ids = tokenizer("<think>hm</think>because<|im_end|>", add_special_tokens=False)["input_ids"]
    assert read_completion(tokenizer, ids) == ("hm", "because", False)
    assert read_completion(tokenizer, ids[:3]) == ("hm", "", True)
    assert read_completion(tokenizer, ids[4:]) == (None, "because", False)


def test_a_prompt_that_opens_the_block_is_known_to_have_done_so():
    """DeepSeek R1 and Qwen3's thinking models: the completion begins inside the block."""
    tokenizer = think_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    assert tokenizer.decode(encode_prompt(tokenizer, ASKED)).endswith("<think>\n")
    ids = tokenizer("hm</think>because<|im_end|>", add_special_tokens=False)["input_ids"]
    assert read_completion(tokenizer, ids) == ("hm", "because", False)
    assert read_completion(tokenizer, ids[:2]).unclosed


# ------------------------------------------------------------------------------------------------ asking and training


@pytest.mark.parametrize(
    ("thinking", "prompt"),
    [
        (None, "why<|im_end|>\n<|im_start|>assistant\n"),
        ("on", "why<|im_end|>\n<|im_start|>assistant\n"),
        ("off", "why<|im_end|>\n<|im_start|>assistant\n" + EMPTY),
        ("no_think", "why /no_think<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_the_setting_decides_how_the_model_is_asked(thinking, prompt):
    tokenizer = thinker(thinking)
    assert tokenizer.decode(encode_prompt(tokenizer, ASKED)) == "<|im_start|>user\n" + prompt
    for row in (PLAIN, THOUGHT):
        ids, mask = encode_row(tokenizer, row)
        asked = encode_prompt(tokenizer, ASKED)
        assert ids[: len(asked)] == asked and not any(mask[: len(asked)])


@pytest.mark.parametrize("train_on", ["last", "all"])
@pytest.mark.parametrize(
    ("thinking", "train_thinking", "plain", "thought"),
    [
        (None, True, EMPTY + "because<|im_end|>", "<think>\nhm, 1 < 2\n</think>\n\nbecause<|im_end|>"),
        ("on", False, "because<|im_end|>", "because<|im_end|>"),
        ("off", True, "because<|im_end|>", "because<|im_end|>"),
        ("no_think", True, EMPTY + "because<|im_end|>", EMPTY + "because<|im_end|>"),
        ("no_think", False, "because<|im_end|>", "because<|im_end|>"),
    ],
)
def test_what_is_trained_on_is_a_setting(train_on, thinking, train_thinking, plain, thought):
    tokenizer = thinker(thinking, train_thinking)
    assert trained_text(tokenizer, PLAIN, train_on) == plain
    assert trained_text(tokenizer, THOUGHT, train_on) == thought


def test_without_thinking_in_the_loss_the_model_still_sees_it():
    ids, mask = encode_row(thinker("on", False), THOUGHT)
    assert "hm, 1 < 2" in think_tokenizer().decode(ids)
    assert encode_row(thinker("on"), THOUGHT)[0] == ids and sum(mask) == len("because") + 1


@pytest.mark.parametrize("train_on", ["last", "all"])
@pytest.mark.parametrize(
    "answer", ["<think>\nhm.\n</think>\n\nFour.", "<think>hm.</think>Four.", "<think>hm.</think>\nFour."]
)
def test_think_blocks_without_tokens_of_their_own_stay_out_of_the_loss_too(train_on, answer):
    """Most tokenizers spell the tags and merge their ends with what stands beside them, as Qwen2.5's does."""
    tokenizer = byte_tokenizer([(">", "Ċ"), (">Ċ", "Ċ"), ("<", "/"), (".", "</")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert {">ĊĊ", ".</"} <= {*tokenizer.tokenize("hm.</think>\n\nFour")}, "the case this test is about does not arise"
    row = [*ASKED, {"role": "assistant", "content": answer}]
    assert trained_text(tokenizer, row, train_on) == answer + "<|im_end|>"
    configure_chat(tokenizer, Chat(None, False))
    assert trained_text(tokenizer, row, train_on) == "Four.<|im_end|>"
    later = [*ASKED, {"role": "assistant", "content": "Four, as in <think>a</think>."}]
    assert trained_text(tokenizer, later, train_on) == "Four, as in <think>a</think>.<|im_end|>"


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_a_block_is_known_where_the_generation_prompt_writes_its_first_tag_and_an_empty_one(train_on):
    """Qwen3.5 without thinking: a row with thoughts of its own does not begin with the prompt's empty block: all is answer."""
    tokenizer = think_tokenizer()
    prompt = "assistant\\n" + EMPTY.replace("\n", "\\n")
    tokenizer.chat_template = CHATML.replace("assistant\\n' }}{% endif %}", prompt + "' }}{% endif %}")
    assert tokenizer.decode(encode_prompt(tokenizer, ASKED)).endswith(EMPTY)
    assert trained_text(tokenizer, THOUGHT, train_on) == "<think>\nhm, 1 < 2\n</think>\n\nbecause<|im_end|>"
    configure_chat(tokenizer, Chat(None, False))
    assert trained_text(tokenizer, THOUGHT, train_on) == "because<|im_end|>"


def test_earlier_turns_keep_their_answers_and_the_soft_switch_ends_the_last_question():
    talk = [*PLAIN, {"role": "user", "content": "really"}]
    text = think_tokenizer().decode(encode_prompt(thinker("no_think"), talk))
    assert text.count("/no_think") == 1 and "really /no_think<|im_end|>" in text and "because<|im_end|>" in text


def test_a_template_without_a_switch_says_so(tmp_path):
    directory = save_architecture(tmp_path, "qwen2")
    for thinking, hint in (("on", "leave it null"), ("off", "or no_think")):
        with pytest.raises(UserError, match=f"model.thinking: {thinking}: the chat template does not read .*{hint}"):
            Policy.load(ModelConfig(name=directory, thinking=thinking))
    policy = Policy.load(ModelConfig(name=directory, thinking="no_think"))
    assert "why /no_think" in policy.tokenizer.decode(encode_prompt(policy.tokenizer, ASKED))


def test_the_policys_tokenizer_carries_the_setting(tmp_path):
    directory = save_architecture(tmp_path, "qwen3", think_tokenizer())
    policy = Policy.load(ModelConfig(name=directory, thinking="off"))
    assert policy.tokenizer.decode(encode_prompt(policy.tokenizer, ASKED)).endswith(EMPTY)
    again = Policy.load(ModelConfig(name=directory))
    assert not again.tokenizer.decode(encode_prompt(again.tokenizer, ASKED)).endswith(EMPTY)


def test_yaml_reads_on_and_off_as_booleans_and_the_setting_does_not_mind(tmp_path):
    from rlsafe.config import dump_yaml

    file = tmp_path / "run.yaml"
    file.write_text("model: {name: x, thinking: off}\n")
    config = load_run(file)
    assert config.model.thinking == "off"
    file.write_text(dump_yaml(config))
    assert load_run(file).model.thinking == "off"
    assert load_run(file, ["model.thinking=on"]).model.thinking == "on"
    with pytest.raises(UserError, match="model.thinking"):
        load_run(file, ["model.thinking=maybe"])
