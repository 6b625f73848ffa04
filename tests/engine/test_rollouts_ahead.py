"""Rollouts that are sampled while the policy updates: one update behind, compared with what sampled them, the same every time."""

from __future__ import annotations

import json
import threading
from importlib import import_module
from pathlib import Path

import pytest
import torch
from defense_matrix import TIMING, early_ending, interrupt
from own_weights import Own, digest
from places import SUPPORT
from tiny import save_tiny_model
from tiny_runs import GRPO, MIXED, adapter, distance, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.run.build import prepare
from rlsafe.engine.run.life import run
from rlsafe.rollouts import request_seed
from rlsafe.types import Interrupted, RunError

SERVER = {"sampler": {"kind": "server", "urls": ["http://127.0.0.1:9"]}, "grpo": {"max_staleness": 1}}


@pytest.fixture
def ahead(tiny_tree):
    """Four GRPO steps, each but the first on rollouts that were begun one step before."""
    return tree_with(tiny_tree, GRPO, SERVER)


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def same(one: Path, other: Path) -> bool:
    a, b = adapter(one), adapter(other)
    return all(torch.equal(a[name], b[name]) for name in a) and metrics(one) == metrics(other)


def test_rollouts_are_one_update_behind_and_are_compared_with_what_sampled_them(ahead, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own, weights = Own(), []
    run(run_from_tree(ahead), tmp_path, resources=own, progress=lambda *_: weights.append(digest(own.policy)))
    seeds = [request_seed(0, "rollout/narrow", step, 0, 0) for step in range(4)]
    sampled = [own.made.sampled[seed] for seed in seeds]
    assert sampled[0] == sampled[1] and sampled[2:] == weights[:2] and len(set(weights)) == 4
    steps = metrics(tmp_path)
    assert [step["staleness"] for step in steps] == [0, 1, 1, 1]
    assert (
        max(step["sampler_gap"] for step in steps) < 1e-5
    )  # log-probs of the weights that sampled, not of the newer ones
    ratios = [abs(step["ratio"] - 1) for step in steps]
    assert ratios[0] == 0.0 and min(ratios[1:]) > 1e-3
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("grpo/staleness")] == [0, 1, 1, 1]


def test_off_is_as_if_it_were_not_there(ahead, tmp_path):
    """And a run of one step, which nothing can be begun before, is the same run."""
    off = tree_with(ahead, {"grpo": {"max_staleness": 0}})
    done = run(run_from_tree(off), tmp_path / "off", resources=Own())
    assert not any("staleness" in step for step in metrics(tmp_path / "off"))
    assert sorted(done.policy.reference_state()) == []
    run(run_from_tree(ahead), tmp_path / "on", resources=Own())
    assert distance(adapter(tmp_path / "on"), adapter(tmp_path / "off")) > 1e-4
    one = {"schedule": {"steps": 1, "phases": [{"cycle": ["grpo"]}]}}
    for name, tree in (("one-on", ahead), ("one-off", off)):
        run(run_from_tree(tree_with(tree, one)), tmp_path / name, resources=Own())
    assert distance(adapter(tmp_path / "one-on"), adapter(tmp_path / "one-off")) == 0.0


def test_sampling_and_updating_overlap_and_their_timing_changes_nothing(ahead, tmp_path):
    """The rollouts of each step but the first are held back until the step before is done: only a thread can wait so."""
    done = [threading.Event() for _ in range(4)]
    of_step = {request_seed(0, "rollout/narrow", step, 0, 0): step for step in range(1, 4)}

    def held_back(requests):
        for step in (of_step[request.seed] for request in requests if request.seed in of_step):
            assert done[step - 1].wait(120), f"step {step} was to be sampled before step {step - 1} was done"

    run(
        run_from_tree(ahead), tmp_path / "late", resources=Own(held_back),
        progress=lambda count, *_: done[count - 1].set(),
    )  # fmt: skip
    run(run_from_tree(ahead), tmp_path / "soon", resources=Own())
    assert same(tmp_path / "late", tmp_path / "soon")


