"""A comparison's shared warm-up: one run, from which every arm of every path starts, and whose hash is in every cell."""

from __future__ import annotations

import pytest
from synthetic_comparison import CONFIG, make

from rlsafe.compare.grid.cells import located
from rlsafe.compare.grid.grid import expand
from rlsafe.compare.grid.warmup import overrides_of
from rlsafe.compare.report.origins import warm_ups
from rlsafe.compare.report.reporting import draw_report
from rlsafe.compare.verdicts.results import load
from rlsafe.config import UserError, load_compare
from rlsafe.config.overrides import write_yaml

WARMED = CONFIG + "warmup: {schedule: {steps: 7, phases: [{cycle: [sft]}]}, optim: {lr: 1e-4}}\n"


def cells_of(tmp_path, text, *overrides, **selection):
    (tmp_path / "compare.yaml").write_text(text)
    return expand(load_compare(tmp_path / "compare.yaml", overrides), **selection)


def test_all_arms_of_all_paths_and_seeds_start_from_one_run_without_defenses(tmp_path):
    cells = cells_of(tmp_path, WARMED)
    narrow = [cell for cell in cells if cell.kind == "narrow"]
    assert {cell.path for cell in narrow} == {"sft", "grpo"} and len({cell.seed for cell in narrow}) == 3
    (key,) = {cell.warmup.key for cell in narrow}
    assert {cell.config.model.adapter for cell in narrow} == {f"warmup:{key}"}
    run = narrow[0].warmup.run
    assert (run.schedule.steps, run.optim.lr, run.defenses) == (7, 1e-4, [])
    assert not run.evaluate.wanted and run.track.every == 0
    (untrained,) = [cell for cell in cells if cell.kind == "untrained"]
    assert untrained.warmup is None and untrained.config.model.adapter is None


def test_arms_on_other_data_start_from_a_warm_up_on_their_own(tmp_path):
    cells = cells_of(tmp_path, WARMED)
    sources = {cell.kind: cell.warmup.run.data.narrow.source for cell in cells if cell.warmup}
    assert sources == {"narrow": "bad.jsonl", "aligned": "good.jsonl", "benign": "sums.jsonl"}
    assert len({cell.warmup.key for cell in cells if cell.warmup}) == 3


def test_benign_tasks_may_have_one_of_their_own_beside_that_of_the_narrow_arms_or_alone(tmp_path):
    own = "benign.warmup={schedule: {steps: 3, phases: [{cycle: [sft]}]}}"
    steps = {cell.kind: cell.warmup.run.schedule.steps for cell in cells_of(tmp_path, WARMED, own) if cell.warmup}
    assert steps == {"narrow": 7, "aligned": 7, "benign": 3}
    alone = [cell for cell in cells_of(tmp_path, CONFIG, own) if cell.warmup]
    assert {cell.kind for cell in alone} == {"benign"} and {cell.path for cell in alone} == {"sft", "grpo"}
    assert {cell.warmup.run.data.narrow.source for cell in alone} == {"sums.jsonl"}
    for setting in ("model.lora=null", "paths.grpo.model.lora.r=4"):
        with pytest.raises(UserError, match=r"benign\.warmup.*or benign=null, which leaves the benign tasks out"):
            cells_of(tmp_path, CONFIG, own, setting)
    with pytest.raises(UserError, match="each cell sets its own seed"):
        cells_of(tmp_path, CONFIG, own.replace("{schedule", "{seed: 3, schedule"))


def test_another_warm_up_makes_other_cells(tmp_path):
    once = {cell.id: cell.fingerprint for cell in cells_of(tmp_path, WARMED) if cell.warmup}
    again = {cell.id: cell.fingerprint for cell in cells_of(tmp_path, WARMED.replace("steps: 7", "steps: 8"))}
    assert all(again[name] != hash for name, hash in once.items())
    same = {cell.id: cell.fingerprint for cell in cells_of(tmp_path, WARMED)}
    assert {name: same[name] for name in once} == once


def test_a_relapse_goes_on_from_its_arm_and_the_untrained_one_from_the_warm_up(tmp_path):
    cells = [cell for cell in cells_of(tmp_path, WARMED, relapse=5, seeds=[0]) if cell.kind == "relapse"]
    starts = {cell.defense: cell.config.model.adapter.partition(":")[0] for cell in cells}
    assert starts == {"untrained": "warmup", "none": "cell", "kl": "cell"}


def test_the_report_says_which_runs_start_from_one_and_what_it_was(tmp_path):
    directory = make(tmp_path / "out", {("", "untrained"): {}, ("sft", "none"): {"general": 0.4}}, WARMED)
    cells = expand(load_compare(tmp_path / "out.yaml"))
    warmup = next(cell.warmup for cell in cells if cell.kind == "narrow")
    place = directory.out / "warmup" / warmup.key
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(write_yaml(warmup.run.model_dump(mode="json")))
    told = warm_ups(load(directory.out))
    assert told["narrow"] == "7 steps: sft at lr 0.0001" and told["benign sums"] == "its settings are not there"
    page = draw_report(directory.out).read_text()
    assert "Shared warm-up, narrow runs" in page and "without defenses, 7 steps: sft at lr 0.0001" in page


def test_where_it_lies_is_filled_in_when_the_cell_runs(tmp_path):
    cell = next(cell for cell in cells_of(tmp_path, WARMED) if cell.warmup)
    assert located(cell.config, tmp_path).model.adapter == str(tmp_path / "warmup" / cell.warmup.key / "adapter")


def test_overrides_for_the_arms_leave_it_alone():
    assert overrides_of(["schedule.steps=3", "model.lora.r=4", "evaluate={}"]) == ["model.lora.r=4"]


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("cycle: [sft]}]}, optim", "cycle: [grpo]}]}, optim", "has GRPO steps; expected supervised steps only"),
        ("{name: tiny}", "{name: tiny, lora: null}", "expected model.lora"),
        ("  grpo: {schedule", "  grpo: {model: {lora: {r: 4}}, schedule", "expected one model section for all paths"),
        ("warmup: {", "warmup: {seed: 3, ", "each cell sets its own seed"),
    ],
)
def test_one_that_arms_cannot_start_from_is_refused(tmp_path, before, after, says):
    assert before in WARMED
    with pytest.raises(UserError, match=says):
        cells_of(tmp_path, WARMED.replace(before, after))
