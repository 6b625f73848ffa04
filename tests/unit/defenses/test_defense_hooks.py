"""The hook interface: composition, effects on both paths, strength zero, dead defenses, the user's own."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
from tiny_runs import GRPO, SFT, distance, train, tree_with

import rlsafe
from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses import DefenseStack, build
from rlsafe.engine.run.life import run
from rlsafe.types import RunError, Where

PATHS = pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])


def lines(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def test_defenses_compose_and_prompts_chain_in_order():
    defenses, _ = build([{"inoculation": {"prompt": "One."}}, {"inoculation": {"prompt": "Two."}}, "kl"])
    stack = DefenseStack(defenses)
    messages = [{"role": "user", "content": "hi"}]
    changed = stack.prompt(messages, Where("narrow", "sft", "train"))
    assert changed == [{"role": "system", "content": "Two. One."}, *messages]
    assert stack.prompt(messages, Where("safe", "sft", "train")) == messages
    assert stack.prompt(messages, Where("narrow", "sft", "eval")) == messages


def test_references_differ_after_a_warm_up(tiny_tree, tmp_path):
    """Trap 4: base is before the warm-up, grpo_start after it; the run before the first GRPO step is the same."""
    schedule = {"steps": 4, "phases": [{"steps": 2, "cycle": ["sft"]}, {"cycle": ["grpo"]}]}
    results = {}
    for reference in ("base", "start", "grpo_start", "step:2", "step:3"):
        defense = {"kl": {"weight": 3.0, "reference": reference}}
        results[reference] = train(
            tree_with(tiny_tree, {"schedule": schedule, "defenses": [defense]}), tmp_path / reference
        )
    assert distance(results["base"], results["start"]) == 0.0
    assert distance(results["grpo_start"], results["step:2"]) == 0.0
    assert distance(results["base"], results["grpo_start"]) > 1e-4
    assert distance(results["step:3"], results["step:2"]) > 1e-4


@pytest.mark.parametrize("defense", ["kl", "ldifs"])
@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("grpo_start", "reference grpo_start: the schedule has no GRPO steps"),
        ("step:4", "reference step:4: expected step:N with N from 0 to 3"),
        ("step:two", "expected step:N with N from 0 to 3"),
        ("step:01", "expected step:N with N from 0 to 3"),
        ("grpo-start", "unknown reference 'grpo-start'; did you mean 'grpo_start'"),
        ("path:nowhere", "nowhere: no such directory"),
    ],
)
def test_a_reference_that_the_run_never_has_is_an_error(tiny_tree, tmp_path, defense, reference, says):
    """Trap 4: a penalty would wait for it to the end and silently do nothing."""
    tree = tree_with(tiny_tree, {"defenses": [{defense: {"reference": reference}}]})
    with pytest.raises(UserError, match=says):
        run(run_from_tree(tree), tmp_path / "run")


# ------------------------------------------------------------------------------------------------ the user's own

OWN = """
import rlsafe

@rlsafe.defense("gentle")
class Gentle(rlsafe.Defense):
    '''Asks for gentleness and pulls answers towards higher likelihood.'''

    def __init__(self, weight: float = 0.1, words: str = "Be gentle."):
        self.weight, self.words = weight, words

    def prompt(self, messages, where):
        return [{"role": "system", "content": self.words}, *messages]

    def penalty(self, view):
        return {"surprise": (-view.logp, view.mask("answer"))}
"""

DEAD = """
import rlsafe

class Dead(rlsafe.Defense):
    def penalty(self, view):
        return {"surprise": (view.logp.detach() ** 2, view.mask("answer"))}

class Silent(rlsafe.Defense):
    def prompt(self, messages, where):
        return list(messages)

class Wrong(rlsafe.Defense):
    def penalty(self, view):
        return {"surprise": (view.logp, view.mask("all"))}
"""

CARELESS = """
import rlsafe

