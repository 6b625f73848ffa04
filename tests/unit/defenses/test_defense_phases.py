"""`from_step` and `phases` of any defense: before, the run is the undefended one to the bit; from then on it acts."""

from __future__ import annotations

import json

import pytest
import torch
from defense_matrix import interrupt
from tiny_runs import GRPO, SFT, distance, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses import Defense, DefenseStack, Offer, build
from rlsafe.defenses.base import When
from rlsafe.defenses.persona import save_vectors
from rlsafe.engine.plan.schedule import make_plan
from rlsafe.engine.run.life import run
from rlsafe.engine.train.effects import EffectLog
from rlsafe.types import Interrupted, RunError

WARM = {"schedule": {"steps": 6, "phases": [{"steps": 3, "cycle": ["sft"]}, {"cycle": ["grpo"]}]}}
TIMING = {"seconds", "rollout_seconds"}


def records(out):
    read = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [
        {k: v for k, v in one.items() if k not in TIMING and not k.startswith(("defense/", "loss/pen"))} for one in read
    ]


@pytest.fixture
def entries(tmp_path, safe_file):
    save_vectors(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), tmp_path / "v.safetensors")
    return {
        "kl": {"weight": 3.0},
        "inoculation": {"prompt": "Be bad."},
        "interleaving": {"fraction": 0.5},
        "persona": {"vectors": str(tmp_path / "v.safetensors"), "layer": 1, "rollouts": True},
        "gradient-projection": {"rows": 2},
        "monitor": {"by": "reward", "reward": "vowels", "threshold": 1.05},
    }


@pytest.fixture(scope="module")
def undefended():
    """(records, adapter) of the run without defenses, once one test has made it."""
    return []


OTHERS = ("inoculation", "persona", "gradient-projection", "monitor")


@pytest.mark.parametrize(
    "name", ["kl", "interleaving", *(pytest.param(name, marks=pytest.mark.integration) for name in OTHERS)]
)
def test_a_warm_up_is_undefended_to_the_bit(tiny_tree, tmp_path, entries, name, undefended):
    tree = tree_with(tiny_tree, WARM)
    if not undefended:
        adapter = train(tree_with(tree, {"defenses": []}), tmp_path / "none")
        undefended.extend((records(tmp_path / "none"), adapter))
    plain, none = undefended
    entry = {name: entries[name] | {"phases": [1]}}
    defended = train(tree_with(tree, {"defenses": [entry]}), tmp_path / "phase")
    assert records(tmp_path / "phase")[:3] == plain[:3] and distance(none, defended) > 1e-4
    other = train(tree_with(tree, {"defenses": [{name: entries[name] | {"from_step": 3}}]}), tmp_path / "from")
    assert distance(other, defended) == 0.0
    assert "phases:" in (tmp_path / "phase" / "config.yaml").read_text()


def test_it_may_be_over_before_the_end_and_resumes(tiny_tree, tmp_path, entries):
    tree = tree_with(tiny_tree, WARM, {"defenses": [{"kl": {"weight": 3.0, "reference": "base", "phases": [0]}}]})
    whole = train(tree, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(run_from_tree(tree), tmp_path / "cut", progress=lambda done, *_: interrupt(done == 4))
    assert distance(whole, train(tree, tmp_path / "cut", resume=True)) == 0.0
    lines = [json.loads(line) for line in open(tmp_path / "whole" / "metrics.jsonl")]
    assert ["defense/kl/full" in one for one in lines] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])
def test_from_the_first_step_is_always(tiny_tree, tmp_path, path):
    always = train(tree_with(tiny_tree, path, {"defenses": ["kl"]}), tmp_path / "always")
    first = train(
        tree_with(tiny_tree, path, {"defenses": [{"kl": {"from_step": 0, "phases": [0]}}]}), tmp_path / "first"
    )
    assert distance(always, first) == 0.0


