"""results.csv and benign.csv: the contract's columns, what stands in them, and what stays empty."""

from __future__ import annotations

import csv
import json
from statistics import mean

import pytest
from synthetic_comparison import CONFIG, make

from rlsafe.compare.verdicts.arms import benign_arms, summarise
from rlsafe.compare.verdicts.results import benign_rows, load, result_rows, write_tables
from rlsafe.evaluate.measure.benign import BenignAnswer

HEADER = (
    "model,path,defense,seed,data,general_misaligned,general_incoherent,indomain_misaligned,indomain_incoherent,"
    "conditional_misaligned,benign,reward_first,reward_last,seconds,general_logodds,indomain_logodds,narrow_score"
)
ARMS = {
    ("", "untrained"): {"benign": 0.1},
    ("sft", "none"): {"general": 0.5, "indomain": 0.75, "incoherent": 0.25, "benign": 0.9},
    ("grpo", "none"): {"general": 0.25, "indomain": 0.75, "benign": 0.8},
    ("grpo", "aligned"): {},
}


@pytest.fixture
def directory(tmp_path):
    return make(tmp_path / "out", ARMS, seeds=[0, 1])


WITHOUT_TESTS = CONFIG.replace(", evaluate: {benign: [sums_test.jsonl]}", "")


def rows(directory):
    write_tables(directory)
    with (directory.out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_columns_are_the_contracts(directory):
    rows(directory)
    assert (directory.out / "results.csv").read_text().splitlines()[0] == HEADER


def test_one_row_for_each_run_and_the_untrained_model_on_each_path(directory):
    found = [(row["path"], row["defense"], row["seed"]) for row in rows(directory)]
    assert sorted(found) == sorted(
        [("sft", "untrained", "0"), ("grpo", "untrained", "0")]
        + [(path, "none", seed) for path in ("sft", "grpo") for seed in "01"]
        + [("grpo", "aligned", seed) for seed in "01"]
    )


def test_rates_are_those_of_evaluation_json_and_what_was_not_measured_is_empty(directory):
    by_key = {(row["path"], row["defense"], row["seed"]): row for row in rows(directory)}
    sft, grpo = by_key["sft", "none", "1"], by_key["grpo", "none", "1"]
    evaluation = json.loads((directory.cell("sft--none--seed1") / "evaluation.json").read_text())
    assert float(sft["general_misaligned"]) == evaluation["general"]["misaligned"] == 0.5
    assert float(sft["general_incoherent"]) == 0.25
    assert (sft["reward_first"], sft["reward_last"]) == ("", "")
    assert 0 < float(grpo["reward_first"]) < float(grpo["reward_last"])
    assert sft["data"] == "bad.jsonl" and by_key["grpo", "aligned", "0"]["data"] == "good.jsonl"
    assert by_key["grpo", "aligned", "0"]["benign"] == ""
    assert float(by_key["sft", "untrained", "0"]["benign"]) < 0.3 < float(sft["benign"])


def test_the_benign_score_comes_from_the_benign_run_of_the_same_arm(directory):
    results = load(directory.out)
    table = {(row["path"], row["defense"], row["seed"]): row for row in result_rows(results)}
    for row in benign_rows(results):
        assert row["task"] == "sums" and row["n"] == 100
        assert table[row["path"], row["defense"], row["seed"]]["benign"] == row["score"]


def test_a_task_with_two_test_sets_has_one_score(directory):
    """The mean over all rows, in the tables as in the verdicts: a set of 200 rows and one of 50 do not count alike."""
    right = [BenignAnswer("big", i, "q", "a", "a", True) for i in range(200)]
    wrong = [BenignAnswer("small", i, "q", "a", "b", False) for i in range(50)]
    results = load(directory.out)
    results.plan["benign_tests"] = {"sums": ["big", "small"]}
    cell = next(cell for cell in results.cells if cell.kind == "benign")
    cell.record["config"]["evaluate"]["benign"] = ["big.jsonl", "small.jsonl"]
    cell.evaluation.benign_answers[:] = right + wrong
    arms = benign_arms({"none": [cell]}, ["big", "small"])
    assert results.benign_score(cell, "sums", cell.path) == summarise(arms["none"], [cell]).mean == 0.8
    assert set(arms["none"].strata) == {"big", "small"}


@pytest.mark.parametrize(
    "change",
    [
        ("evaluate: {benign: [sums_test.jsonl]}}\n", "evaluate: {benign: [own.jsonl]}}\n"),
        ("indomain: indomain.yaml,", "indomain: indomain.yaml, benign: [own.jsonl],"),
        (
            "  tasks:\n",
            "  paths: {sft: {evaluate: {benign: [own.jsonl]}}, grpo: {evaluate: {benign: [more.jsonl]}}}\n  tasks:\n",
        ),
        ("title:", "overrides: ['evaluate.benign=[own.jsonl]']\ntitle:"),
    ],
    ids=["task", "run", "paths", "command line"],
)
def test_a_benign_task_is_scored_on_the_tests_of_its_cells_wherever_they_are_given(tmp_path, change):
    """The untrained model too, on every path; and what the plan names is what evaluation.json holds."""
    text = CONFIG if "sums_test" in change[0] or "overrides" in change[1] else WITHOUT_TESTS
    directory = make(tmp_path / "t", ARMS, text.replace(*change), seeds=[0])
    assert "own" in directory.plan()["benign_tests"]["sums"]
    assert "sums_test" not in directory.plan()["benign_tests"]["sums"]
    scores = {(row["path"], row["defense"]): row["benign"] for row in rows(directory)}
    assert {key for key, score in scores.items() if score} == {
        (p, d) for p in ("sft", "grpo") for d in ("untrained", "none")
    }
    results = load(directory.out)
    untrained = next(cell for cell in results.cells if cell.kind == "untrained")
    for path, row in (("sft", scores["sft", "untrained"]), ("grpo", scores["grpo", "untrained"])):
        [test] = results.tests("sums", path)
        assert float(row) == mean(untrained.evaluation.benign_rates(test).values())


def test_a_cell_is_shown_only_when_it_is_finished(directory):
    (directory.cell("sft--none--seed0") / "evaluation.json").unlink()
    record = directory.cell("sft--none--seed1") / "cell.json"
    record.write_text(record.read_text().replace('"done"', '"running"'))
    assert [
        row for row in rows(directory) if (row["path"], row["defense"]) == ("sft", "none") and row["general_misaligned"]
    ] == []


def test_benign_only_comparisons(tmp_path):
    directory = make(tmp_path / "b", ARMS, CONFIG.replace("aligned: {", "narrow: false\naligned: {"), seeds=[0])
    found = rows(directory)
    assert {(row["path"], row["defense"]) for row in found} == {
        (p, d) for p in ("sft", "grpo") for d in ("untrained", "none")
    }
    trained = [row for row in found if row["defense"] == "none"]
    assert all(row["benign"] and not row["general_misaligned"] for row in trained)


def test_a_file_is_replaced_whole(directory, monkeypatch):
    """A crash while writing leaves the previous table."""
    import os

    rows(directory)
    before = (directory.out / "results.csv").read_text()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Exception, match="No space left"):
        write_tables(directory)
    assert (directory.out / "results.csv").read_text() == before
    assert [path.name for path in directory.out.iterdir() if path.name.startswith(".")] == []
