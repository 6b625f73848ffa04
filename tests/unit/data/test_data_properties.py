"""Whatever stands in a data or question file, loading gives rows or one UserError: never another exception."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import load_rows, split_prompt
from rlsafe.data.presets import PRESETS
from rlsafe.evaluate import load_questions
from rlsafe.evaluate.ask.questions import KEYS as KNOWN

QUICK = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(max_size=8) | st.just("half \ud800")
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | TEXT
ANY = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "", None])
MESSAGE = st.fixed_dictionaries({"role": ROLE | ANY, "content": TEXT | ANY}) | ANY
ROW = (
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3) | ANY}, optional={"answer": ANY, "answers": ANY})
    | st.fixed_dictionaries(
        {"prompt": TEXT | st.lists(MESSAGE, max_size=2)}, optional={"completion": TEXT | ANY, "system": ANY}
    )
    | st.fixed_dictionaries({"context": ANY, "question": ANY, "answers": ANY | st.fixed_dictionaries({"text": ANY})})
    | ANY
)


def one_line(error):
    assert "\n" not in str(error) and str(error)


def load(path, **stream):
    """Rows that a tokenizer can encode, or None after one line."""
    try:
        rows = load_rows(StreamConfig(source=str(path), **stream), note=lambda line: None)
    except UserError as error:
        one_line(error)
        return None
    for row in rows:
        for message in row["messages"]:
            assert message["role"] in ("system", "user", "assistant")
            message["content"].encode("utf-8")
        split_prompt(row)
    return rows


@QUICK
@given(rows=st.lists(ROW, max_size=4), skip=st.booleans(), suffix=st.sampled_from([".jsonl", ".json"]))
def test_any_json_rows(tmp_path, rows, skip, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    strict = load(path)
    if skip:
        kept = load(path, on_bad_row="skip")
        assert strict is None or kept == strict, "skipping changes nothing where nothing is bad"
    load(path, on_bad_row="skip", columns={"prompt": "question", "system": "system"})
    load(path, on_bad_row="skip", where={"answer": [1, None]})


@QUICK
@given(rows=st.lists(ROW, min_size=1, max_size=3), preset=st.sampled_from([p for p in PRESETS if "opswap" not in p]))
def test_any_json_rows_through_any_preset(tmp_path, rows, preset):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    load(path, preset=preset, on_bad_row="skip")


@QUICK
@given(data=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_any_bytes(tmp_path, data, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    load(path)
    load(path, on_bad_row="skip")


@QUICK
@given(cut=st.integers(0, 400), flip=st.integers(0, 400), byte=st.integers(0, 255))
def test_any_damage_to_a_good_file(tmp_path, cut, flip, byte):
    good = "".join(
        json.dumps({"prompt": f"q{i} é", "completion": "a\u2028b"}, ensure_ascii=False) + "\r\n" for i in range(8)
    )
    data = bytearray(good.encode())
    data[flip % len(data)] = byte
    path = tmp_path / "a.jsonl"
    path.write_bytes(bytes(data[: max(1, len(data) - cut)]))
    rows = load(path, on_bad_row="skip")
    assert rows is None or len(rows) <= 8


# ------------------------------------------------------------------------------------------------ question files

KEYS = st.sampled_from([*KNOWN, "x"])
QUESTION = st.dictionaries(KEYS, ANY | st.lists(TEXT, max_size=2) | st.integers(-(10**400), 10**400), max_size=6) | ANY
NEARLY = st.fixed_dictionaries(
    {"id": st.integers() | TEXT, "paraphrases": st.lists(TEXT, min_size=1, max_size=2)},
    optional={"temperature": SCALAR, "samples_per_paraphrase": SCALAR, "system": TEXT, "judge_prompts": ANY},
)


def ask(path):
    try:
        questions = load_questions(str(path))
    except UserError as error:
        one_line(error)
        return
    for question in questions:
        assert question.id and question.samples >= 1 and 0 <= question.temperature <= 100
        "".join([question.id, *question.paraphrases, question.system or "", *question.judge_prompts.values()]).encode(
            "utf-8"
        )


@QUICK
@given(tree=st.lists(QUESTION | NEARLY, max_size=3) | ANY)
def test_any_yaml_tree_as_a_question_file(tmp_path, tree):
    path = tmp_path / "q.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="backslashreplace")
    ask(path)
    path.write_text(json.dumps(tree))  # JSON is YAML, with escapes of its own
    ask(path)


@QUICK
@given(text=st.text(st.sampled_from("-:&*!?|>[]{}'\"#%@\n\t abid0\ud800é"), max_size=40), data=st.binary(max_size=30))
def test_any_text_or_bytes_as_a_question_file(tmp_path, text, data):
    path = tmp_path / "q.yaml"
    for content in (text.encode("utf-8", "surrogatepass"), b"- id: " + data, data):
        path.write_bytes(content)
        ask(path)


@pytest.mark.parametrize(
    "text",
    [
        "- &a {id: x, paraphrases: [*a]}",
        "- &a [*a]",
        "- {id: a, paraphrases: ['\\ud800']}".replace("'", '"'),
        "- {id: a, paraphrases: [x], temperature: 1" + "0" * 400 + "}",
        "- {id: a, paraphrases: [x], samples_per_paraphrase: 1" + "0" * 5000 + "}",
        "- !!set {id, paraphrases}",
        "!!omap [{id: a}]",
        "[" * 3000,
        "- {id: a, paraphrases: [x], judge_prompts: {aligned: {a: b}}}",
        "- {id: 2024-13-45, paraphrases: [x]}",
    ],
)
def test_known_traps_of_yaml(tmp_path, text):
    path = Path(tmp_path / "q.yaml")
    path.write_text(text)
    with pytest.raises(UserError):
        load_questions(str(path))
