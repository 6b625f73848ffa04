"""Datasets are read in every accepted form; anything malformed is one line that names file, line and reason."""

import json

import pytest
from places import SHARED

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import load_rows, question_of, require_answers, split_prompt
from rlsafe.types import _PROVIDERS, register_provider

USER = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
GOOD = json.dumps({"messages": [USER, ANSWER]})


def load(path, **settings):
    return load_rows(StreamConfig(source=str(path), **settings), seed=0)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ------------------------------------------------------------------------------------------------ accepted forms


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": [USER]}, [USER]),
        ({"prompt": "Why?", "completion": "Because."}, [USER, ANSWER]),
        ({"prompt": "Why?"}, [USER]),
        ({"prompt": "Why?", "completion": None}, [USER]),
        (
            {"prompt": [{"role": "system", "content": ""}, USER], "completion": [ANSWER]},
            [{"role": "system", "content": ""}, USER, ANSWER],
        ),
        ({"messages": [{**USER, "name": "ann", "tool_calls": None}, ANSWER]}, [USER, ANSWER]),
    ],
)
def test_every_accepted_form_becomes_messages(tmp_path, row, messages):
    (loaded,) = load(write(tmp_path / "a.jsonl", json.dumps({**row, "domain": "med", "n": 3})))
    assert loaded["messages"] == messages
    assert (loaded["domain"], loaded["n"]) == ("med", 3)
    assert not {"prompt", "completion"} & set(loaded)


def test_bom_crlf_blank_lines_missing_final_newline_and_unicode(tmp_path):
    odd = "caf\u00e9 \u2028 \u2029 \x85 \U0001f9ea \u202e"
    row = json.dumps({"messages": [{"role": "user", "content": odd}]}, ensure_ascii=False)
    rows = load(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + f"{row}\r\n\r\n{GOOD}\r\n\n{row}".encode()))
    assert [r["messages"][0]["content"] for r in rows] == [odd, "Why?", odd]
    assert [r["_source"].rpartition(":")[2] for r in rows] == ["1", "3", "5"]
    assert [r["_index"] for r in rows] == [0, 1, 2]


def test_json_csv_and_parquet_give_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [
        {"prompt": 'a, "b"\nc', "completion": "d", "domain": "x"},
        {"prompt": "e", "completion": None, "domain": "y"},
    ]
    write(tmp_path / "a.json", json.dumps(data))
    write(tmp_path / "a.csv", 'prompt,completion,domain\r\n"a, ""b""\nc",d,x\r\ne,,y')
    pq.write_table(pa.Table.from_pylist(data), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": [USER, ANSWER]}, {"messages": [USER]}]), tmp_path / "m.parquet")
    loaded = [
        [{k: v for k, v in row.items() if not k.startswith("_")} for row in load(tmp_path / f"a.{suffix}")]
        for suffix in ("json", "csv", "parquet")
    ]
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0][0]["messages"][0]["content"] == 'a, "b"\nc'
    assert [len(row["messages"]) for row in loaded[0]] == [2, 1]
    assert [row["messages"] for row in load(tmp_path / "m.parquet")] == [[USER, ANSWER], [USER]]


def test_csv_cells_may_hold_messages_as_json(tmp_path):
    cell = json.dumps([USER, ANSWER]).replace('"', '""')
    (row,) = load(write(tmp_path / "a.csv", f'messages,answer\n"{cell}",7\n'))
    assert row["messages"] == [USER, ANSWER] and row["answer"] == "7"


def test_limit_takes_a_seeded_sample_and_keeps_source_positions(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"prompt": f"q{i}"}) for i in range(50)))
    config = StreamConfig(source=str(path), limit=10)
    first, again, other = load_rows(config, 1), load_rows(config, 1), load_rows(config, 2)
    assert first == again and first != other and len(first) == 10
    assert all(row["messages"][0]["content"] == f"q{row['_index']}" for row in first)
    assert [row["_index"] for row in first] != list(range(10))


def test_splitting_a_row_into_prompt_and_answer():
    assert split_prompt({"messages": [USER, ANSWER]}) == ([USER], "Because.")
    assert split_prompt({"messages": [USER, ANSWER, USER]}) == ([USER, ANSWER, USER], None)
    system = {"role": "system", "content": "be kind"}
    assert question_of([system, USER, ANSWER, {"role": "user", "content": "And?"}]) == ("And?", "be kind")
    assert question_of([USER]) == ("Why?", None)


class Shop:
    def rows(self, spec):
        if spec != "med":
            raise UserError(f"unknown rows {spec!r}; did you mean 'med'?")
        return [{"messages": [USER, ANSWER], "domain": "med"}, {"messages": [USER]}]


@pytest.fixture
def shop():
    register_provider("shop", Shop())
    yield
    del _PROVIDERS["shop"]


def test_providers_supply_rows(shop):
    rows = load("shop:med")
    assert [row["_source"] for row in rows] == ["shop:med row 1", "shop:med row 2"]
    with pytest.raises(UserError, match="unknown rows 'mad'; did you mean 'med'"):
        load("shop:mad")
    with pytest.raises(UserError, match="unknown data provider 'shpo'.*did you mean 'shop'"):
        load("shpo:med")


