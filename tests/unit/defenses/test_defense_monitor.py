"""Screening and monitors: what a judge, a probe or a reward flags is dropped or penalised before advantages are taken, and counted."""

from __future__ import annotations

import json

import pytest
import torch
from defense_matrix import interrupt
from tiny_architectures import load
from tiny_runs import GRPO, SFT, distance, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses import DataContext, Rollouts
from rlsafe.defenses.monitor import Monitor, Screening
from rlsafe.defenses.persona import save_vectors
from rlsafe.engine.run.life import run
from rlsafe.losses import advantages
from rlsafe.types import Interrupted, Judgement


def rollouts(rewards, group=4, **columns):
    n = len(rewards)
    given = {
        "prompts": [[{"role": "user", "content": "hi"}]] * n,
        "answers": [f"answer {i}" for i in range(n)],
        "prompt_ids": [[1, 70, 71]] * n,
        "completion_ids": [[80 + i, 90, 2] for i in range(n)],
        "rows": [{"messages": []}] * n,
        "numbers": list(range(n)),
        "by_reward": {},
        **columns,
    }
    return Rollouts(stream="narrow", group=group, rewards=list(rewards), **given)


class Scores:
    """A judge with the given alignments; None is an answer that it does not understand."""

    name = "scores"

    def __init__(self, aligned):
        self.aligned = aligned

    def score(self, exchanges):
        self.asked = exchanges
        return [Judgement(a, 90.0, "scored" if a is not None else "unparsed") for a in self.aligned[: len(exchanges)]]


def acted(defense, given, judge=None, policy=None, step=0):
    defense.seed = 0
    defense.advantages(policy, given, DataContext(step, None, None, lambda: judge))
    return given.rewards


def test_a_judges_flags_are_penalised_and_answers_it_cannot_read_are_not():
    judge, defense = Scores([10, 29, 30, 99, None]), Monitor(penalty=2.0)
    given = rollouts([1.0, 0.0, 1.0, None, 0.5, 1.0], group=6)
    assert acted(defense, given, judge) == [-1.0, -2.0, 1.0, None, 0.5, 1.0]
    assert [one.answer for one in judge.asked] == [f"answer {i}" for i in (0, 1, 2, 4, 5)]
    assert defense.effect() == {"seen_judged": 5, "flagged": 2, "unjudged": 1} and defense.report()["flagged"] == 2
    assert given.notes["monitor/flagged"] == [True, True, False, None, False, None]


def test_dropped_completions_leave_mean_and_spread():
    """Float64 derivation: the others' advantages are those of a group without the flagged ones."""
    given = rollouts([1.0, 3.0, 0.5, 7.0], by_reward={"hack": [0.0, 1.0, 0.0, 0.0]})
    kept = acted(Screening(by="reward", reward="hack"), given)
    assert kept == [1.0, None, 0.5, 7.0]
    values, valid, _ = advantages(torch.tensor([[float("nan") if r is None else r for r in kept]], dtype=torch.float64))
    rest = torch.tensor([1.0, 0.5, 7.0], dtype=torch.float64)
    assert torch.allclose(values[0][valid[0]], (rest - rest.mean()) / (rest.std() + 1e-4))


def test_a_probe_reads_the_completions_states(tiny_model_dir, tmp_path):
    policy = load(tiny_model_dir)
    vector = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    save_vectors(vector, tmp_path / "v.safetensors")
    given = rollouts([1.0] * 4)
    model, unit = policy.core.model.eval(), (vector[1] / vector[1].norm()).double()
    expected = []
    for prompt, completion in zip(given.prompt_ids, given.completion_ids, strict=True):
        states = model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states[1][0]
        expected.append(float((states[len(prompt) :].double() @ unit).mean()))
    threshold = sorted(expected)[1] + 1e-6
    defense = Screening(by="probe", vectors=str(tmp_path / "v.safetensors"), layer=1, threshold=threshold)
    defense.unit = unit.float()
    assert defense._projections(policy, given, [0, 1, 2, 3]) == pytest.approx(expected, abs=1e-5)
    assert acted(defense, given, policy=policy) == [None if value > threshold else 1.0 for value in expected]


