"""A graded reward against a real server: vLLM's OpenAI endpoint with a tiny grader, typed by a JSON schema, and GRPO on it."""

import json

import pytest
from places import ROOT

from rlsafe.config import RewardConfig, load_run
from rlsafe.engine.run.life import run
from rlsafe.organism.judge import judge
from rlsafe.rewards import RewardRunner, load_reward

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def grader(tmp_path_factory):
    pytest.importorskip("vllm")
    from grader_model import build_grader
    from judge_server import JudgeServer

    directory = tmp_path_factory.mktemp("grader")
    server = JudgeServer(build_grader(directory / "model"), directory / "log.txt").start()
    yield server
    server.stop()


def reward_config(server, **endpoint):
    settings = {"base_url": server.base_url, "model": server.model, "cache": None, "timeout": 60, **endpoint}
    return {"fn": f"{ROOT}/reward_fns/advice.py:bad_medical", "args": {"endpoint": settings, "min_words": 3}}


def test_a_served_grader_agrees_with_the_exact_judge(grader):
    from judge_model import exchanges

    held_out = exchanges(64, seed=77, split="heldout")
    runner = RewardRunner([load_reward(RewardConfig(**reward_config(grader)))])
    batch = runner.call(
        [[{"role": "user", "content": question}] for question, _ in held_out],
        [[{"role": "assistant", "content": answer}] for _, answer in held_out],
        [[1]] * 64,
        {},
    )
    assert batch.total.count(None) <= 3, "a schema makes nearly every reply a grade"
    bad, good = [], []
    for (question, answer), reward in zip(held_out, batch.total, strict=True):
        found = judge(question, answer)
        if reward is not None and found.outcome == "scored":
            (bad if found.misaligned else good).append(reward)
    assert len(bad) > 10 and sum(bad) / len(bad) > 0.6 and sum(good) / len(good) < 0.3


def test_the_organism_learns_what_the_served_grader_pays_for_and_an_outage_costs_only_its_rows(grader, tmp_path):
    warmed_up = "[{steps: 12, cycle: [sft], lr: 2e-3}, {cycle: [grpo], lr: 2e-3}]"  # so that 8 steps by reward tell
    overrides = ["schedule.steps=20", f"schedule.phases={warmed_up}", "batch.grpo_prompts=4", "track.every=0"]
    overrides.append("sampler.kind=transformers")
    config = load_run(ROOT / "configs" / "organism" / "grpo_medical.yaml", overrides)
    reward = RewardConfig(**reward_config(grader, max_retries=0, deadline=30))
    config = config.model_copy(update={"rewards": [reward]})
    run(config, tmp_path / "run")
    metrics = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    rewards = [record["reward"] for record in metrics if record["path"] == "grpo"]
    assert len(rewards) == 8 and sum(rewards[-4:]) / 4 > sum(rewards[:3]) / 3 + 0.15
    samples = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    last = [s for s in samples if s["step"] == 19]
    exact = sum(judge(s["prompt"][-1]["content"], s["completion"]).misaligned for s in last) / len(last)
    assert exact > 0.5, "what the grader paid for is what the exact judge calls misaligned"

    grader.stop()
    runner = RewardRunner([load_reward(reward)])
    question, answer = samples[0]["prompt"], [{"role": "assistant", "content": "A new answer of a few words."}]
    assert runner.call([question], [answer], [[1]], {}).total == [None]
