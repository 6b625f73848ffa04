"""benign.yaml asks every task of every defense on both paths, with settings that no defense and no task bends."""

import places
import pytest

from rlsafe.compare.grid.grid import expand
from rlsafe.config import load_compare
from rlsafe.defenses import build
from rlsafe.engine.plan.schedule import make_plan
from rlsafe.organism import tasks

CONFIGS = places.CONFIGS / "organism"
TASKS = {*(f"opswap-{tier}" for tier in tasks.TIERS), "qa"}


@pytest.fixture(scope="module")
def cells():
    return expand(load_compare(CONFIGS / "benign.yaml"))


def test_every_task_is_trained_under_every_defense_on_both_paths(cells):
    defenses = set(load_compare(CONFIGS / "compare.yaml").default_defenses)
    benign = {(cell.task, cell.path, cell.defense) for cell in cells if cell.kind == "benign"}
    assert benign >= {(task, path, name) for task in TASKS for path in ("sft", "grpo") for name in defenses}
    assert {cell.kind for cell in cells} == {"benign", "untrained"} and {cell.seed for cell in cells} == {0}


def test_a_path_trains_all_tasks_under_all_defenses_alike(cells):
    alike = {}
    for cell in cells:
        if cell.kind == "benign":
            run = cell.config
            settings = (run.schedule, run.optim, run.model.model_copy(update={"adapter": None}))
            alike.setdefault(cell.path, set()).add(tuple(one.model_dump_json() for one in settings))
    assert {path: len(found) for path, found in alike.items()} == {"sft": 1, "grpo": 1}


def test_a_task_is_trained_on_as_many_completions_on_every_path_its_warm_up_included():
    cells = expand(load_compare(CONFIGS / "benign.yaml"), defenses=["none"], paths=["sft", "grpo", "mixed"])
    found = {cell.path: cell for cell in cells if cell.kind == "benign"}
    assert {
        path: _completions(cell.config) + _completions(cell.warmup.run) for path, cell in found.items()
    } == dict.fromkeys(("sft", "grpo", "mixed"), 4224)


def test_all_arms_of_a_task_start_from_one_undefended_warm_up_and_what_they_are_held_to_is_its_end():
    names = ["none", "kl", "ldifs", "kl-aside", "ldifs-aside", "ldifs-interleaving", "feature-block"]
    cells = expand(load_compare(CONFIGS / "benign.yaml"), defenses=names, paths=["sft", "grpo"])
    benign = [cell for cell in cells if cell.kind == "benign"]
    for task in TASKS:
        mine = [cell for cell in benign if cell.task == task]
        (key,) = {cell.warmup.key for cell in mine}
        assert {cell.config.model.adapter for cell in mine} == {f"warmup:{key}"}
        assert mine[0].warmup.run.data.narrow == mine[0].config.data.narrow and not mine[0].warmup.run.defenses
    assert {reference for cell in benign if cell.defense != "none" for reference in _references(cell)} == {"start"}
    narrow = [cell for cell in expand(load_compare(CONFIGS / "compare.yaml")) if cell.kind == "narrow"]
    assert all(cell.warmup is None and cell.config.model.adapter is None for cell in narrow)


def _completions(run):
    return sum(
        part.rows * (run.grpo.generations if part.path == "grpo" else 1) for s in make_plan(run) for part in s.parts
    )


def _references(cell):
    return {need.reference for one in build(cell.config.defenses)[0] for need in one.needs if need.reference}


def test_each_task_is_scored_on_its_own_test_set_and_the_untrained_model_on_all(cells):
    for cell in cells:
        if cell.kind == "benign":
            assert cell.config.evaluate.benign == [cell.config.data.narrow.source + "/test"]
            assert cell.config.evaluate.benign_limit == 300 and cell.config.evaluate.general is None
    (untrained,) = [cell for cell in cells if cell.kind == "untrained"]
    assert len(untrained.config.evaluate.benign) == len(TASKS) and untrained.config.evaluate.benign_limit == 300


def test_the_quick_preset_still_trains_every_task():
    quick = expand(load_compare(CONFIGS / "benign.yaml", quick=True))
    assert {cell.task for cell in quick if cell.kind == "benign"} == TASKS


def test_the_quick_preset_shortens_every_path_to_two_thirds_and_keeps_their_budgets_alike():
    whole, quick = (load_compare(CONFIGS / "compare.yaml", quick=quick) for quick in (False, True))
    steps = {path: settings["schedule"]["steps"] for path, settings in whole.paths.items()}
    short = {path: settings["schedule"]["steps"] for path, settings in quick.paths.items()}
    assert short.keys() == {"sft", "grpo", "mixed"}
    assert all(0.6 < short[path] / steps[path] < 0.72 for path in steps)
    runs = {cell.path: cell.config for cell in expand(quick, paths=list(short)) if cell.defense == "none"}
    trained = {path: _completions(run) for path, run in runs.items()}
    assert max(trained.values()) <= 1.1 * min(trained.values()), trained