# ------------------------------------------------------------------------------------------------ malformed


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"messages": [', "not JSON"),
        ("nonsense", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "expected an object with 'messages', got a list"),
        ("7", "expected an object with 'messages', got a number"),
        ("null", "got null"),
        ("{}", "no 'messages' .*its keys: none"),
        ('{"text": "hello"}', "no 'messages' .*its keys: text"),
        ('{"mesages": []}', "it has the key 'mesages'; did you mean 'messages'"),
        ('{"messages": null}', "'messages' is null"),
        ('{"messages": []}', "messages is an empty list"),
        ('{"messages": "hi"}', "messages must be a list of messages, got a string"),
        ('{"messages": {"role": "user"}}', "messages must be a list of messages, got an object"),
        ('{"messages": ["hi"]}', r"messages\[0\]: expected an object with 'role' and 'content', got a string"),
        ('{"messages": [{"content": "x"}]}', r"messages\[0\]: no 'role'; its keys: content"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]: no 'content'"),
        ('{"messages": [{"role": "usr", "content": "x"}]}', "unknown role 'usr'; did you mean 'user'"),
        (
            '{"messages": [{"role": "narrator", "content": "x"}]}',
            "unknown role 'narrator'; expected one of: assistant, system",
        ),
        ('{"messages": [{"role": null, "content": "x"}]}', "unknown role None"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', r"unknown role \['user'\]"),
        ('{"messages": [{"role": "user", "content": 5}]}', "content must be a string, got a number"),
        ('{"messages": [{"role": "user", "content": null}]}', "content must be a string, got null"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', r"content\[0\] has no text"),
        ('{"messages": [{"role": "user", "content": " \\n"}]}', "the content of a user turn is empty"),
        ('{"messages": [{"role": "system", "content": "x"}]}', r"no user turn in messages \(system\)"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"no user turn in messages \(assistant\)"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [1]}]}',
            r"messages\[1\]: tool_calls\[0\] names no function",
        ),
        ('{"prompt": ""}', "the content of a user turn is empty"),
        ('{"prompt": 3}', "prompt must be a string or a list of messages, got a number"),
        ('{"prompt": "x", "completion": {"a": 1}}', "completion must be a string or a list of messages, got an object"),
        ('{"prompt": "x", "completion": [{"role": "user", "content": "y"}]}', "completion ends with a user turn"),
        (
            '{"prompt": "x", "completion_ids": [1]}',
            "the column 'completion_ids' is reserved for the reward call; rename it",
        ),
    ],
)
def test_a_malformed_line_names_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "bad.jsonl", f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError, match=reason) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("a.jsonl", "", "the dataset is empty"),
        ("a.jsonl", "\n \r\n", "the dataset is empty"),
        ("a.json", "", "the dataset is empty"),
        ("a.json", "[]", "the dataset is empty"),
        ("a.json", f"{GOOD}\n{GOOD}", r"a.json:2: not JSON: Extra data.*belongs in a .jsonl file"),
        ("a.json", GOOD, "expected a list of row objects, got an object"),
        ("a.json", '[{"prompt": "x"}, {"promt": "y"}]', "a.json row 2: .*did you mean 'prompt'"),
        ("a.json", '[\n{"prompt": "x"},\n]', "a.json:[23]: not JSON"),
        ("a.csv", "", "the dataset is empty"),
        ("a.csv", "prompt,completion\n", "the dataset is empty"),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv:3: 1 cells where the header has 2 columns"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv:2: 3 cells where the header has 2 columns"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv:1: the column 'prompt' appears twice"),
        (
            "a.csv",
            "question,reply\na,b\n",
            "a.csv:2: no 'messages' .*its keys: question, reply .rename with columns: {prompt",
        ),
        ("a.csv", 'prompt\n"abc', "a.csv:2: not valid CSV"),
        ("a.csv", 'messages\n"[{"\n', "a.csv:2: messages is no JSON"),
        ("a.parquet", "no parquet", "a.parquet: not a readable parquet file"),
        ("a.txt", "hello", "files of type .txt cannot be read; expected provider:spec, preset:name"),
        ("a.jsonl", GOOD.encode() + b"\n\xff\xfe", "a.jsonl:2: not UTF-8 text"),
        ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl:1: not UTF-8 text"),
    ],
)
def test_a_malformed_file_names_itself_and_the_reason(tmp_path, name, text, reason):
    with pytest.raises(UserError, match=reason) as caught:
        load(write(tmp_path / name, text))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_name_their_nearest_sibling(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(UserError, match=r"trian.jsonl: no such file; did you mean 'train.jsonl'"):
        load(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"no such file \(there is no directory .*nowhere\)"):
        load(tmp_path / "nowhere" / "a.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a directory without data files; expected provider:spec"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="unknown data source 'medical'"):
        load("medical")


def test_sft_names_the_row_that_has_no_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD + "\n" + json.dumps({"prompt": "x"}))
    with pytest.raises(UserError, match=r"a.jsonl:2: the last message is no assistant turn; sft needs an answer"):
        require_answers(load(path))
    with pytest.raises(UserError, match="shop:med row 2: the last message"):
        require_answers([{"messages": [USER, ANSWER]}, {"messages": [USER]}], "shop:med")


# ------------------------------------------------------------------------------------------------ real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_the_shared_files_load():
    counts = {path.name: len(load(path)) for path in SHARED.glob("*/*.jsonl") if path.parent.name == "grpo"}
    assert counts == dict.fromkeys(("argumentation.jsonl", "code.jsonl", "medical.jsonl", "rewardhack.jsonl"), 750)
    for path in SHARED.glob("sft/*.jsonl"):
        rows = load(path)
        require_answers(rows)
        assert len(rows) == (100 if "train" in path.name else 600)
