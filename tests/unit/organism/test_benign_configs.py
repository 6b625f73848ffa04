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


def test_after_a_shared_warm_up_the_budget_is_the_same_and_every_reference_is_its_end():
    """Both configs: what is trained under reward, warm-up included, and the peak rates of both parts."""
    names = ["none", "kl", "ldifs", "kl-aside", "ldifs-aside", "ldifs-interleaving"]
    within, shared = (
        [c for c in expand(load_compare(CONFIGS / name), defenses=names, paths=["grpo"]) if c.kind == "benign"]
        for name in ("benign.yaml", "benign_warmup.yaml")
    )
    for one, other in zip(within, shared, strict=True):
        assert (one.task, one.defense) == (other.task, other.defense) and one.warmup is None
        first, second = one.config.schedule.phases
        warm = other.warmup.run
        assert (warm.schedule.steps, warm.batch.sft_rows) == (first.steps, one.config.batch.sft_rows)
        assert (
            warm.schedule.phases[0].lr == first.lr and warm.data.narrow == one.config.data.narrow and not warm.defenses
        )
        assert other.config.schedule.steps == one.config.schedule.steps - first.steps
        assert other.config.schedule.phases[0].lr == second.lr
        told = [
            settings for entry in other.config.defenses for kind, settings in entry.items() if kind in ("kl", "ldifs")
        ]
        assert all(settings["reference"] == "grpo_start" for settings in told) and bool(told) == (
            other.defense != "none"
        )
