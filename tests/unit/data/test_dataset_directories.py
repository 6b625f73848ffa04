"""Rows from directories of `datasets`: written by save_to_disk, or files with configurations and splits."""

import json

import pytest
from row_sources import COLUMNS, ROWS, load, own_cache, texts  # noqa: F401 (own_cache is a fixture for every test)
from tiny import write_jsonl

from rlsafe.config import UserError


@pytest.fixture
def saved(tmp_path):
    from datasets import Dataset, DatasetDict

    halves = {"train": Dataset.from_list(ROWS[:6]), "test": Dataset.from_list(ROWS[6:])}
    DatasetDict(halves).save_to_disk(str(tmp_path / "saved"))
    halves["test"].save_to_disk(str(tmp_path / "one"))
    return tmp_path


def test_a_directory_written_by_save_to_disk(saved):
    assert texts(load(saved / "saved", columns=COLUMNS)) == [f"q{i}" for i in range(6)], "train is taken unasked"
    rows = load(saved / "saved", columns=COLUMNS, split="test")
    assert texts(rows) == ["q6", "q7"] and rows[1]["_source"].endswith("[test] row 2") and rows[1]["_index"] == 1
    assert texts(load(saved / "one", columns=COLUMNS)) == ["q6", "q7"]
    with pytest.raises(UserError, match="unknown split 'tets'; did you mean 'test'"):
        load(saved / "saved", split="tets")


def test_splits_and_slices_of_a_saved_directory(saved):
    assert texts(load(saved / "saved", columns=COLUMNS, split="train[:50%]")) == ["q0", "q1", "q2"]
    assert texts(load(saved / "saved", columns=COLUMNS, split="test+train[-1:]")) == ["q6", "q7", "q5"]
    assert texts(load(saved / "one", columns=COLUMNS, split="train[1:]")) == ["q7"]
    for where, split, says in (
        ("one", "test", "unknown split 'test'; expected one of: train"),
        ("saved", "tset[:3]", r"unknown split 'tset\[:3\]'; did you mean 'test'"),
        ("saved", "test[:300%]", r"no slice of a split 'test\[:300%\]'"),
    ):
        with pytest.raises(UserError, match=says):
            load(saved / where, columns=COLUMNS, split=split)


def test_a_saved_directory_refuses_what_only_the_hub_has_and_can_be_streamed(saved):
    for name in ("config", "revision"):
        with pytest.raises(UserError, match=f"has no {name}\\w*; leave out '{name}'"):
            load(saved / "saved", columns=COLUMNS, **{name: "nope"})
    for name, rows in (("saved", 6), ("one", 2)):
        streamed = texts(load(saved / name, columns=COLUMNS, streaming=True, limit=9))
        assert len(streamed) == rows
    assert texts(load(saved / "saved", columns=COLUMNS, split="train[2:]", streaming=True, limit=1, shuffle=False)) == [
        "q2"
    ]


def test_a_directory_of_data_files_with_configurations_and_splits(tmp_path):
    for name, rows in (("first", ROWS[:3]), ("second", ROWS[3:])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "data.jsonl", rows)
    configs = [
        {"config_name": n, "data_files": [{"split": "train", "path": f"{n}/*.jsonl"}]} for n in ("first", "second")
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    rows = load(tmp_path, columns=COLUMNS, config="second")
    assert texts(rows) == [f"q{i}" for i in range(3, 8)]
    assert texts(load(tmp_path, columns=COLUMNS, config="first", split="train[:2]")) == ["q0", "q1"]
    streamed = load(tmp_path, columns=COLUMNS, config="second", streaming=True, limit=2)
    assert len(streamed) == 2 and set(texts(streamed)) <= {f"q{i}" for i in range(3, 8)}
    for wrong, says in ((dict(config="third"), "third"), (dict(config="first", split="tset"), "tset")):
        with pytest.raises(UserError, match=rf"cannot be loaded by `datasets`: .*{says}"):
            load(tmp_path, **wrong)


def test_several_splits_without_train_must_be_chosen_from(tmp_path):
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    splits = [{"split": name, "path": f"{name}.jsonl"} for name in ("one", "two")]
    (tmp_path / "README.md").write_text(
        f"---\nconfigs: {json.dumps([{'config_name': 'd', 'data_files': splits}])}\n---\n"
    )
    with pytest.raises(UserError, match="has no split 'train'; set split to one of: one, two"):
        load(tmp_path, columns=COLUMNS)
