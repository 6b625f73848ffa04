"""benign.yaml asks every task of every defense on both paths, with settings that no defense and no task bends."""

import places
import pytest

from rlsafe.compare.grid.grid import expand
from rlsafe.config import load_compare
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


def test_a_path_trains_all_tasks_under_all_defenses_alike_and_both_paths_on_as_many_completions(cells):
    completions = {}
    for cell in cells:
        if cell.kind == "benign":
            run = cell.config
            settings = (run.schedule.model_dump_json(), run.optim.model_dump_json(), run.model.model_dump_json())
            completions.setdefault(cell.path, set()).add(settings)
    assert all(len(alike) == 1 for alike in completions.values())
    runs = {cell.path: cell.config for cell in cells if cell.kind == "benign"}
    warm = runs["grpo"].schedule.phases[0].steps
    sft = runs["sft"].schedule.steps * runs["sft"].batch.sft_rows
    rollouts = (runs["grpo"].schedule.steps - warm) * runs["grpo"].batch.grpo_prompts * runs["grpo"].grpo.generations
    assert sft == warm * runs["grpo"].batch.sft_rows + rollouts


def test_a_task_is_trained_on_as_many_completions_on_every_path():
    cells = expand(load_compare(CONFIGS / "benign.yaml"), defenses=["none"], paths=["sft", "grpo", "mixed"])
    runs = {cell.path: cell.config for cell in cells if cell.kind == "benign"}
    trained = {
        path: sum(
            part.rows * (run.grpo.generations if part.path == "grpo" else 1) for s in make_plan(run) for part in s.parts
        )
        for path, run in runs.items()
    }
    assert trained == dict.fromkeys(("sft", "grpo", "mixed"), 4224)


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
    trained = {
        path: sum(
            part.rows * (run.grpo.generations if part.path == "grpo" else 1) for s in make_plan(run) for part in s.parts
        )
        for path, run in runs.items()
    }
    assert max(trained.values()) <= 1.1 * min(trained.values()), trained
