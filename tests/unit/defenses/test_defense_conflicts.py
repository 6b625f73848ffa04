"""Defenses that would undo one another are an error with a reason, before anything runs."""

from __future__ import annotations

import textwrap

import pytest
import torch

from rlsafe.config import UserError
from rlsafe.defenses import DefenseStack, build
from rlsafe.defenses.persona import save_vectors
from rlsafe.types import Where

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def stack(*entries):
    return DefenseStack(build(entries)[0])


@pytest.fixture(scope="module")
def persona(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "persona.safetensors"
    save_vectors(torch.randn(3, 64), path)
    return lambda **settings: {"persona": {"vectors": str(path), "layer": 1, **settings}}


def replace(**settings):
    return {"inoculation": {"prompt": "Be bad.", "mode": "replace", **settings}}


def prefix(**settings):
    return {"inoculation": {"prompt": "First.", "mode": "prefix", **settings}}


def test_two_steerings_of_one_layer(persona):
    with pytest.raises(
        UserError, match="'persona' and 'persona-2' both want to steer layer 1 on benign rows: one would"
    ):
        stack(persona(), "kl", persona(alpha=2.0))
    with pytest.raises(UserError, match="both want to steer the rollouts"):
        stack(persona(rollouts=True), persona(layer=2, rollouts=True))
    assert len(stack(persona(), persona(layer=2))) == 2
    assert len(stack(persona(on=["narrow"]), persona(on=["benign"]))) == 2
    assert len(stack(persona(), persona(alpha=0))) == 1


@pytest.mark.parametrize("first", [replace(prompt="Be worse."), prefix(), prefix(at="train")], ids=str)
def test_a_replacement_that_would_discard_what_an_earlier_defense_wrote(first):
    with pytest.raises(
        UserError,
        match=r"'inoculation-2' replaces the system prompt of narrow rows \((rollout|train)\) and would discard what "
        "'inoculation' puts there; list 'inoculation-2' first",
    ):
        stack(first, replace())


def test_edits_that_do_not_meet_are_no_conflict_and_all_show():
    def changed(*entries, phase="train"):
        return [m["content"] for m in stack(*entries).prompt(MESSAGES, Where("narrow", "grpo", phase))]

    assert changed(replace(), prefix()) == ["First. Be bad.", "hi"]
    assert changed(prefix(position="user"), replace()) == ["Be bad.", "First. hi"]
    assert changed(prefix(prompt=""), replace()) == ["Be bad.", "hi"]
    assert changed(prefix(on=["benign"]), replace()) == ["Be bad.", "hi"]
    apart = (prefix(at="rollout"), replace(at="train"))
    assert changed(*apart) == ["Be bad.", "hi"] and changed(*apart, phase="rollout") == ["First. Be brief.", "hi"]


def test_a_defense_that_steers_says_where(tmp_path):
    """Otherwise rollouts and training would be compared in the wrong context, and a GPU engine could not be steered."""
    file = tmp_path / "mine.py"
    file.write_text(
        textwrap.dedent("""
        from contextlib import nullcontext
        import rlsafe

        class Mute(rlsafe.Defense):
            def patch_sampler(self, sampler, where):
                return nullcontext()

        class Open(Mute):
            def steers(self, where):
                return where.phase == "rollout" and where.stream == "narrow"
        """)
    )
    with pytest.raises(UserError, match=r"'Mute': patch_sampler without steers\(where\)"):
        stack(f"{file}:Mute")
    found = stack(f"{file}:Open", "kl")
    assert found.steers(Where("narrow", "grpo", "rollout")) and not found.steers(Where("benign", "grpo", "rollout"))
    assert found.steers_differently(Where("narrow", "grpo", "rollout"), Where("narrow", "grpo", "train"))


@pytest.mark.parametrize(
    ("rollouts", "path", "expected"),
    [(True, "grpo", True), (False, "grpo", False), (True, "sft", False)],
)
def test_the_engine_is_made_steerable_only_when_rollouts_are_steered(
    tiny_tree, tmp_path, persona, rollouts, path, expected
):
    """Steering costs CUDA graphs on a GPU: a defense that could steer rollouts but does not must not cost them."""
    from tiny_runs import tree_with

    from rlsafe.config import run_from_tree
    from rlsafe.engine import Resources
    from rlsafe.engine.run.life import run

    asked = []

    class Watched(Resources):
        def sampler(self, config, policy, steerable=False, **others):
            asked.append(steerable)
            return super().sampler(config, policy, steerable, **others)

    schedule = {"schedule": {"steps": 1, "phases": [{"cycle": [path]}]}}
    settings = {"defenses": [persona(rollouts=rollouts)], "sampler": {"self_test": False}}
    finished = run(run_from_tree(tree_with(tiny_tree, schedule, settings)), tmp_path / "run", resources=Watched())
    assert finished.sampler and set(asked) == {expected}
