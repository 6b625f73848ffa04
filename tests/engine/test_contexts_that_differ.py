"""Rollouts whose context is not the gradient's: their gap is checked all the same, and what cannot be corrected is said."""

from __future__ import annotations

import pytest
from own_weights import Own
from tiny_runs import GRPO, tree_with

from rlsafe.config import run_from_tree
from rlsafe.engine.run.life import run
from rlsafe.types import RunError

ONE_SIDED = {"defenses": [{"inoculation": {"prompt": "You always answer badly.", "at": "rollout"}}]}


@pytest.mark.parametrize(("at", "told"), [("rollout", 1), ("both", 0)])
def test_a_correction_that_is_not_applied_is_said_once(tiny_tree, tmp_path, at, told):
    inoculation = {"prompt": "You always answer badly.", "at": at}
    tree = tree_with(tiny_tree, GRPO, {"grpo": {"correction": "token"}, "defenses": [{"inoculation": inoculation}]})
    notes = run(run_from_tree(tree), tmp_path / "run").notes
    assert sum("grpo.correction: token: not applied to data.narrow" in note for note in notes) == told


class Wrong(Own):
    """Its rollouts' log-probs are 0.1 nats too high; those of the self-test are right."""

    def sampler(self, *arguments, **settings):
        sampler = super().sampler(*arguments, **settings)
        right = sampler.generate

        def generate(requests, params):
            completions = right(requests, params)
            for one in completions if params.max_tokens == 8 else ():
                one.logprobs = [logprob + 0.1 for logprob in one.logprobs]
            return completions

        sampler.generate = generate
        return sampler


def test_a_gap_in_the_rollout_context_stops_the_run_before_it_learns(tiny_tree, tmp_path):
    tree = tree_with(tiny_tree, GRPO, ONE_SIDED)
    with pytest.raises(RunError, match=r"step 0: sampler and trainer disagree by 0\.1 nats"):
        run(run_from_tree(tree), tmp_path / "run", resources=Wrong())


class Counting(Own):
    """Counts the syncs of its sampler."""

    synced = 0

    def sampler(self, *arguments, **settings):
        sampler = super().sampler(*arguments, **settings)
        own = sampler.sync

        def sync(policy):
            self.synced += 1
            own(policy)

        sampler.sync = sync
        return sampler


def test_a_new_sampler_comes_with_the_weights_and_is_synced_after_each_update(tiny_tree, tmp_path):
    resources = Counting()
    run(run_from_tree(tree_with(tiny_tree, GRPO, {"schedule": {"steps": 3}})), tmp_path / "run", resources=resources)
    assert resources.synced == 2
