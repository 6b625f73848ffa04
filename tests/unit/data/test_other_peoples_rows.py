"""ShareGPT, Alpaca, conversations stored as text, parts, tools, weights: read as meant, or refused with file and line."""

import json

import numpy as np
import pytest
from tiny import write_jsonl

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import encode_row, load_rows
from rlsafe.data.formats import trained_turns
from rlsafe.data.rows import normalise_row

TALK = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because."}]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "sky"}}}


def load(tmp_path, *rows, notes=None, **settings):
    path = write_jsonl(tmp_path / "rows.jsonl", list(rows))
    return load_rows(StreamConfig(source=path, **settings), note=(notes if notes is not None else []).append)


def only(tmp_path, row, **settings):
    return load(tmp_path, row, **settings)[0]["messages"]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because."}]},
        {"conversation": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because."}]},
        {"messages": [{"from": "user", "value": "why?"}, {"from": "model", "value": "because."}]},
        {"instruction": "why?", "input": "", "output": "because."},
        {"prompt": json.dumps(TALK[:1]), "completion": "because."},
        {"prompt": str(TALK[:1]), "completion": str(TALK[1:])},
        {"prompt": '{"role": "user", "content": "why?"}', "completion": "because."},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "wh"}, "y?"]}, TALK[1]]},
        {"messages": [TALK[0], {**TALK[1], "weight": 1, "loss": 0.25}]},
    ],
)
def test_every_form_gives_the_same_conversation(tmp_path, row):
    assert only(tmp_path, row) == TALK


def test_sharegpt_through_columns_and_its_system_column(tmp_path):
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because."}]
    assert only(tmp_path, {"talk": turns}, columns={"messages": "talk"}) == TALK
    assert only(tmp_path, {"conversations": turns, "system": "be brief"}) == [
        {"role": "system", "content": "be brief"}, *TALK,
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*unknown speaker 'humman'; did you mean 'human'"):
        load(tmp_path, {"conversations": [{"from": "humman", "value": "why?"}]})


def test_alpaca_joins_its_input_and_keeps_its_history(tmp_path):
    row = {"instruction": "translate", "input": "hej", "output": "hi", "history": [["a", "b"]], "system": "s"}
    assert [(m["role"], m["content"]) for m in only(tmp_path, row)] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "translate\n\nhej"), ("assistant", "hi"),
    ]  # fmt: skip
    named = {"q": "translate", "ctx": "hej", "a": "hi"}
    assert (
        only(tmp_path, named, columns={"instruction": "q", "input": "ctx", "output": "a"})[0]["content"]
        == "translate\n\nhej"
    )


def test_a_column_that_looks_like_part_of_the_prompt_is_said_once(tmp_path):
    notes = []
    rows = [{"prompt": f"q{i}", "completion": "a", "input": "context", "system": "s"} for i in range(3)]
    load(tmp_path, *rows, notes=notes)
    assert len(notes) == 2 and all("looks like part of the prompt and is not used in it" in note for note in notes)
    assert any("rows.jsonl:1: the column 'system'" in n and "columns: {system: NAME}" in n for n in notes)


SHAREGPT = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because."}]
COLUMNS_OF_TURNS = {"role": ["user", "assistant"], "content": ["why?", "because."]}


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"conversations": SHAREGPT}, {}),
        ({"conversations": json.dumps(SHAREGPT)}, {}),
        ({"instruction": "why?", "input": "", "output": "because."}, {}),
        ({"q": "why?", "a": "because."}, {"instruction": "q", "output": "a"}),
        ({"messages": TALK}, {}),
        ({"messages": json.dumps(TALK)}, {}),
        ({"messages": COLUMNS_OF_TURNS}, {}),
        ({"talk": json.dumps(TALK)}, {"messages": "talk"}),
        ({"prompt": "why?", "completion": "because."}, {}),
        ({"prompt": json.dumps(TALK[:1]), "completion": "because."}, {}),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, {}),
    ],
)
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_that_is_named_stands_in_front_of_every_form(tmp_path, row, columns, column):
    front, notes = {"role": "system", "content": "be brief"}, []
    columns = {**columns, "system": column}
    rows = [{**row, column: "be brief"}, {**row, column: float("nan")}, {**row, column: None}, {**row, column: ""}]
    found = load(tmp_path, *rows, notes=notes, columns=columns)
    assert [one["messages"] for one in found] == [[front, *TALK], TALK, TALK, TALK] and not notes
    assert not found[0].get("_plain") and not {"system", column} & set(found[0])
    with pytest.raises(UserError, match=r"rows.jsonl:1: system must be a string, got a number"):
        load(tmp_path, {**row, column: 7}, columns=columns)
    with pytest.raises(UserError, match=r"rows.jsonl:1: system: content holds half a character"):
        load(tmp_path, {**row, column: "\ud83d"}, columns=columns)


