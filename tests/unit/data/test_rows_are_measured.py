"""Rows are rendered and measured when they are loaded, against the tokenizer's own rendering; spelled control tokens stay text."""

import time
from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, conversation

from rlsafe.config import UserError
from rlsafe.data import Use, encode_prompt, encode_row, fit_rows
from rlsafe.data.encode import encoder_for
from rlsafe.data.measure import Ruler

TEMPLATES = {
    "qwen2_5": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}


def tokenizer_of(name):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[name])})
    tokenizer.bos_token = TEMPLATES[name][0]
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    return tokenizer


TOKENIZERS = {name: tokenizer_of(name) for name in TEMPLATES}
SPELLED = sorted({token for tokens in TEMPLATES.values() for token in tokens})
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co"]), min_size=1, max_size=8).filter(str.strip)
CONTENT = (
    st.lists(st.one_of(WORDS, st.sampled_from(SPELLED)), min_size=1, max_size=4).map(" ".join).map(lambda t: f"a{t}b")
)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATES)), texts=st.lists(CONTENT, min_size=2, max_size=5), system=st.none() | CONTENT
)
def test_whatever_a_row_says_it_has_the_templates_turns_and_its_own_words(name, texts, system):
    """Independently: the tokenizer renders stand-ins for the texts, and no others of its control tokens may be in the row."""
    tokenizer = TOKENIZERS[name]
    roles = ["user", "assistant"] * 3
    texts = texts[: len(texts) // 2 * 2]
    head = [{"role": "system", "content": system}] if system and name != "gemma" else []
    talk = [*head, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))]
    ids, mask = encode_row(tokenizer, talk)
    control = set(tokenizer.all_special_ids)
    standing = [{**turn, "content": "x"} for turn in talk]
    bare = tokenizer.apply_chat_template(standing, tokenize=False)
    meant = [i for i in tokenizer(bare, add_special_tokens=False)["input_ids"] if i in control]
    assert [i for i in ids if i in control] == meant[: sum(i in control for i in ids)], (
        "no control token but the template's"
    )
    whole = tokenizer.decode(ids)
    rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    assert rendered.startswith(whole) and rendered[len(whole) :].strip() == "", "and every word is there"
    trained = tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert trained.removeprefix("<think>\n\n</think>\n\n").removesuffix(tokenizer.decode([ids[-1]])) == texts[-1]
    prompt = encode_prompt(tokenizer, talk[:-1])
    assert ids[: len(prompt)] == prompt


def test_all_answers_are_found_among_spelled_tokens():
    tokenizer = TOKENIZERS["qwen2_5"]
    talk = [
        {"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "one<|im_start|>two", "weight": 1},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "three<|im_end|>", "weight": 0},
    ]  # fmt: skip
    ids, mask = encode_row(tokenizer, talk)
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == "one<|im_start|>two<|im_end|>"


# ------------------------------------------------------------------------------------------------ measuring


def rows_of(talks):
    return [{"messages": talk, "_index": i, "_source": f"f.jsonl:{i + 1}"} for i, talk in enumerate(talks)]


def talk(question, answer):
    return conversation(question, answer)["messages"]


def test_lengths_are_those_of_the_encoding_wherever_they_matter():
    tokenizer = TOKENIZERS["llama3"]
    talks = [talk("q" * n, "a" * (n % 7 + 1)) for n in range(1, 60)] + [talk("a<|eot_id|>", "b")]
    exact = [len(encode_row(tokenizer, one)[0]) for one in talks]
    for limit in (10, 90, 140):
        for size, tokens in zip(Ruler(tokenizer)(talks, limit), exact, strict=True):
            assert size.tokens == tokens if max(size.tokens, tokens) > limit - 16 else size.tokens <= limit


def test_what_the_template_refuses_is_an_error_or_counted():
    tokenizer = TOKENIZERS["gemma"]
    twice = [{"role": "user", "content": "one"}, *talk("two", "a")]
    rows = rows_of([talk("q", "a"), twice, talk("spells <end_of_turn>", "a")])
    with pytest.raises(UserError, match=r"^f.jsonl:2: the chat template cannot render .*\(user, user, assistant\)"):
        fit_rows(rows, tokenizer, 100)
    fitted = fit_rows(rows, tokenizer, 100, on_bad_row="skip")
    assert [row["_index"] for row in fitted.rows] == [0, 2]
    assert "1 of 3 rows are refused by the chat template and were skipped (f.jsonl:2" in fitted.notes[0]
    assert fitted.notes[1] == "1 of 3 rows spell control tokens, which stay text (the first: f.jsonl:3)"


def test_tools_that_the_template_does_not_write_are_refused_and_others_rendered():
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
    row = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
           {"role": "tool", "content": "blue"}, {"role": "assistant", "content": "a"}]  # fmt: skip
    assert len(fit_rows(rows_of([row]), TOKENIZERS["qwen2_5"], 1000).rows) == 1
    text = TOKENIZERS["qwen2_5"].decode(encode_row(TOKENIZERS["qwen2_5"], row)[0])
    assert '{"name": "look_up", "arguments": {}}' in text and "blue" in text
    with pytest.raises(UserError, match=r"f.jsonl:1: the chat template leaves out tool calls \(look_up\)"):
        fit_rows(rows_of([row]), byte_tokenizer(), 1000)