@pytest.mark.parametrize(("name", "reused"), [("kl", [1, 3]), ("persona", [2]), ("inoculation", [2])])
def test_rollouts_are_not_used_again_under_hooks_that_they_did_not_have(tiny_tree, tmp_path, entries, name, reused):
    """grpo.iterations: those of step 0 were sampled, and scored, without the defense that acts from step 1 on. KL has no part in it."""
    twice = {"grpo": {"iterations": 2}, "defenses": [{name: entries[name] | {"from_step": 1}}]}
    train(tree_with(tiny_tree, GRPO, twice), tmp_path / "run")
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [one["step"] for one in lines if one.get("rollout_reused")] == reused
    assert all(one["ratio"] == pytest.approx(1.0, abs=1e-4) for one in lines if one["step"] not in reused)


def test_rows_come_from_the_very_step_in_which_their_penalty_acts(tiny_tree):
    """Steps of their own, which another defense adds, count as steps for both."""
    own, aside = Offer(fraction=0.5, own_step=True), Offer(rows=2, aside=True, when=When(from_step=4))
    plan = make_plan(run_from_tree(tiny_tree), {"interleaving": own, "kl": aside})
    assert [step.index for step in plan if step.kind.startswith("defense/")] == [1, 3, 5, 7]
    assert [step.index for step in plan for part in step.parts if part.defense == "kl"] == [4, 6]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"early-stop": {"from_step": 2}}, "'early-stop': it looks at the whole run"),
        (
            {"safelora": {"phases": [0]}},
            "'safelora': phases: without `every` it acts at the end of the run, in phase 1",
        ),
    ],
)
def test_what_acts_at_the_end_says_so_where_it_would_never(tiny_tree, tiny_model_dir, tmp_path, entry, says):
    ((name, when),) = entry.items()
    needed = {"safelora": {"base": tiny_model_dir}, "early-stop": {"rows": tiny_tree["data"]["safe"]["source"]}}
    with pytest.raises(UserError, match=says):
        run(run_from_tree(tree_with(tiny_tree, WARM, {"defenses": [{name: needed[name] | when}]})), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"from_step": -1}, "from_step: expected a step, 0 or more, got -1"),
        ({"phases": 1}, "phases: expected a list of phases"),
        ({"phases": []}, "phases: expected a list of phases"),
        ({"phases": [2]}, "phases: 2: the schedule has 2, 0 to 1"),
        ({"from_step": 6}, "from_step: 6: acts in no step; the run has 6"),
        ({"from_steps": 1}, "unknown setting 'from_steps'"),
    ],
)
def test_what_never_acts_is_one_line(tiny_tree, tmp_path, settings, says):
    with pytest.raises(UserError, match=says):
        run(run_from_tree(tree_with(tiny_tree, WARM, {"defenses": [{"kl": settings}]})), tmp_path / "run")
    assert build(["kl"])[1] == [{"kl": build(["kl"])[1][0]["kl"]}] and "phases" not in build(["kl"])[1][0]["kl"]


# ------------------------------------------------------------------------------------------------ when they are judged

WAIT = {"steps": 40, "phases": [{"steps": 7, "cycle": ["sft"]}, {"cycle": ["grpo"]}]}
LONG = {"steps": 60, "phases": [{"steps": 20, "cycle": ["sft"]}, {"cycle": ["grpo"]}]}
RARE = {"steps": 40, "phases": [{"cycle": ["sft", "sft", "sft", "benign-sft"]}]}
EVERY = {"interleaving": {"every": 16, "fraction": 0.1}}


class Silent(Defense):
    """Its prompt hook changes nothing."""

    name = "silent"

    def prompt(self, messages, where):
        return messages


