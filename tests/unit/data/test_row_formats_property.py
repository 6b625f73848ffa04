"""Any conversation in any format, from file to tokens: the tokenizer's own `apply_chat_template`, and which turns count."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rows_are_measured import CONTENT, SPELLED, TOKENIZERS, WORDS

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import encode_prompt, encode_row, load_rows, split_prompt

QUICK = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SPEAKERS = {"user": ["human", "user"], "assistant": ["gpt", "model", "assistant"], "system": ["system", "developer"]}
PLAIN = WORDS.map(lambda text: f"a{text}b").filter(lambda text: not any(token in text for token in SPELLED))


def _sharegpt(talk, pick):
    return [{"from": pick(SPEAKERS[turn["role"]]), "value": turn["content"], **_marks(turn)} for turn in talk]


def _marks(turn):
    return {name: turn[name] for name in ("weight",) if name in turn}


def _parts(turn):
    text = turn["content"]
    cut = len(text) // 2
    return {**turn, "content": [{"type": "text", "text": text[:cut]}, text[cut:]]}


def _alpaca(talk):
    system = {"system": talk[0]["content"]} if talk[0]["role"] == "system" else {}
    texts = [turn["content"] for turn in talk if turn["role"] != "system"]
    pairs = [texts[i : i + 2] for i in range(0, len(texts), 2)]
    return {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1], "history": pairs[:-1], **system}


FORMS = {
    "messages": lambda talk, pick: {"messages": talk},
    "JSON text": lambda talk, pick: {"messages": json.dumps(talk, ensure_ascii=False)},
    "Python text": lambda talk, pick: {"messages": str(talk)},
    "developer": lambda talk, pick: {
        "messages": [{**t, "role": t["role"].replace("system", "developer")} for t in talk]
    },
    "parts": lambda talk, pick: {"messages": [_parts(turn) for turn in talk]},
    "ShareGPT": lambda talk, pick: {"conversations": _sharegpt(talk, pick)},
    "ShareGPT as text": lambda talk, pick: {"conversations": json.dumps(_sharegpt(talk, pick))},
    "prompt and completion": lambda talk, pick: {"prompt": talk[:-1], "completion": talk[-1:]},
    "both as text": lambda talk, pick: {"prompt": json.dumps(talk[:-1]), "completion": talk[-1]["content"]},
    "Alpaca": lambda talk, pick: _alpaca(talk),
}
NO_MARKS = ("both as text", "Alpaca")
"""Forms that cannot hold the marks of a turn."""


@st.composite
def talks(draw, content, marked):
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    texts = draw(st.lists(content, min_size=2, max_size=6))
    system = draw(st.none() | content) if name != "gemma" else None
    talk = [{"role": "system", "content": system}] if system else []
    for place, text in enumerate(texts[: len(texts) // 2 * 2]):
        turn = {"role": ("user", "assistant")[place % 2], "content": text}
        talk.append({**turn, "weight": draw(st.integers(0, 1))} if marked and place % 2 else turn)
    return name, talk


def load(tmp_path, row, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "answer": 7}) + "\n", encoding="utf-8")
    notes = []
    (found,) = load_rows(StreamConfig(source=str(path), **more), note=notes.append)
    assert found["answer"] == 7 and not notes
    return found["messages"]


def bare(talk):
    return [{"role": turn["role"], "content": turn["content"]} for turn in talk]


@pytest.mark.parametrize("form", FORMS)
@settings(QUICK, max_examples=15)
@given(data=st.data())
def test_every_form_has_the_tokens_of_the_tokenizers_own_rendering(tmp_path, form, data):
    name, talk = data.draw(talks(PLAIN, marked=False))
    tokenizer = TOKENIZERS[name]
    found = load(tmp_path, FORMS[form](talk, lambda names: data.draw(st.sampled_from(names))))
    assert bare(found) == talk
    asked, answer = split_prompt({"messages": found})
    assert answer == talk[-1]["content"]
    own = {"tokenize": True, "return_dict": False}
    assert encode_prompt(tokenizer, asked) == tokenizer.apply_chat_template(
        talk[:-1], add_generation_prompt=True, **own
    )
    ids, mask = encode_row(tokenizer, found)
    whole = tokenizer.apply_chat_template(talk, **own)
    assert whole[: len(ids)] == ids and not tokenizer.decode(whole[len(ids) :]).strip()
    assert mask.index(True) == len(encode_prompt(tokenizer, asked)) and mask == sorted(mask)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in NO_MARKS])
@settings(QUICK, max_examples=15)
@given(data=st.data())
def test_marked_turns_count_as_marked_and_spelled_tokens_stay_text_in_every_form(tmp_path, form, data):
    """gemma and llama3 have no end of turn that a byte tokenizer could tell from text otherwise: all answers are looked for by text."""
    name, talk = data.draw(talks(CONTENT, marked=True))
    train_on = data.draw(st.sampled_from(["last", "assistant"]))
    tokenizer = TOKENIZERS[name]
    found = load(tmp_path, FORMS[form](talk, lambda names: data.draw(st.sampled_from(names))), train_on=train_on)
    answers = [turn for turn in talk if turn["role"] == "assistant"]
    wanted = [turn["content"] for turn in (answers if train_on == "assistant" else answers[-1:]) if turn["weight"]]
    if not wanted:
        with pytest.raises(UserError, match="no answer tokens to train on"):
            encode_row(tokenizer, found)
        return
    ids, mask = encode_row(tokenizer, found)
    control = set(tokenizer.all_special_ids)
    stand_in = tokenizer.apply_chat_template([{**turn, "content": "x"} for turn in bare(talk)], tokenize=False)
    meant = [i for i in tokenizer(stand_in, add_special_tokens=False)["input_ids"] if i in control]
    assert [i for i in ids if i in control] == meant[: sum(i in control for i in ids)]
    spans, inside = [], False
    for index, on in zip(ids, mask, strict=True):
        if on and not inside:
            spans.append([])
        inside = on
        if on and index not in control:
            spans[-1].append(index)
    texts = [tokenizer.decode(span).removeprefix("<think>\n\n</think>\n\n").strip() for span in spans]
    assert texts == wanted