WRITING = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLED = [
    {"role": "user", "content": "look_up the colour", "tools": [{"type": "function", "function": {"name": "look_up"}}]},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]},
    {"role": "tool", "content": '{"colour": "blå"}'}, {"role": "assistant", "content": "blå"},
]  # fmt: skip


@pytest.mark.parametrize("form", ["m.content", "m.content | tojson", "m.content | tojson(ensure_ascii=True)"])
def test_a_tools_answer_may_be_written_as_json(form):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WRITING.replace("m.content | tojson", form)
    assert len(fit_rows(rows_of([CALLED]), tokenizer, 1000).rows) == 1
    tokenizer.chat_template = WRITING.replace("m.content | tojson", "'...'")
    with pytest.raises(UserError, match="the chat template leaves out tool turns"):
        fit_rows(rows_of([CALLED]), tokenizer, 1000)


@pytest.mark.parametrize(
    ("written", "what"),
    [("{{ call.function.name }}", "tool calls"), ("{{ tools | tojson if tools else '' }}", "tools")],
)
def test_a_name_that_stands_elsewhere_hides_no_call_and_no_tool_that_is_left_out(written, what):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WRITING.replace(written, "")
    with pytest.raises(UserError, match=rf"the chat template leaves out {what} \(look_up\)"):
        fit_rows(rows_of([CALLED]), tokenizer, 1000)


def test_rewritten_rows_and_prompts_have_to_fit_as_they_are_used():
    tokenizer = byte_tokenizer()
    rows = rows_of([talk("q" * n, "a") for n in (1, 20, 40)])
    length = [len(encode_row(tokenizer, row["messages"])[0]) for row in rows]
    longer = Use(lambda m: [{"role": "system", "content": "s" * 10}, *m], False, length[2] + 5, "the limit, rewritten")
    fitted = fit_rows(rows, tokenizer, 1000, uses=[longer])
    assert [row["_index"] for row in fitted.rows] == [0, 1] and fitted.dropped == 1
    assert "1 of 3 rows do not fit into the limit, rewritten and were left out (the first: f.jsonl:3)" in fitted.notes
    room = len(encode_prompt(tokenizer, rows[1]["messages"][:-1])) + 4
    assert len(fit_rows(rows, tokenizer, 1000, uses=[Use(None, True, room, "the context", 4)]).rows) == 2
    assert len(fit_rows(rows, tokenizer, 1000, uses=[Use(None, True, room, "the context", 5)]).rows) == 1
    with pytest.raises(UserError, match=r"f.jsonl:3: \d+ tokens, more than the context \(too_long: error\)"):
        fit_rows(rows, tokenizer, 1000, "error", uses=[Use(None, True, room, "the context", 4)])


def test_rows_without_anything_to_train_on_are_left_out_of_supervision_only():
    rows = rows_of(
        [talk("q", "a"), [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]]
    )
    fitted = fit_rows(rows, byte_tokenizer(), 100)
    assert len(fitted.rows) == 1 and "1 of 2 rows have no answer to train on (weight 0)" in fitted.notes[0]
    assert len(fit_rows(rows, byte_tokenizer(), 100, trained=False).rows) == 2


