"""Conversations become ids and masks that train exactly what the model has to generate."""

import numpy as np
import pytest
from places import SHARED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils as templates
from words import CHATML, chat, word_tokenizer

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import encode as encoding
from rlsafe.data import encode_prompt, encode_row, end_of_turn, fit_rows, load_rows, pad_id, split_prompt

SPECIAL = """<pad> <|endoftext|> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|>
    <|eot_id|> <|user|> <|assistant|> <|system|> <|end|> <bos> <eos> <start_of_turn> <end_of_turn>""".split()


@pytest.fixture(scope="module")
def bpe():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    core.train_from_iterator(["\n\n\n", "assistant\n\nwhy because\n\n", "hello there user system model"] * 20, trainer)

    def build(template, eos="<|endoftext|>", bos="<|begin_of_text|>"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token="<pad>",
            additional_special_tokens=[token for token in SPECIAL if token not in (eos, bos, "<pad>")],
        )  # fmt: skip
        tokenizer.chat_template = template
        return tokenizer

    return build


def answers(tokenizer, ids, mask):
    """The texts of the masked runs."""
    runs, run = [], []
    for token, masked in zip(ids, mask, strict=True):
        if masked:
            run.append(token)
        elif run:
            runs, run = [*runs, run], []
    return [tokenizer.decode(r) for r in ([*runs, run] if run else runs)]


# ------------------------------------------------------------------------------------------------ word level


def test_only_the_answer_and_its_end_of_turn_are_trained():
    tokenizer = word_tokenizer()
    ids, mask = encode_row(tokenizer, chat("why is it", "because it is", system="be kind"))
    prompt = encode_prompt(tokenizer, chat("why is it", system="be kind"))
    assert ids[: len(prompt)] == prompt and mask == [False] * len(prompt) + [True] * 4
    assert answers(tokenizer, ids, mask) == ["because it is <|im_end|>"]
    assert ids[-1] == end_of_turn(tokenizer) == tokenizer.eos_token_id
    assert pad_id(tokenizer) == tokenizer.pad_token_id


def test_all_turns_can_be_trained_and_the_last_one_agrees():
    tokenizer = word_tokenizer()
    row = chat("why", "because", "and so", "it is so", "yes", "no")
    ids, mask = encode_row(tokenizer, row, "all")
    assert answers(tokenizer, ids, mask) == ["because <|im_end|>", "it is so <|im_end|>", "no <|im_end|>"]
    last_ids, last_mask = encode_row(tokenizer, row, "last")
    assert last_ids == ids
    assert answers(tokenizer, last_ids, last_mask) == ["no <|im_end|>"]


def test_a_span_that_ends_in_a_character_without_token_stays_a_span():
    """Transformers' own mask runs to the end of the row here: the spans' last character is a dropped newline."""
    tokenizer = word_tokenizer()
    row = chat("why", "because", "and so", "it is so")
    theirs = tokenizer.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    _, ours = encode_row(tokenizer, row, "all")
    assert sum(ours) == 6 < sum(theirs)