class Thorough(rlsafe.Defense):
    needs = {
        rlsafe.Need("divergence", "base"), rlsafe.Need("logprobs", "base"), rlsafe.Need("hidden_states", "base", layers=(1, 2))
    }

    def penalty(self, view):
        far = (view.hidden(1) - view.hidden(2, "base")).square().mean(-1)
        return {"all": (far + view.divergence() + view.logprobs() - view.logp, view.mask("answer"))}

class Kl(rlsafe.Defense):
    def penalty(self, view):
        return {"kl": (view.divergence("base"), view.mask("answer"))}

class Scores(rlsafe.Defense):
    def penalty(self, view):
        return {"scores": (view.logprobs("base") - view.logp, view.mask("answer"))}

class Features(rlsafe.Defense):
    needs = {rlsafe.Need("hidden_states", "base", layers=(1,))}

    def penalty(self, view):
        return {"far": ((view.hidden(1) - view.hidden(2, "base")).sum(-1), view.mask("answer"))}

class Mask(rlsafe.Defense):
    def penalty(self, view):
        return {"surprise": (view.logp, view.mask("answers"))}

class Crash(rlsafe.Defense):
    def prompt(self, messages, where):
        return messages + None
"""


@PATHS
def test_a_defense_from_a_file_runs_by_name_and_by_path(tiny_tree, tmp_path, path):
    file = tmp_path / "gentle.py"
    file.write_text(textwrap.dedent(OWN))
    by_path = train(tree_with(tiny_tree, path, {"defenses": [{f"{file}:Gentle": {"weight": 0.5}}]}), tmp_path / "a")
    by_name = train(
        tree_with(tiny_tree, path, {"defenses": [{"gentle": {"weight": 0.5}}], "plugins": [str(file)]}), tmp_path / "b"
    )
    assert distance(by_path, by_name) == 0.0
    last = lines(tmp_path / "a")[-1]
    assert last["defense/gentle/prompts_changed"] > 0 and last["defense/gentle/surprise"] > 0


@PATHS
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Dead", "penalty without any gradient"),
        ("Silent", "no effect through its prompt hook"),
        ("Wrong", "penalty_mask"),
    ],
)
def test_a_defense_that_does_nothing_stops_the_run_and_is_named(tiny_tree, tmp_path, path, name, message):
    """Trap 1 among them: a detached penalty has a value and no gradient."""
    file = tmp_path / "dead.py"
    file.write_text(textwrap.dedent(DEAD))
    tree = tree_with(tiny_tree, path, {"defenses": [f"{file}:{name}"], "track": {"check_after": 2}})
    with pytest.raises(RunError, match=message) as error:
        run(run_from_tree(tree), tmp_path / "run")
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Kl", r"defense 'Kl': .* add: needs = {rlsafe.Need\('divergence', 'base'\)}"),
        ("Scores", r"defense 'Scores': .* add: needs = {rlsafe.Need\('logprobs', 'base'\)}"),
        ("Features", r"defense 'Features': .* add: needs = {rlsafe.Need\('hidden_states', 'base', layers=\(2,\)\)}"),
        ("Mask", "defense 'Mask': unknown mask 'answers'; did you mean 'answer'"),
    ],
)
@pytest.mark.parametrize("company", [[], ["Thorough"]])
def test_a_penalty_that_reads_what_it_does_not_declare_is_told_what_to_add(tiny_tree, tmp_path, name, says, company):
    """Also when another defense declares the same: it would run by accident, and fail alone."""
    file = tmp_path / "careless.py"
    file.write_text(textwrap.dedent(CARELESS))
    with pytest.raises(UserError, match=says):
        defenses = [f"{file}:{one}" for one in [*company, name]]
        run(run_from_tree(tree_with(tiny_tree, {"defenses": defenses})), tmp_path / "run")


def test_an_error_inside_a_defense_says_whose_it_is(tiny_tree, tmp_path):
    file = tmp_path / "careless.py"
    file.write_text(textwrap.dedent(CARELESS))
    with pytest.raises(TypeError) as error:
        run(run_from_tree(tree_with(tiny_tree, {"defenses": [f"{file}:Crash"]})), tmp_path / "run")
    assert "in prompt of defense 'Crash'" in error.value.__notes__


def test_prompt_and_activation_hooks_of_ones_own_leave_safe_rows_alone(tmp_path):
    """`streams` is asked for every hook that changes what the model reads or computes, whoever wrote the defense."""
    file = tmp_path / "gentle.py"
    file.write_text(
        textwrap.dedent(OWN)
        + textwrap.dedent(
            """
            from contextlib import contextmanager
            ENTERED = []

            class Steering(rlsafe.Defense):
                def steers(self, where):
                    return True

                @contextmanager
                def activations(self, policy, where):
                    ENTERED.append(where.stream)
                    yield

                @contextmanager
                def patch_sampler(self, sampler, where):
                    ENTERED.append(where.stream)
                    yield

            class Everywhere(Steering):
                streams = ("narrow", "safe")
            """
        )
    )
    (gentle, steering), _ = build([f"{file}:Gentle", f"{file}:Steering"])
    stack, messages = DefenseStack([gentle, steering]), [{"role": "user", "content": "hi"}]
    narrow, safe = Where("narrow", "sft", "train"), Where("safe", "sft", "train")
    assert stack.prompt(messages, safe) == messages != stack.prompt(messages, narrow)
    assert stack.steers(narrow) and not stack.steers(safe) and stack.steers_differently(narrow, safe)
    for where in (narrow, safe):
        with stack.activations(None, where), stack.patched(None, where):
            pass
    entered = sys.modules[type(steering).__module__].ENTERED
    assert entered == ["narrow", "narrow"]
    everywhere = DefenseStack(build([f"{file}:Everywhere"])[0])
    assert everywhere.steers(safe) and not everywhere.steers_differently(narrow, safe)


def test_settings_of_a_defense_are_checked_and_written_out(tiny_tree, tmp_path):
    train(tree_with(tiny_tree, {"defenses": ["kl"]}), tmp_path / "run")
    assert "weight: 0.1" in (tmp_path / "run" / "config.yaml").read_text()
    for entry, message in [
        ("klx", "did you mean 'kl'"),
        ({"kl": {"wieght": 1}}, "did you mean 'weight'"),
        ({"kl": {"weight": -1}}, "weight"),
        ({"kl": {"weight": "much"}}, "weight"),
        ({"kl": {"mask": "every"}}, "mask"),
        ({"kl": 3}, "must be a mapping"),
        ({"inoculation": {}}, "'prompt' is required"),
        ("nowhere.py:X", "no such Python file"),
        ("rlsafe.nowhere:X", "no module"),
    ]:
        with pytest.raises(UserError, match=message):
            build([entry])


def test_a_subclass_has_the_settings_of_its_base_class_too(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        textwrap.dedent("""
        from typing import Any
        from rlsafe.defenses.interleaving import Interleaving

        class Mine(Interleaving):
            def __init__(self, extra: int = 1, every: int = 3, **interleaving: Any):
                super().__init__(every=every, **interleaving)
                self.extra = extra
        """)
    )
    (made,), (resolved,) = build([{f"{file}:Mine": {"extra": 2, "fraction": 0.5}}])
    assert (made.extra, made.fraction, made.weight, made.every) == (2, 0.5, 1.0, 3)
    settings = {"extra": 2, "every": 3, "fraction": 0.5, "weight": 1.0, "own_step": False, "source": None}
    settings |= {"dose": "published", "target_share": None}
    assert next(iter(resolved.values())) == settings
    for given, message in [
        ({"fraction": 2}, "fraction: .*less than or equal to 1"),
        ({"wait": 1}, "did you mean 'weight'"),
    ]:
        with pytest.raises(UserError, match=message):
            build([{f"{file}:Mine": given}])


def test_public_names_are_the_classes_that_configs_use():
    from rlsafe.defenses import find

    assert issubclass(find("kl"), rlsafe.Defense) and rlsafe.defense is not None