def stopped(tree, schedule, entries, waits=lambda step: False):
    """(index of the step after which a run whose penalties have no gradient stops, why); None for the end."""
    config = run_from_tree(tree_with(tree, {"schedule": schedule}))
    made = build([entry for entry in entries if entry != "silent"])[0]
    stack = DefenseStack([*made, *([Silent()] if "silent" in entries else [])])
    plan = make_plan(config, stack.offers())
    effects = EffectLog(stack, plan, 10, lambda note: None)
    place = None
    try:
        for step in plan:
            stack.begin(step.index, step.phase)
            stack.waiting = {"kl"} if waits(step) else set()
            streams = {part.stream for part in step.parts}
            on = [d.name for d in stack.penalized if not streams.isdisjoint(d.on)]
            effects.counted({f"defense/{name}": 1.0 for name in on})
            effects.step(step, {part.defense: part.rows for part in step.parts})
            place = step.index
            effects.check()
            restored = EffectLog(stack, plan, 10, lambda note: None)
            restored.load_state_dict(json.loads(json.dumps(effects.state_dict())))
            effects = restored
        place = None
        effects.check(at_end=True)
    except RunError as error:
        return place, str(error).split(";")[0]
    pytest.fail("nothing was found")


NO_GRADIENT = "defense 'kl' gave a penalty without any gradient after"


@pytest.mark.parametrize(
    ("schedule", "entries", "found"),
    [
        pytest.param(WAIT, ["kl"], (16, f"{NO_GRADIENT} 17 steps"), id="a warm-up shorter than the check"),
        pytest.param(LONG, [{"kl": {"phases": [1]}}], (29, f"{NO_GRADIENT} 10 steps"), id="a phase"),
        pytest.param(LONG, ["kl"], (29, f"{NO_GRADIENT} 30 steps"), id="both paths"),
        pytest.param(WAIT, [EVERY, {"kl": {"on": ["safe"]}}], (31, f"{NO_GRADIENT} 2 steps"), id="the last of the rare"),
        pytest.param(
            {"steps": 400}, [EVERY, {"kl": {"on": ["safe"]}}], (159, f"{NO_GRADIENT} 10 steps"), id="ten of them"
        ),
        pytest.param(RARE, [{"kl": {"on": ["benign"]}}], (39, f"{NO_GRADIENT} 10 steps"), id="a rare stream"),
        pytest.param(RARE, ["kl"], (9, f"{NO_GRADIENT} 10 steps"), id="a rare stream among others"),
        pytest.param(
            LONG, [{"kl": {"on": ["safe"]}}], (29, "defense 'kl' had no rows for its penalty after 30 steps"), id="no rows"
        ),
        pytest.param(WAIT, ["silent"], (16, "defense 'silent' had no effect through its prompt hook after 17 steps"), id="a prompt"),
    ],
)  # fmt: skip
def test_a_defense_is_judged_when_it_has_had_its_chances(tiny_tree, schedule, entries, found):
    """Not before its rows came as often as the check wants, and not only at the end where some path is short."""
    tree = tree_with(tiny_tree, {"data": {"benign": tiny_tree["data"]["narrow"]}})
    assert stopped(tree, schedule, entries) == found


def test_a_penalty_on_rows_that_come_late_is_left_in_peace(tiny_tree, tmp_path):
    """Its first rows come after more steps than the check waits for."""
    entries = [{"interleaving": {"every": 4, "fraction": 0.1}}, {"kl": {"on": ["safe"]}}]
    train(tree_with(tiny_tree, {"defenses": entries, "track": {"check_after": 2}}), tmp_path / "run")
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert ["defense/kl/full" in one for one in lines] == [False] * 3 + [True]


def test_a_penalty_whose_reference_never_comes_is_an_error(tiny_tree, tmp_path):
    waits = "defense 'kl' waited for its reference in all steps in which it was to act"
    kl = {"kl": {"reference": "grpo_start", "phases": [0]}}
    assert stopped(tiny_tree, WAIT, [kl], lambda step: step.phase == 0) == (6, waits)
    for entry, says in [
        (kl, "reference grpo_start: the first GRPO step is 3, after 2, the last step in which it acts"),
        ({"kl": {"reference": "step:4", "phases": [0]}}, "step:N with N from 0 to 2, the last step in which it acts"),
        ({"kl": {"reference": "step:9"}}, "step:N with N from 0 to 5, the last step of this run"),
    ]:
        with pytest.raises(UserError, match=says):
            run(run_from_tree(tree_with(tiny_tree, WARM, {"defenses": [entry]})), tmp_path / "run")