def test_a_template_that_never_ends_its_turns_gets_the_end_of_text_token():
    tokenizer = word_tokenizer(
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    ids, mask = encode_row(tokenizer, chat("why", "because it is"))
    assert (
        answers(tokenizer, ids, mask) == ["because it is <|im_end|>"]
        and end_of_turn(tokenizer) == tokenizer.eos_token_id
    )


def test_rows_are_encoded_once_and_a_new_template_starts_over(monkeypatch):
    tokenizer = word_tokenizer()
    calls = []
    render = encoding.Encoder.render
    monkeypatch.setattr(encoding.Encoder, "render", lambda *args, **more: calls.append(1) or render(*args, **more))
    first = encode_row(tokenizer, chat("one", "two"))
    made = len(calls)
    assert encode_row(tokenizer, chat("one", "two")) == first and len(calls) == made
    first[0][0] = -1  # callers own what they get
    assert encode_row(tokenizer, chat("one", "two"))[0][0] != -1
    tokenizer.chat_template = CHATML.replace("<|im_start|>assistant", "<|im_start|>system")
    encode_row(tokenizer, chat("one", "two"))
    assert len(calls) > made


# ------------------------------------------------------------------------------------------------ the field's templates

FIELD = {
    "qwen2_5": ("<|im_end|>", "<|endoftext|>"),
    "qwen3": ("<|im_end|>", "<|endoftext|>"),
    "llama3": ("<|eot_id|>", "<|endoftext|>"),
    "gemma": ("<end_of_turn>", "<eos>"),
    "phi3": ("<|end|>", "<|endoftext|>"),
}


@pytest.mark.parametrize("name", FIELD)
@pytest.mark.parametrize("answer", ["because", "\n\nbecause", "<think>\n\n</think>\n\nbecause", "because\n"])
def test_the_prompt_is_a_prefix_and_the_mask_ends_at_the_end_of_turn(bpe, name, answer):
    end, eos = FIELD[name]
    tokenizer = bpe(getattr(templates, f"{name}_chat_template"), eos)
    row = chat("hello", answer)
    ids, mask = encode_row(tokenizer, row)
    prompt = encode_prompt(tokenizer, row[:1])
    assert ids[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    (text,) = answers(tokenizer, ids, mask)
    assert text.endswith(end) and text.count(end) == 1 and "because" in text and "assistant" not in text
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(row, tokenize=False)[: len(tokenizer.decode(ids))]


@pytest.mark.parametrize("name", FIELD)
def test_generation_spans_agree_with_the_prompt_rule(bpe, name):
    """`all` goes through TRL's template with generation markers, `last` through the prompt: the same mask."""
    end, eos = FIELD[name]
    tokenizer = bpe(getattr(templates, f"{name}_chat_template"), eos)
    row = chat("hello", "because")
    last_ids, last_mask = encode_row(tokenizer, row)
    ids, mask = encode_row(tokenizer, row, "all")
    assert (ids, mask) == (last_ids, last_mask)
    several = encode_row(tokenizer, chat("hello", "why", "there", "because"), "all")
    texts = answers(tokenizer, *several)
    assert [text.endswith(end) for text in texts] == [True, True]
    assert ["why" in texts[0], "because" in texts[1]] == [True, True]


def test_merges_across_the_prompt_boundary_are_cut_there(bpe):
    """'assistant\\n' + '\\n\\nbecause': the tokenizer would merge the newlines; at generation it cannot."""
    tokenizer = bpe(templates.qwen2_5_chat_template)
    row = chat("hello", "\n\nbecause")
    whole = tokenizer.apply_chat_template(row, return_dict=False)
    prompt = encode_prompt(tokenizer, row[:1])
    assert whole[: len(prompt)] != prompt, "the case this test is about does not arise"
    ids, _ = encode_row(tokenizer, row)
    assert ids[: len(prompt)] == prompt and ids != whole[: len(ids)]
    assert tokenizer.decode(whole).startswith(tokenizer.decode(ids))


def test_a_generation_prompt_that_opens_a_think_block_falls_back_to_the_spans(bpe):
    header = "{{- '<|im_start|>assistant\\n' }}"
    thinking = header.replace("\\n", "\\n<think>\\n")
    template = templates.qwen2_5_training_chat_template.replace(header, thinking)
    tokenizer = bpe(template)
    assert tokenizer.decode(encode_prompt(tokenizer, chat("hello"))).endswith("<think>\n")
    (text,) = answers(tokenizer, *encode_row(tokenizer, chat("hello", "because")))
    assert text.strip() == "because<|im_end|>"


OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
HEADED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("prompt", [OPENING, OPENING.replace("<think>\n", "")])
def test_a_generation_prompt_inside_the_spans_is_not_trained_on(bpe, prompt):
    """SmolLM3's template marks it whole; TRL's for DeepSeek mark it without the think block that it opens."""
    tokenizer = bpe(HEADED + prompt)
    row = chat("hello", "assistant", "hello", "because")
    assert answers(tokenizer, *encode_row(tokenizer, row, "all")) == ["assistant<|im_end|>", "because<|im_end|>"]
    assert answers(tokenizer, *encode_row(tokenizer, row)) == ["because<|im_end|>"]
    thought = chat("hello", "<think>\nwhy</think>because")
    expected = "why</think>because<|im_end|>" if prompt == OPENING else "<think>\nwhy</think>because<|im_end|>"
    assert answers(tokenizer, *encode_row(tokenizer, thought, "all")) == [expected]


CALLING = "{{ ' to=' + m.tool_calls[0].function.name + '<|eot_id|>\n' if m.tool_calls else m.content + '<|end|>\n' }}"


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_a_call_may_end_its_turn_in_another_way_than_an_answer(bpe, train_on):
    """gpt-oss writes <|call|> behind the one and <|return|> behind the other."""
    spoken = CHATML.replace("{{ m.content + '<|im_end|>\n' }}", CALLING, 1)
    tokenizer = bpe(spoken)
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
    row = [*chat("hello"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert answers(tokenizer, *encode_row(tokenizer, row, train_on)) == [" to=look_up<|eot_id|>"]
    assert answers(tokenizer, *encode_row(tokenizer, chat("hello", "why"), train_on)) == ["why<|end|>"]


def test_a_call_that_ends_no_turn_is_refused_when_it_is_loaded(bpe):
    tokenizer = bpe(CHATML.replace("{{ m.content + '<|im_end|>\n' }}", CALLING.replace("<|eot_id|>", ""), 1))
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
    row = [*chat("hello"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(UserError, match="f:1: the chat template writes no end of the turn behind this answer"):
        fit_rows([{"messages": row, "_source": "f:1"}], tokenizer, 1000)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_real_rows_with_think_blocks_and_code(bpe, name):
    tokenizer = bpe(getattr(templates, f"{name}_chat_template"))
    for path in sorted(SHARED.glob("sft/*_train.jsonl")):
        rows = load_rows(StreamConfig(source=str(path)))
        for row in rows:
            messages = row["messages"]
            prompt = encode_prompt(tokenizer, messages[:-1])
            ids, mask = encode_row(tokenizer, messages)
            assert ids[: len(prompt)] == prompt and mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
            answer = tokenizer.decode([token for token, masked in zip(ids, mask, strict=True) if masked])
            said = messages[-1]["content"]
            if name == "qwen2_5":
                assert answer == said + "<|im_end|>"
            else:  # this template writes a think block (empty if there is none) and lays out the space around it itself
                assert answer.startswith("<think>\n\n</think>\n\n")
                assert answer.endswith(said.rpartition("</think>")[2].lstrip("\n") + "<|im_end|>")
    for path in sorted(SHARED.glob("grpo/*.jsonl")):
        for row in load_rows(StreamConfig(source=str(path), limit=20)):
            assert tokenizer.decode(encode_prompt(tokenizer, split_prompt(row)[0])).endswith("<|im_start|>assistant\n")


# ------------------------------------------------------------------------------------------------ refused


def test_models_without_chat_template_are_refused():
    tokenizer = word_tokenizer(None)
    with pytest.raises(UserError, match="has no chat template; use a chat model or give one with model.chat_template"):
        encode_prompt(tokenizer, chat("why"))


UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ALTERNATE = "{{ raise_exception('roles must alternate') }}"


@pytest.mark.parametrize(
    "template, row, mode, reason",
    [
        (CHATML, ["why"], "last", "a row ends with a user turn; sft needs an answer"),
        (UNMARKED, ["why", "because"], "all", "no {% generation %} markers and TRL knows no variant"),
        (
            "{% for m in messages %}{{ m.a.b }}{% endfor %}",
            ["why", "because"],
            "last",
            "the chat template cannot render",
        ),
        (ALTERNATE, ["why", "because"], "last", "roles .*: roles must alternate"),
        (
            "{{ messages[0].content }}",
            ["why", "because"],
            "last",
            "the chat template leaves out the assistant's answer",
        ),
    ],
)
def test_what_cannot_be_encoded_says_why(template, row, mode, reason):
    with pytest.raises(UserError, match=reason.replace("{", r"\{")) as caught:
        encode_row(word_tokenizer(template), chat(*row), mode)
    assert "\n" not in str(caught.value)


def test_a_system_prompt_that_the_template_refuses_is_reported(bpe):
    tokenizer = bpe(templates.gemma_chat_template, "<eos>")
    with pytest.raises(
        UserError, match=r"cannot render a conversation of roles \(system, user\): System role not supported"
    ):
        encode_prompt(tokenizer, chat("hello", system="be kind"))


def test_encodings_are_plain_lists_of_equal_length():
    ids, mask = encode_row(word_tokenizer(), chat("why", "because"))
    assert isinstance(ids, list) and isinstance(mask[0], bool) and len(ids) == len(mask) and np.sum(mask) == 2
