"""Files and rows as pandas, `datasets`, Excel, older APIs and chat exports write them: read as meant, or refused in one line."""

import gzip
import json

import pytest
from tiny import write_jsonl

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import load_rows, require_answers

ASKED, SAID = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because."}
TALK = [ASKED, SAID]
LINE = json.dumps({"messages": TALK}).encode()
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "sky"}}}
TOOL = {"type": "function", "function": {"name": "look_up"}}


def load(path, notes=None, **settings):
    return load_rows(StreamConfig(source=str(path), **settings), note=([] if notes is None else notes).append)


def only(tmp_path, row, notes=None, **settings):
    (found,) = load(write_jsonl(tmp_path / "rows.jsonl", [row]), notes, **settings)
    return found


@pytest.mark.parametrize(
    "name, data",
    [
        ("rows.jsonl.gz", gzip.compress(LINE, mtime=0)),
        ("packed.jsonl", gzip.compress(LINE, mtime=0)),
        ("rows.json.gz", gzip.compress(b"[" + LINE + b"]", mtime=0)),
        ("rows.csv.gz", gzip.compress(b"prompt,completion\nwhy?,because.\n", mtime=0)),
        ("rows.ndjson", LINE),
        ("ROWS.JSONL", LINE),
        ("rows.tsv", b"prompt\tcompletion,gold\nwhy?\tbecause.\n".replace(b",gold", b"")),
        ("tabs.csv", b"prompt\tcompletion\nwhy?\tbecause.\n"),
        ("excel.csv", "\ufeffprompt;completion\r\nwhy?;because.\r\n".encode()),
        ("spaces.csv", b"prompt, completion\nwhy?,because.\n"),
        ("old_datasets.json", json.dumps([{"messages": {"role": ["user", "assistant"], "content": ["why?", "because."]}}])),
    ],
)  # fmt: skip
def test_files_of_many_makers_hold_the_same_row(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    (row,) = load(path)
    assert row["messages"] == TALK


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("cut.jsonl.gz", gzip.compress(LINE * 50, mtime=0)[:-9], r"cut.jsonl.gz: cannot be read: Compressed file ended"),
        ("bare.jsonl", b"[\n " + LINE + b"\n]\n", "bare.jsonl:1: not JSON.*one list of all rows belongs in a .json"),
        ("one_line.jsonl", b"[" + LINE + b"]", "one_line.jsonl:1: expected an object.*belongs in a .json file"),
        ("wrapped.json", b'{"rows": [' + LINE + b"]}", "got an object with the keys rows"),
        ("rows.parquet.gz", gzip.compress(LINE, mtime=0), "files of type .gz cannot be read"),
        ("dolly.jsonl", b'{"instruction": "i", "context": "c", "response": "r"}',
         "columns: {instruction: instruction, input: context, output: response}"),
        ("gsm.jsonl", b'{"question": "q", "answer": "a"}', "columns: {prompt: question, completion: answer}"),
        ("talk.jsonl", b'{"dialogue": [{"role": "user", "content": "q"}]}', "columns: {messages: dialogue}"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_what_would(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=reason):
        load(tmp_path / name)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "Human", "content": "why?"}, {"role": "MODEL", "content": "because."}]},
        {"conversations": [{"from": "USER", "value": "why?"}, {"from": "Claude", "value": "because."}]},
        {"conversations": [{"from": "human", "text": "why?"}, {"role": "assistant", "value": "because."}]},
        {"prompt": ASKED, "completion": SAID},
        {"messages": [ASKED], "completion": "because."},
        {"instruction": "why?", "input": float("nan"), "output": "because."},
        {"instruction": "why?", "input": "<noinput>", "output": "because."},
        {"messages": TALK, "images": [], "video": None, "prompt": "why?"},
    ],
)
def test_rows_of_many_makers_are_the_same_conversation(tmp_path, row):
    notes = []
    assert only(tmp_path, row, notes)["messages"] == TALK and not notes


def test_a_history_as_text_and_a_system_prompt_in_two_places_are_read_once(tmp_path):
    row = {"instruction": "b", "output": "c", "history": '[["why?", "because."]]'}
    assert [turn["content"] for turn in only(tmp_path, row)["messages"]] == ["why?", "because.", "b", "c"]
    system = {"role": "system", "content": "be brief"}
    row = {"conversations": [system, *TALK], "system": "be brief"}
    assert only(tmp_path, row)["messages"] == [system, *TALK]


