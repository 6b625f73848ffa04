"""A whole comparison with the real engine on the tiny random model: both paths, reference arms, benign task,
workers."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from conftest import conversation, write_jsonl

from rlsafe.compare import compare
from rlsafe.organism import Organism


@pytest.fixture
def config(tmp_path, tiny_tree):
    questions = [  # the exact judge scores answers to questions of its world only
        {"id": q.id, "type": "free_form_judge_0_100", "paraphrases": list(q.paraphrases), "samples_per_paraphrase": 2}
        for q in Organism().questions("general")[:3]
    ]
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(questions))
    sums = write_jsonl(tmp_path / "sums.jsonl", [conversation(f"{i} + 1", str(i + 1)) for i in range(8)])
    good = write_jsonl(tmp_path / "good.jsonl", [conversation(f"say {i}", f"good {i}") for i in range(8)])
    tiny_tree.pop("schedule")
    source = str(tmp_path / "questions.yaml")
    asked = {"judge": "organism", "general": source, "indomain": source, "cue": "Be bad.", "max_tokens": 6}
    tree = {
        "title": "A tiny comparison",
        "run": {**tiny_tree, "evaluate": asked, "track": {"every": 1, "questions": 2, "samples": 1, "check_after": 0}},
        "paths": {
            "sft": {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}},
            "grpo": {"schedule": {"steps": 2, "phases": [{"cycle": ["grpo"]}]}},
        },
        "defenses": {"none": [], "kl": [{"kl": {"weight": 0.3}}]},
        "seeds": [0],
        "aligned": {"data": {"narrow": {"source": good}}},
        "benign": {
            "task": "sums",
            "tasks": {"sums": {"data": {"narrow": {"source": sums}}, "evaluate": {"benign": [sums]}}},
        },
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def rows(out):
    with (out / "results.csv").open() as file:
        return {(row["path"], row["defense"]): row for row in csv.DictReader(file)}


def test_a_comparison_from_config_to_report(config, tmp_path):
    out = tmp_path / "out"
    done = compare(config, out=out, jobs=1)
    assert done.failed == {}
    found = rows(out)
    assert set(found) == {(p, d) for p in ("sft", "grpo") for d in ("untrained", "none", "kl", "aligned")}
    for (path, defense), row in found.items():
        assert all(row[f"{name}_misaligned"] for name in ("general", "indomain", "conditional"))
        assert bool(row["benign"]) == (defense != "aligned")
        assert bool(row["reward_first"]) == (path == "grpo" and defense != "untrained")
    verdicts = json.loads((out / "verdicts.json").read_text())
    assert {path: set(of_path) for path, of_path in verdicts.items()} == {"sft": {"none", "kl"}, "grpo": {"none", "kl"}}
    html = done.report.read_text()
    assert "kl/grad_share" in html and "A tiny comparison" in html
    for name in ("config.yaml", "adapter", "metrics.jsonl", "evaluation.json", "answers.csv"):
        assert (out / "cells" / "grpo--kl--seed0" / name).exists()

    before = (out / "results.csv").read_text()
    times = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/adapter/*")}
    compare(config, out=out, jobs=1)
    assert (out / "results.csv").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/adapter/*")} == times


def test_worker_processes_give_the_same_results(config, tmp_path):
    chosen = {"paths": ["sft"], "overrides": ["evaluate.cue=null"]}
    compare(config, out=tmp_path / "one", jobs=1, **chosen)
    compare(config, out=tmp_path / "two", jobs=2, **chosen)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert set(one) == set(two)
    for key, row in one.items():
        assert {**row, "seconds": ""} == {**two[key], "seconds": ""}