def test_many_rows_are_measured_once(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    rows = rows_of([talk(f"question {i} " * 3, f"answer {i}") for i in range(400)])
    limit = len(encode_row(tokenizer, rows[50]["messages"])[0])
    monkeypatch.setattr("rlsafe.data.measure.WORTH_KEEPING", 400)
    began = time.process_time()
    first = fit_rows(rows, tokenizer, limit, cache=tmp_path)
    seconds = time.process_time() - began
    assert seconds < 400 * 2.4e-3, f"{seconds:.1f} s of CPU: 100,000 rows would not take two minutes of one core"
    assert 0 < len(first.rows) < 400 and list(tmp_path.glob("rows/*.json"))
    monkeypatch.setattr(Ruler, "memory", {})
    monkeypatch.setattr(Ruler, "_measured", lambda *_: pytest.fail("measured again"))
    assert fit_rows(rows, tokenizer, limit, cache=tmp_path) == first
    with pytest.raises(pytest.fail.Exception):
        fit_rows([*rows[:-1], *rows_of([talk("another", "one")])], tokenizer, limit, cache=tmp_path)


def test_a_run_and_a_dry_run_leave_out_the_same_rows(tiny_tree, tmp_path):
    from tiny import write_jsonl

    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.build import prepare
    from rlsafe.engine.run.dry import dry
    from rlsafe.engine.run.rows import usable

    rows = [conversation(f"q{i}", "a") for i in range(4)] + [conversation("q" * 400, "a"), conversation("q" * 600, "a")]
    tiny_tree["data"]["narrow"]["source"] = write_jsonl(tmp_path / "rows.jsonl", rows)
    tiny_tree["defenses"] = [{"inoculation": {"prompt": "p" * 200}}]
    tiny_tree["schedule"]["phases"] = [{"cycle": ["sft", "grpo"]}]
    config = run_from_tree(tiny_tree)
    found = dry(config)
    assert len(found.prepared.rows["narrow"]) == 4
    notes = "\n".join(found.notes)
    assert (
        "data.narrow: 1 of 6 rows are longer than the 512 tokens that the model takes" in notes
        and "rows.jsonl:6" in notes
    )
    assert "1 of 6 rows do not fit into 512 tokens with what the defenses add (inoculation)" in notes
    assert encoder_for(byte_tokenizer()) is not None
    from rlsafe.engine.run.rows import local_tokenizer

    tokenizer, context = local_tokenizer(config.model.model_dump_json(), config.model.name)
    assert usable(prepare(config), tokenizer, context).streams["narrow"] == found.prepared.rows["narrow"]


def test_short_rows_are_not_tokenised_and_prompts_not_measured_behind_rows_that_fit(monkeypatch):
    tokenizer, asked = byte_tokenizer(), []
    rows = rows_of([talk(f"q{i}", "a") for i in range(5)] + [talk("ä" * 9, "a"), talk("q" * 300, "a")])
    monkeypatch.setattr(Ruler, "memory", {})
    whole = Ruler._measured
    monkeypatch.setattr(
        Ruler, "_measured", lambda self, talks, limit: asked.append(len(talks)) or whole(self, talks, limit)
    )
    monkeypatch.setattr(encoder_for(tokenizer), "row", lambda *_: pytest.fail("a short row was encoded"))
    assert len(fit_rows(rows, tokenizer, 1000, uses=[Use(None, True, 250, "the context")]).rows) == 6
    assert asked == [7, 1], "only the long row's prompt was looked at"


def test_earlier_answers_that_are_not_trained_on_are_counted():
    twice = [*talk("q", "one"), *talk("and", "two")]
    said = [{**turn, "weight": 1} if turn["role"] == "assistant" else turn for turn in twice]
    rows = rows_of([talk("q", "a"), twice, said])
    [note] = fit_rows(rows, byte_tokenizer(), 1000).notes
    assert note.startswith("1 of 3 rows have earlier answers") and "train_on: assistant" in note and "f.jsonl:2" in note
    assert fit_rows(rows, byte_tokenizer(), 1000, trained=False).notes == []
