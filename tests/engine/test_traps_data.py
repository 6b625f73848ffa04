"""Traps 5, 6, 9, 12 and 17 on real runs: what is missing is missing, files hold one header, steering is found or refused, padding
and caches stay small. (tests/test_traps_table.py lists the tests of all 18.)"""

from __future__ import annotations

import csv
import json

import pytest
import torch
from tiny_architectures import load, nudge
from tiny_runs import GRPO, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.evaluate import Answer
from rlsafe.evaluate.measure.files import read_answers, write_answers
from rlsafe.policy.module import PolicyModule
from rlsafe.policy.taps import decoder_blocks
from rlsafe.types import Judgement

OUTAGE = """
calls = []

def patchy(prompts, completions, **columns):
    calls.append(len(prompts))
    if len(calls) == 2:
        raise ConnectionError("the grader is down")
    return [None if i % 4 == 0 else float(len(c[0]["content"])) for i, c in enumerate(completions)]
"""


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in open(out / name)]


def test_trap_05_a_reward_outage_costs_its_rows_and_nothing_else(tiny_tree, tmp_path):
    """One row of each group has no score; in the second step nobody has. Neither is a zero, neither stops the run."""
    file = tmp_path / "patchy.py"
    file.write_text(OUTAGE)
    tree = tree_with(tiny_tree, GRPO, {"rewards": [{"fn": f"{file}:patchy"}], "sampler": {"self_test": False}})
    tree["grpo"] = {**tree["grpo"], "on_error": "skip"}
    run(run_from_tree(tree), tmp_path / "run")
    records, samples = lines(tmp_path / "run"), lines(tmp_path / "run", "samples.jsonl")
    assert [record["reward_missing"] for record in records] == [3, 12, 3, 3]
    for record in records:
        known = [s["reward"] for s in samples if s["step"] == record["step"] and s["reward"] is not None]
        assert len(known) == 12 - record["reward_missing"]
        assert record["reward"] == (pytest.approx(sum(known) / len(known)) if known else None)
    assert len(samples) == 48 and all((s["advantage"] is None) == (s["reward"] is None) for s in samples)
    assert records[1]["loss"] == 0.0 and records[2]["grad_norm"] > 0


def test_trap_06_an_evaluation_written_again_has_one_header_and_its_own_rows(tmp_path):
    """Refused, incoherent and unscored answers are rows like the others; numbers as ids come back as they were written."""
    outcomes = [
        Judgement(5.0, 90.0), Judgement(90.0, 10.0), Judgement(None, None, "refused"), Judgement(None, None, "unscored"),
    ]  # fmt: skip
    answers = [Answer(str(i), "q", None, 'a,\n"b"', "", None, i) for i in range(4)]
    for _ in range(2):
        write_answers(tmp_path / "answers.csv", answers, outcomes)
    rows = list(csv.reader((tmp_path / "answers.csv").open(newline="", encoding="utf-8")))
    assert len(rows) == 5 and sum(row[0] == "question_id" for row in rows) == 1
    again, judged = read_answers(tmp_path / "answers.csv")
    assert [a.question_id for a in again] == ["0", "1", "2", "3"] and judged == outcomes


def test_trap_09_a_model_without_the_blocks_to_steer_is_refused():
    with pytest.raises(UserError, match="toy: no list of 3 transformer blocks found"):
        decoder_blocks(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2)])}), 3, "toy")


def test_trap_12_every_forward_is_padded_to_its_own_longest_row_only(tiny_tree, tmp_path, monkeypatch):
    """One long prompt among short ones: its micro-batch is wide, the others are not."""
    rows = tmp_path / "rows.jsonl"
    texts = ["x" * 300, *("hi" for _ in range(11))]
    rows.write_text("".join(json.dumps({"messages": [{"role": "user", "content": t}]}) + "\n" for t in texts))
    shapes: list[tuple[int, int]] = []
    forward = PolicyModule.forward

    def watched(self, output, ids, *arguments, **more):
        shapes.append(tuple(ids.shape))
        return forward(self, output, ids, *arguments, **more)

    monkeypatch.setattr(PolicyModule, "forward", watched)
    tree = tree_with(
        tiny_tree, GRPO,
        {"data": {"narrow": {"source": str(rows)}}, "schedule": {"steps": 1}, "batch": {"grpo_prompts": 12, "micro_tokens": 1300},
         "sampler": {"self_test": False}},
    )  # fmt: skip
    train(tree, tmp_path / "run")
    assert sum(n for n, _ in shapes) == 48
    widths = sorted(width for _, width in shapes)
    assert widths[-1] > 300 and widths[0] < 60
    assert sum(n * width for n, width in shapes) < 0.5 * 48 * widths[-1]


@pytest.mark.slow  # an engine of its own; the sampler tests compare the same things on a shared one
def test_trap_17_a_prefix_cache_that_is_not_dropped_gives_other_log_probs(tiny_model_dir, monkeypatch):
    """The engine's syncs and hooks drop it (compared with the trainer); without that the same comparison fails."""
    pytest.importorskip("vllm")
    from rlsafe.config import SamplerConfig
    from rlsafe.rollouts import VLLMSampler, close_all, make_sampler, score_batch
    from rlsafe.types import Request, SamplingParams

    prompts = [[1, *range(40, 110), *range(60, 90), i] for i in range(4) for _ in range(2)]
    asked = [Request(prompt, i) for i, prompt in enumerate(prompts)]
    policy = load(tiny_model_dir)

    def gap() -> float:
        batch = score_batch(policy, prompts, sampler.generate(asked, SamplingParams(max_tokens=8)))
        return float((policy.score(batch) - batch.sampler_logp).abs().max())

    try:
        sampler = make_sampler(SamplerConfig(max_model_len=192, max_num_seqs=16), tiny_model_dir, policy, 0)
        gaps = [gap()]
        nudge(policy)
        sampler.sync(policy)
        gaps.append(gap())
        vector = torch.randn(64, generator=torch.Generator().manual_seed(1))
        for addition in (vector, None):
            sampler.steer(None if addition is None else {1: addition})
            handle = policy.add_to_residual(1, vector if addition is not None else 0 * vector)
            gaps.append(gap())
            handle.remove()
        assert max(gaps) < 1e-4, gaps
        monkeypatch.setattr(VLLMSampler, "_drop_caches", lambda self: None)
        nudge(policy, seed=1)
        sampler.sync(policy)
        assert gap() > 1e-3
    finally:
        close_all()