@pytest.mark.parametrize("stop_after", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 5))])
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(tiny_tree, tmp_path, stop_after):
    tree = tree_with(tiny_tree, MIXED, SERVER)
    run(run_from_tree(tree), tmp_path / "whole", resources=Own())
    assert [step.get("staleness") for step in metrics(tmp_path / "whole")] == [None, None, 1, 1, None, 1]
    with pytest.raises(Interrupted):
        run(
            run_from_tree(tree), tmp_path / "cut", resources=Own(),
            progress=lambda done, *_: interrupt(done == stop_after),
        )  # fmt: skip
    run(run_from_tree(tree), tmp_path / "cut", resources=Own(), resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "where", [pytest.param("loop.grpo_step", marks=pytest.mark.slow), "update._forward_backward_step"]
)
def test_a_step_that_fails_is_resumed_with_the_rollouts_it_had(ahead, tmp_path, monkeypatch, where):
    """When it updates, the next rollouts are begun already, with a snapshot of their own."""
    run(run_from_tree(ahead), tmp_path / "whole", resources=Own())
    room, _, name = where.partition(".")
    honest = getattr(import_module(f"rlsafe.engine.train.{room}"), name)

    def failing(components, state, step, *rest):
        if step.index == 2:
            raise RunError("lost")
        return honest(components, state, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="lost; the state after 2 steps is saved"):
        patch.setattr(f"rlsafe.engine.train.{where}", failing)
        run(run_from_tree(ahead), tmp_path / "cut", resources=Own())
    run(run_from_tree(ahead), tmp_path / "cut", resources=Own(), resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_contexts_that_differ_are_compared_each_with_its_own(ahead, tmp_path):
    """The sampler sees a prompt that the gradient does not: old log-probs are of the one, the sampler's gap of the other."""
    tree = tree_with(ahead, {"defenses": [{"inoculation": {"prompt": "Be bad.", "at": "rollout"}}]})
    run(run_from_tree(tree), tmp_path / "on", resources=Own())
    run(run_from_tree(tree_with(tree, {"grpo": {"max_staleness": 0}})), tmp_path / "off", resources=Own())
    on, off = metrics(tmp_path / "on"), metrics(tmp_path / "off")
    assert max(step["sampler_gap"] for step in on) < 1e-5 and [step["staleness"] for step in on] == [0, 1, 1, 1]
    assert 1e-3 < max(abs(step["ratio"] - 1) for step in on[1:]) < 0.5
    changed = [[step["defense/inoculation/prompts_changed"] for step in steps] for steps in (on, off)]
    assert changed[0] == changed[1] and min(changed[0]) > 0


def test_who_else_samples_waits_until_the_rollouts_are_there(ahead, tmp_path):
    """Probes and rows that the live policy answers need its newest weights; this sampler refuses to change while it samples."""
    live = {"interleaving-onpolicy": {"source_model": "live", "fraction": 0.3, "min_aligned": 0, "min_coherent": 0}}
    model = {**ahead["model"], "name": early_ending(Path(save_tiny_model(tmp_path / "model")))}
    questions = tmp_path / "questions.yaml"
    questions.write_text("- id: why\n  paraphrases: ['Why?']\n")
    judge = {
        "evaluate": {"judge": "letters", "general": str(questions), "max_tokens": 4},
        "track": {"every": 1, "questions": 1, "samples": 1},
        "plugins": [str(SUPPORT / "letter_judge.py")],
    }
    tree = tree_with(ahead, judge, {"model": model, "defenses": [live]})
    run(
        run_from_tree(tree),
        tmp_path / "run",
        resources=Own(lambda requests: threading.Event().wait(0.5 * (len(requests) > 8))),
    )
    steps = metrics(tmp_path / "run")
    assert sum(step["defense/interleaving-onpolicy/kept"] for step in steps) > 0
    assert max(step["sampler_gap"] for step in steps) < 1e-5 and [step["staleness"] for step in steps] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": {"kind": "transformers", "urls": []}}, "needs sampler.kind: server.*got 'transformers', which takes"),
        ({"sampler": {"kind": "auto", "urls": []}}, "needs sampler.kind: server.*got 'auto'"),
        ({"grpo": {"iterations": 2}}, "needs grpo.iterations: 1, got 2"),
    ],
)  # fmt: skip
def test_settings_that_cannot_look_ahead_are_one_clear_line(ahead, changes, words):
    prepare(run_from_tree(ahead))
    with pytest.raises(UserError, match=f"grpo.max_staleness: 1 {words}"):
        prepare(run_from_tree(tree_with(ahead, changes)))