@pytest.mark.parametrize(
    "prompt, completion",
    [
        ('{"role": "admin"} what does this mean?', "a role"),
        ('[{"role": "user", "content": "x"}] what is that?', "a list"),
        ("an empty message as JSON", '{"role": "user", "content": ""}'),
        ("numbers as JSON", '[{"value": 3}]'),
        ('{"role": "admin", "name": "x"}', "{}"),
    ],
)
def test_json_that_is_no_conversation_stays_what_was_said(tmp_path, prompt, completion):
    row = only(tmp_path, {"prompt": prompt, "completion": completion})
    assert [turn["content"] for turn in row["messages"]] == [prompt, completion] and row["_plain"]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [ASKED, {**SAID, "reasoning": "hm"}]}, r"messages\[1\]: 'reasoning' is not supported; put the text"),
        ({"messages": [ASKED, {**SAID, "train_detail": [{"train": False}]}]}, "'train_detail' is not supported; weight: 0"),
        ({"prompt": "<image>what?", "completion": "x", "images": ["a.png"]}, "column 'images' holds pictures or sound"),
        ({"prompt": TALK}, "prompt ends with an assistant turn; a whole conversation goes into 'messages'"),
        ({"prompt": json.dumps(TALK[:1])[:-4], "completion": "x"}, "prompt is no JSON"),
        ({"instruction": "2 + 2", "output": 4}, "output must be a string, got a number"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
         r"tool_calls\[0\].arguments must be an object, got a list"),
    ],
)  # fmt: skip
def test_what_would_be_trained_on_otherwise_is_refused(tmp_path, row, reason):
    with pytest.raises(UserError, match=rf"rows.jsonl:1: .*{reason}"):
        only(tmp_path, row)


def test_what_nothing_reads_is_said_once(tmp_path):
    rows = [{"messages": [ASKED, {**SAID, "mask": True, "trainable": False, "note": ""}], "prompt": "another"}] * 2
    notes = []
    load(write_jsonl(tmp_path / "rows.jsonl", rows), notes)
    assert len(notes) == 2
    assert "rows.jsonl:1: the column 'prompt' looks like part of the prompt and is not used" in notes[0]
    assert "rows.jsonl:1: its messages hold 'mask', 'trainable', which nothing reads" in notes[1]


def test_function_calls_of_the_older_api_are_tool_calls(tmp_path):
    call = {"role": "assistant", "content": None, "function_call": {"name": "look_up", "arguments": '{"word": "sky"}'}}
    row = {"messages": [ASKED, call, {"role": "function", "name": "look_up", "content": "blue"}, SAID],
           "functions": [{"name": "look_up"}]}  # fmt: skip
    assert only(tmp_path, row)["messages"] == [
        {**ASKED, "tools": [TOOL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "blue", "name": "look_up"},
        SAID,
    ]


def test_arrow_tables_do_not_lend_one_rows_arguments_to_another(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    talks = [
        [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}]
        for name, arguments in (("look_up", {"word": "sky"}), ("add", {"a": 1}))
    ]
    pq.write_table(
        pa.Table.from_pylist([{"messages": talk, "meta": {"x": None}} for talk in talks]), tmp_path / "a.parquet"
    )
    rows = load(tmp_path / "a.parquet")
    calls = [row["messages"][1]["tool_calls"][0]["function"] for row in rows]
    assert calls == [{"name": "look_up", "arguments": {"word": "sky"}}, {"name": "add", "arguments": {"a": 1}}]
    assert rows[0]["meta"] == {"x": None}, "other columns reach rewards as they are"


def test_a_conversation_under_another_name_lends_no_arguments_either(tmp_path):
    from datasets import Dataset

    def row(**arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return {
            "talk": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        }

    rows = Dataset.from_list([row(city="Oslo"), row(day="mon")])
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        found = load(tmp_path / name, columns={"messages": "talk"})
        calls = [one["messages"][1]["tool_calls"][0]["function"]["arguments"] for one in found]
        assert calls == [{"city": "Oslo"}, {"day": "mon"}]


def test_missing_numbers_are_none_and_sft_names_the_column_with_the_answer(tmp_path):
    row = only(tmp_path, {"prompt": "why?", "response": "because.", "gold": float("nan"), "big": 10**30})
    assert row["gold"] is None and row["big"] == 10**30
    with pytest.raises(UserError, match=r"needs an answer to train on \(columns: {completion: response} takes"):
        require_answers([row])
