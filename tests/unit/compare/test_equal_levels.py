"""Two paths at equal in-domain level: each arm is taken where it first reaches what all of them reach."""

import json
import random

import pytest
from synthetic_comparison import CONFIG, ZERO, evaluation, make

from rlsafe.compare.grid.grid import expand
from rlsafe.compare.report.reporting import draw_report
from rlsafe.compare.verdicts.levels import at_levels
from rlsafe.compare.verdicts.looks import Looks
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.tasks import judge_and_write
from rlsafe.compare.verdicts.verdicts import judge_defenses
from rlsafe.config import load_compare
from rlsafe.evaluate import Evaluation
from rlsafe.evaluate.measure.narrow import NarrowAnswer

NO_BENIGN = CONFIG.split("benign:\n")[0]
MANY = {"questions": 50, "samples": 4}
END = {  # at equal budget: sft's defense prevents .9, grpo's none
    ("sft", "none"): {"general": 0.5, "indomain": 0.9},
    ("sft", "kl"): {"general": 0.05, "indomain": 0.6},
    ("grpo", "none"): {"general": 0.5, "indomain": 0.9},
    ("grpo", "kl"): {"general": 0.5, "indomain": 0.9},
}
MIDDLE = {  # half-way, where all arms are near .6 in-domain (sft's kl only at the end)
    ("sft", "none"): {"general": 0.4, "indomain": 0.62},
    ("sft", "kl"): {"general": 0.02, "indomain": 0.3},
    ("grpo", "none"): {"general": 0.4, "indomain": 0.62},
    ("grpo", "kl"): {"general": 0.04, "indomain": 0.62},
}


def comparison(where, middle=MIDDLE, seeds=(0, 1), text=NO_BENIGN):
    directory = make(where / "out", {("", "untrained"): ZERO, **END}, text, seeds=list(seeds), **MANY)
    for cell in expand(load_compare(where / "out.yaml"), seeds=list(seeds)):
        if cell.kind == "narrow" and (rates := middle.get((cell.path, cell.defense))):
            place = directory.cell(cell.id) / "steps" / "step-000010"
            evaluation(cell, {**ZERO, **rates}, 50, 4, "x", random.Random(cell.id)).save(place)
            (place / "key.json").write_text("{}")
    return directory


def compared(directory):
    results = load(directory.out)
    return at_levels(results, judge_defenses(results))[results.models[0], "sft", "grpo"]["kl"]


def test_paths_that_differ_at_equal_budget_may_not_at_equal_level(tmp_path):
    directory = comparison(tmp_path)
    found = compared(directory)
    assert found.level == pytest.approx(0.6, abs=0.01)
    assert dict(found.steps) == {"sft/kl": 40, "sft/none": 10, "grpo/kl": 10, "grpo/none": 10}
    d = found.difference
    assert d.first == pytest.approx(1 - 0.05 / 0.4, abs=0.01) and d.second == pytest.approx(0.9, abs=0.01)
    assert d.low < d.value < d.high and abs(d.value) < 0.1
    judge_and_write(load(directory.out))
    details = json.loads((directory.out / "verdict_details.json").read_text())
    one, other = (details[a]["against_paths"][b] for a, b in (("sft", "grpo"), ("grpo", "sft")))
    assert one["prevents_em"]["kl"]["value"] == pytest.approx(0.9, abs=0.02)  # at equal budget
    level = one["prevents_em_at_equal_level"]["kl"]
    assert level["rates"].keys() == level["steps"].keys()
    assert all(
        rates["indomain"] >= found.level for rates in level["rates"].values()
    )  # at or above, and by how much is told
    assert [level["rates"][f"sft/{arm}"]["general"] for arm in ("none", "kl")] == pytest.approx([0.4, 0.05], abs=0.01)
    assert level["interval_level"] == d.level and level["level"] != d.level
    assert level["value"] == pytest.approx(d.value) == -other["prevents_em_at_equal_level"]["kl"]["value"]


def test_where_a_defense_stopped_at_a_look_the_level_is_that_of_the_seeds_and_the_error_of_that_look(tmp_path):
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
    few, many = comparison(tmp_path / "few", seeds=(0, 1, 2)), comparison(tmp_path / "many", seeds=(0, 1, 2, 3))
    Looks(list(range(10)), taken=2, stopped={"grpo kl": 0}).save(many.out)
    plain, looked = compared(few), compared(many)
    assert (looked.level, looked.steps) == (plain.level, plain.steps)
    assert (
        looked.difference.value == plain.difference.value and looked.difference.level > plain.difference.level == 0.95
    )
    assert looked.difference.low < plain.difference.low


def test_without_checkpoints_it_is_untested_and_says_how_to_have_them(tmp_path):
    found = compared(comparison(tmp_path, middle={}))
    assert found.difference is None and "rlsafe evaluate DIR --steps all" in found.to_dict()["reason"]
    assert found.to_dict()["grade"] == "untested"