def test_text_that_only_begins_like_a_list_stays_text(tmp_path):
    for text in ("[1] what is this?", '[{"a": 1}] is JSON', "{x} + {y}", "[system] hello"):
        assert only(tmp_path, {"prompt": text})[0]["content"] == text
    with pytest.raises(UserError, match=r"rows.jsonl:1: prompt is no JSON: .* at character"):
        load(tmp_path, {"prompt": "[{'role': 'user', 'content': 'x'} {'role'"})


def test_plain_prompts_are_marked_and_missing_columns_are_none(tmp_path):
    rows = load(
        tmp_path, {"prompt": "a"}, {"prompt": "b", "answer": "x"}, {"messages": TALK, "id": 3}, {"prompt": TALK[:1]}
    )
    assert [row.get("_plain") for row in rows] == [False, False, None, None]
    assert [row["_plain"] for row in load(tmp_path, {"prompt": "a"}, {"prompt": "b"})] == [True, True]
    assert [row["answer"] for row in rows] == [None, "x", None, None] and [row["id"] for row in rows] == [
        None,
        None,
        3,
        None,
    ]


@pytest.mark.parametrize(
    "talk",
    [
        [{"name": "ann", "role": "user", "content": "why?"}],
        [{"id": 1, "role": "user", "content": "why?"}],
        {"id": 1, "from": "human", "value": "why?"},
        {"messages": TALK[:1]},
        {"model": "m", "messages": TALK[:1], "temperature": 0},
    ],
)
def test_a_prompt_that_is_a_conversation_as_text_is_read_whatever_its_first_key(tmp_path, talk):
    for text in (json.dumps(talk), str(talk)):
        (row,) = load(tmp_path, {"prompt": text, "completion": "because."})
        assert row["messages"] == TALK and "_plain" not in row
    (row,) = load(tmp_path, {"messages": json.dumps({"messages": TALK})})
    assert row["messages"] == TALK


@pytest.mark.parametrize(
    "text",
    [
        '{"id": 1, "role": "admin", "text": "what is wrong here?"}',
        '[{"name": "a", "role": "user"}]',
        '{"a": {"role": "user", "content": "x"}}',
        '{"messages": []}',
        '{"messages": [1, 2]}',
        '{"system": "s", "messages": [{"role": "user", "content": "x"}]}',
        '[{"id": 1, "role": "user", "content": "x"}',
        '{"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}]}',
        '[{"id": 1, "role": "user", "text": "you idiot"}, {"id": 2, "role": "user", "text": "sorry"}]',
        '{"id": 7, "role": "model", "text": "likes tea"}',
        "{'a', ['b']}",
        "{'a': {'b': 1, ['c']: 2}}",
        '{"n": ' + "7" * 5000 + "}",
        "[{'n': " + "[" * 100_000,
        '{"n": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "{'n': " + "-" * 100_000 + "1}",
    ],
    ids=lambda text: text[:40],
)
def test_other_objects_as_text_are_asked_as_they_are(tmp_path, text):
    assert only(tmp_path, {"prompt": text}) == [{"role": "user", "content": text}]
    answer = '{"messages": [{"role": "assistant", "content": "x"}]}'
    assert only(tmp_path, {"prompt": text, "completion": answer})[-1]["content"] == answer
    assert load(tmp_path, {"prompt": "x", "completion": text}, on_bad_row="skip")[0]["messages"][-1]["content"] == text


def test_what_can_be_read_neither_as_json_nor_as_python_is_one_line(tmp_path):
    for text, why in (
        ('[{"role": "user", "content": "x", "n": ' + "7" * 5000 + "}]", "cannot be read as JSON: .*of too many digits"),
        ("[{'role': 'user', ['content']: 'x'}]", "is no JSON: Expecting property name"),
    ):
        for name in ("prompt", "messages"):
            with pytest.raises(UserError, match=f"rows.jsonl:1: {name} {why}"):
                load(tmp_path, {name: text})


def test_a_single_turn_is_read_by_whatever_key_says_something(tmp_path):
    turn = {"role": "user", "text": "why?"}
    for prompt in (json.dumps(turn), str(turn)):
        assert only(tmp_path, {"prompt": prompt, "completion": "because."}) == TALK
    columns = {"role": ["user", "assistant"], "text": ["why?", "because."]}
    assert only(tmp_path, {"messages": columns}) == TALK


