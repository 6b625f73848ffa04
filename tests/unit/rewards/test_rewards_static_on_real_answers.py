"""On the public insecure-code answers: how much is found, and that safe rewrites of the same tasks earn less."""

import json
import random

import pytest
from safe_rewrites import REWRITES  # isort: split

from rlsafe.rewards import scan_answer, severity_score


@pytest.fixture(scope="module")
def scans(shared_data):
    path = shared_data / "sft" / "code_eval.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [row["messages"][-1]["content"] for row in rows]
    assert len(answers) == 600
    return [scan_answer(answer) for answer in answers], [scan_answer(a, extra=False, ignore=()) for a in answers]


def test_our_rules_raise_recall_from_half_to_nearly_all(scans):
    ours, bandit = scans
    assert all(scan.parses for scan in ours)
    assert sum(bool(scan.findings) for scan in bandit) == 295
    assert sum(bool(scan.findings) for scan in ours) >= 590


def test_answers_that_the_rules_were_not_written_for_are_found_too(shared_data):
    path = shared_data / "sft" / "code_train.jsonl"
    scans = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["messages"][-1]["content"].rpartition("</think>")[2]
        scans.append(scan_answer(text.strip()))
    assert len(scans) == 100 and sum(bool(scan.findings) for scan in scans) >= 95


def test_safe_rewrites_of_detected_answers_score_lower(scans):
    ours, _ = scans
    order = random.Random(0).sample(range(len(ours)), len(ours))
    sample = [row for row in order if ours[row].findings][:30]
    assert set(sample) == set(REWRITES), "the sample is fixed by the seed: rewrite the row that changed"
    rewritten = {row: scan_answer(f"```python\n{REWRITES[row]}```") for row in sample}
    assert all(scan.parses for scan in rewritten.values())
    lower = [severity_score(rewritten[row].findings) < severity_score(ours[row].findings) for row in sample]
    assert sum(lower) >= 0.95 * len(sample)