@pytest.mark.parametrize("defense", ["safelora: {base: tiny}", "early-stop: {rows: good.jsonl}"])
def test_checkpoints_without_what_a_defense_does_at_the_end_are_not_compared(tmp_path, defense):
    """They are the weights of `none`: that they learn and misbehave alike says nothing about the defense."""
    found = compared(comparison(tmp_path, text=NO_BENIGN.replace("kl: {weight: 0.3}", defense)))
    name = defense.partition(":")[0]
    assert found.difference is None and found.reason.startswith(
        f"defense {name!r} may edit the weights when a run ends"
    )
    assert "the checkpoints of sft/kl are not what it would have ended with" in found.to_dict()["reason"]
    html = draw_report(tmp_path / "out").read_text()
    assert "untested: defense &#39;" in html


def test_the_report_has_the_column(tmp_path):
    html = draw_report(comparison(tmp_path, seeds=[0]).out).read_text()
    assert "prevented, at equal in-domain level" in html and "at 60.0%" in html
    (tmp_path / "without").mkdir()
    without = draw_report(comparison(tmp_path / "without", middle={}, seeds=[0]).out).read_text()
    assert "prevented, at equal in-domain level" not in without and "rlsafe evaluate DIR --steps all" in without


def test_a_level_at_which_nothing_has_emerged_is_untested(tmp_path):
    quiet = {arm: {"general": 0.0, "indomain": 0.62} for arm in MIDDLE}
    found = compared(comparison(tmp_path, {**quiet, ("sft", "kl"): {"general": 0.0, "indomain": 0.62}}))
    assert found.difference is None and "no clear emergent misalignment" in found.reason


def test_an_arm_that_is_far_past_the_level_at_its_first_checkpoint_has_learned_more_and_is_not_compared(tmp_path):
    """As where the defended run ends at 60% and the undefended one has no checkpoint before 80."""
    found = compared(comparison(tmp_path, {**MIDDLE, ("grpo", "none"): {"general": 0.4, "indomain": 0.8}}))
    assert found.difference is None and found.reason.startswith(
        "grpo/none is at 80.0% at step 10, its first checkpoint"
    )
    assert "60.0%" in found.reason and found.to_dict()["rates"]["grpo/none"]["indomain"] == pytest.approx(0.8)


def test_checkpoints_without_scored_general_answers_are_untested_and_end_no_report(tmp_path):
    unscored = {arm: {"indomain": rates["indomain"], "general": None} for arm, rates in MIDDLE.items()}
    directory = comparison(tmp_path, unscored)
    found = compared(directory)
    assert found.difference is None and "no clear emergent misalignment" in found.reason
    assert "general" not in found.rates["sft/none"] and draw_report(directory.out).is_file()


def test_a_step_that_some_seed_lacks_is_not_used(tmp_path):
    directory = comparison(tmp_path)
    [left_out] = list(directory.out.glob("cells/grpo--kl--seed1/steps/step-000010/key.json"))
    left_out.unlink()
    assert compared(directory).reason.startswith("the checkpoints of grpo/kl are not there for every seed")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge": "another"}, 'with judge "another", its finished runs with "made-up"'),
        ({"judge": "made-up", "limit": 120}, "with limit 120, its finished runs with null"),
        (
            {"judge": "made-up", "questions": {"indomain": "few.yaml"}},
            'with indomain "few.yaml", its finished runs with null',
        ),
    ],
)
def test_steps_that_were_measured_otherwise_are_not_set_beside_the_finished_runs_and_the_report_says_why(
    tmp_path, settings, said
):
    directory = comparison(tmp_path)
    for file in directory.out.glob("cells/*/steps/*/evaluation.json"):
        tree = json.loads(file.read_text())
        file.write_text(json.dumps(tree | {"settings": settings}))
    found = compared(directory)
    assert found.difference is None and f"the checkpoints of sft/kl were measured {said}" in found.reason
    page = draw_report(directory.out).read_text()
    assert (
        "prevented, at equal in-domain level" in page
        and "untested: the checkpoints of sft/kl were measured with" in page
    )


def test_checkpoints_of_one_path_alone_are_no_reason_to_hide_the_column(tmp_path):
    directory = comparison(tmp_path, {arm: rates for arm, rates in MIDDLE.items() if arm[0] == "sft"})
    assert compared(directory).reason.startswith("no checkpoints of grpo/kl were measured")
    assert "untested: no checkpoints of grpo/kl" in draw_report(directory.out).read_text()


def test_rewards_of_any_range_are_one_scale_for_all_arms_and_steps(tmp_path):
    """Half-way every arm has a mean reward of 2, in the end 4, sft's kl 2: the level is 2, and only that arm is taken at its end."""
    directory = comparison(tmp_path)
    for file in directory.out.glob("cells/*/**/evaluation.json"):
        half_way, kept = "steps" in file.parts, "sft--kl" in str(file)
        level = 0.0 if "untrained" in str(file) else (1.0 if half_way else 2.0) if kept else 2.0 if half_way else 4.0
        found = Evaluation.load(file.parent)
        rewards = [level - 0.5, level + 0.5] * 20
        found.narrow_answers = [NarrowAnswer("evaluated", i, 0, "q", "a", reward) for i, reward in enumerate(rewards)]
        found.save(file.parent)
    found = compared(directory)
    assert found.level == 2.0 and found.shown == "a mean reward of 2"
    assert dict(found.steps) == {"sft/kl": 40, "sft/none": 10, "grpo/kl": 10, "grpo/none": 10}