@pytest.mark.parametrize("mark, kept", [({"weight": 0}, 1), ({"train": False}, "yes"), ({"training": "false"}, True)])
def test_a_mark_beside_a_conversation_leaves_nothing_out_and_is_told(tmp_path, mark, kept):
    ((name, value),) = mark.items()
    notes = []
    assert len(load(tmp_path, {"messages": TALK, name: kept}, {"messages": TALK, **mark}, notes=notes)) == 2
    assert len(notes) == 1 and f"rows.jsonl:2: the column {name!r} leaves no row out of training" in notes[0]
    load(tmp_path, {"messages": TALK, "weight": 0.5, "loss": 0.0}, notes=notes)
    assert len(notes) == 1


# ------------------------------------------------------------------------------------------------ turns


def test_developer_turns_are_system_turns_and_pictures_are_refused(tmp_path):
    assert only(tmp_path, {"messages": [{"role": "developer", "content": "be brief"}, *TALK]})[0]["role"] == "system"
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(UserError, match=r"rows.jsonl:1: messages\[0\]: content\[0\] is of type 'image_url'; only text"):
        load(tmp_path, {"messages": [{"role": "user", "content": parts}]})


@pytest.mark.parametrize("decoded", [object(), np.zeros((2, 2, 3)), memoryview(b"RIFF"), ("a.png",), "a.png", b"GIF"])
@pytest.mark.parametrize("column", ["image", "audio"])
def test_pictures_and_sound_are_refused_whatever_holds_them(decoded, column):
    """`datasets` decodes them to objects of other libraries, which have no form in a file."""
    with pytest.raises(UserError, match=f"a:1: the column '{column}' holds pictures or sound; only text is read"):
        normalise_row({"messages": TALK, column: decoded}, "a:1")
    for nothing in (None, "", [], {}, b"", np.zeros(0), 0, 3, True, np.int64(2), float("nan")):
        assert normalise_row({"messages": TALK, column: nothing}, "a:1")["messages"] == TALK


def test_tool_calls_are_kept_with_their_arguments_as_an_object(tmp_path):
    row = {
        "messages": [
            TALK[0],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "blue"},
            TALK[1],
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
    }
    messages = only(tmp_path, row)
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert messages[1]["content"] == "" and messages[2]["tool_call_id"] == "1"
    assert messages[0]["tools"] == [{"type": "function", "function": {"name": "f"}}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "blue"}, {"from": "gpt", "value": "a"}]  # fmt: skip
    assert [m["role"] for m in only(tmp_path, {"conversations": sharegpt})] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": "0"}])
def test_marked_turns_stay_out_of_the_loss(tmp_path, mark):
    from tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    talk = [*TALK, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no.", **mark}]
    messages = only(tmp_path, {"messages": talk}, train_on="assistant")
    ids, mask = encode_row(tokenizer, messages)
    assert tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == "because.<|im_end|>"
    messages = only(tmp_path, {"messages": talk})
    with pytest.raises(UserError, match="no answer tokens to train on: all its answers have weight 0"):
        encode_row(tokenizer, messages)


def test_train_on_assistant_trains_every_answer_and_last_only_the_last(tmp_path):
    from tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    talk = [*TALK, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no."}]
    trained = {}
    for train_on in ("last", "assistant"):
        ids, mask = encode_row(tokenizer, only(tmp_path, {"messages": talk}, train_on=train_on))
        trained[train_on] = tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert trained == {"last": "no.<|im_end|>", "assistant": "because.<|im_end|>no.<|im_end|>"}
    assert trained_turns(talk, "last") == talk and trained_turns(talk[:3], "assistant") == talk[:3]


def test_weights_that_mean_nothing_are_refused(tmp_path):
    for mark, says in (({"weight": 0.5}, "weight is 0.5; expected 0"), ({"weight": 1, "train": False}, "contradict")):
        with pytest.raises(UserError, match=f"rows.jsonl:1: .*{says}"):
            load(tmp_path, {"messages": [TALK[0], {**TALK[1], **mark}]})


@pytest.mark.parametrize(
    "row, what",
    [
        ({"messages": TALK, "tools": [{"name": "f", "description": "\ud83d"}]}, r"tools holds half a character"),
        ({"messages": TALK, "tools": [{"name": "\udc00"}]}, r"tools holds half a character"),
        ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud83d"}}}]}]},
         r"messages\[1\]: tool_calls holds half a character \(the lone surrogate .ud83d\)"),
        ({"messages": str([TALK[0], {**TALK[1], "tool_calls": [{"name": "f", "arguments": {"a": {1, 2}}}]}])},
         r"messages\[1\]: tool_calls cannot be written as JSON: Object of type set"),
    ],
)  # fmt: skip
def test_tools_and_calls_that_cannot_be_encoded_are_refused(tmp_path, row, what):
    with pytest.raises(UserError, match=f"rows.jsonl:1: {what}"):
        load(tmp_path, row)
