"""Values that are paths are taken as written; other values are YAML, and what YAML makes of them is said."""

import pytest

from rlsafe.config import UserError
from rlsafe.config.loading import apply_override

NAMES = [
    "rows #1.jsonl",
    "a: b.jsonl",
    "it's.jsonl",
    'my "own" rows.jsonl',
    "größe & ü.jsonl",
    "[x] {y}.jsonl",
    "- a.jsonl",
    "1.5",
    "yes",
]


def given(key, value):
    tree = {"rewards": [{"fn": "x"}], "model": {}, "data": {"narrow": {}}}
    apply_override(tree, f"{key}={value}")
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["data.narrow.source", "model.name", "rewards.0.fn", "model.adapter"])
def test_a_text_is_taken_as_written(key, name):
    assert given(key, f"/data/my rows/{name}") == f"/data/my rows/{name}"
    if not name.startswith(("[", '"', "'")):
        assert given(key, name) == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["evaluate.judge", "defenses.0", "plugins", "'x.py'"])
def test_a_file_that_is_there_is_meant_whatever_the_setting_takes(tmp_path, key, name):
    if key.startswith("'") or key == "defenses.0":
        return
    file = tmp_path / name
    file.write_text("x")
    assert given(key, str(file)) == str(file)


def test_what_is_yaml_stays_yaml():
    assert given("model.adapter", "null") is None
    assert given("data.narrow.source", "'a # b'") == "a # b", "quotes still work as in YAML"
    assert given("data.narrow.limit", "5") == 5 and given("data.narrow.columns", "{prompt: q}") == {"prompt": "q"}
    assert given("evaluate.judge", "{kind: openai}") == {"kind": "openai"}
    assert given("evaluate.benign", "[a, b]") == ["a", "b"]


def test_what_yaml_cannot_read_says_how_to_quote_it():
    with pytest.raises(UserError, match=r"is read as YAML, and is not valid: .*; a text goes into quotes: \"'\[a'\""):
        given("evaluate.benign", "[a")
    with pytest.raises(UserError, match=r"is read as YAML, as 'a'; to take it as written: \"'a #1'\""):
        given("defenses", "a #1")
