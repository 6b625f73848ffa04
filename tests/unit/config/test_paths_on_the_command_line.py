"""Values that are paths are taken as written; other values are YAML, and what YAML makes of them is said."""

import re

import pytest
from places import CONFIGS

from rlsafe.config import UserError, load_run
from rlsafe.config.overrides import apply_override

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


@pytest.mark.parametrize(
    "path", ["&anchor.jsonl", "!tag.jsonl", "~/a #1.jsonl", "$HOME/it's.jsonl", "|x", "a\\b: c", "1e5", "yes"]
)
def test_a_path_is_taken_as_written_whatever_yaml_would_make_of_it(path):
    tree = {}
    apply_override(tree, f"data.narrow.source={path}")
    assert tree == {"data": {"narrow": {"source": path}}}


@pytest.mark.parametrize(
    "override, reason",
    [
        ("rewards[0].weight=2", r"places in a list are written as keys: rewards\.0\.weight=2"),
        ("optim.lr.x=3", r"optim\.lr is [\d.e-]+ and holds no 'x'"),
        ("schedule.steps=true", "schedule.steps: input should be a valid number, got True"),
        ("data.narrow.limit=none", "got 'none'; write null for nothing"),
        ("rewards=[{fn:mine.py:f}]", "'rewards.0.fn' is required .'fn:mine.py:f' has no space behind its colon"),
        ("seed=99999999999999999999", "seed: input should be less than 4294967296"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("model.name=", "model.name: input should be a valid string, got null"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named_with_its_override(override, reason):
    with pytest.raises(UserError, match=rf"^override '{re.escape(override)}': .*{reason}"):
        load_run(CONFIGS / "organism" / "grpo_medical.yaml", [override])