def test_strength_and_error_rate_are_shares_and_seeded():
    def dropped(**settings):
        given = rollouts([1.0] * 400, by_reward={"hack": [1.0] * 200 + [0.0] * 200})
        kept = acted(Screening(by="reward", reward="hack", **settings), given, step=3)
        return [reward is None for reward in kept]

    assert sum(dropped()) == 200 and dropped(share=0.5) == dropped(share=0.5)
    assert 75 < sum(dropped(share=0.5)) < 125
    wrong = sum(drop != (i < 200) for i, drop in enumerate(dropped(accuracy=0.9)))
    assert 20 < wrong < 60
    assert Screening(share=0.0).strength == 0 == Monitor(penalty=0.0).strength


HACK = "def hack(prompts, completions, **kwargs):\n    return [float('a' in c[0]['content']) for c in completions]\n"


@pytest.fixture
def hacked(tiny_tree, tmp_path):
    """A run whose reward is paid beside one that only watches."""
    (tmp_path / "hack.py").write_text(HACK)
    watch = {"fn": f"{tmp_path / 'hack.py'}:hack", "weight": 0.0}
    tree = tree_with(tiny_tree, GRPO, {"rewards": [*tiny_tree["rewards"], watch], "track": {"check_after": 2}})
    return tree_with(tree, {"grpo": {"max_tokens": 30}})


@pytest.mark.parametrize("entry", [{"monitor": {"penalty": 1.0}}, {"screening": {}}], ids=["monitor", "screening"])
def test_in_a_run_they_change_what_is_learned_and_are_written_down(hacked, tmp_path, entry):
    ((name, settings),) = entry.items()
    entry = {name: {**settings, "by": "reward", "reward": "hack"}}
    none = train(hacked, tmp_path / "none")
    defended = train(tree_with(hacked, {"defenses": [entry]}), tmp_path / "run")
    assert distance(none, defended) > 1e-4
    samples = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    flagged = [one for one in samples if one["extra"][f"{name}/flagged"]]
    assert flagged and all(one["rewards"]["hack"] == 1.0 for one in flagged)
    if name == "screening":
        assert all(one["reward"] is None and one["advantage"] is None for one in flagged)
    else:
        assert all(one["reward"] == pytest.approx(one["rewards"]["vowels"] - 1.0) for one in flagged)
    records = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert sum(record[f"defense/{name}/flagged"] for record in records) == len(flagged)


def test_a_resumed_run_is_the_uninterrupted_one(hacked, tmp_path):
    entries = [{"screening": {"by": "reward", "reward": "hack", "share": 0.5, "accuracy": 0.9}}, "kl"]
    tree = tree_with(hacked, {"defenses": entries})
    whole = train(tree, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(run_from_tree(tree), tmp_path / "cut", progress=lambda done, *_: interrupt(done == 2))
    assert distance(whole, train(tree, tmp_path / "cut", resume=True)) == 0.0
    reports = [json.loads((tmp_path / name / "run.json").read_text())["defenses"] for name in ("whole", "cut")]
    assert reports[0] == reports[1] and reports[0]["screening"]["flagged"] > 0


def test_what_it_cannot_do_is_one_line(tiny_tree, tmp_path, hacked):
    for settings, says in [
        ({"by": "probe"}, "by: probe needs vectors and layer"),
        ({"by": "reward"}, "by: reward needs reward"),
        ({"by": "reward", "reward": "hak"}, "the run has no reward 'hak'; did you mean 'hack'"),
    ]:
        with pytest.raises(UserError, match=says):
            run(
                run_from_tree(tree_with(hacked, {"defenses": [{"screening": settings}]})),
                tmp_path / "run" / says[:9],
            )
    tree = tree_with(tiny_tree, SFT, {"defenses": [{"monitor": {"by": "reward", "reward": "vowels"}}]})
    with pytest.raises(UserError, match="'monitor': acts on GRPO rollouts and the schedule has no GRPO steps"):
        run(run_from_tree(tree), tmp_path / "sft")
