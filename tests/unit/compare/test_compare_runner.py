"""The runner: what is kept, what runs again, what a failure or an interrupt leaves behind. The engine is replaced by
a quick one."""

from __future__ import annotations

import csv
import functools
import json
from types import SimpleNamespace

import pytest
from synthetic_comparison import CONFIG, ZERO, evaluation, metrics

import rlsafe.engine
import rlsafe.engine.run.build
import rlsafe.engine.run.contact
import rlsafe.evaluate
from rlsafe.compare import compare, compare_decided
from rlsafe.compare import draw_report as report
from rlsafe.compare.grid.grid import expand
from rlsafe.compare.report import reporting
from rlsafe.compare.run import runner
from rlsafe.compare.verdicts.looks import Looks
from rlsafe.config import UserError, load_compare
from rlsafe.types import Interrupted, RunError

SMALL = CONFIG.split("aligned:")[0]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A comparison whose cells take no time. `lab.ran` lists the ids that were trained, `lab.trouble` maps id ->
    exception. The report's page is drawn where a test sets `lab.draws`."""
    path = tmp_path / "compare.yaml"
    path.write_text(SMALL)
    lab = SimpleNamespace(path=path, out=tmp_path / "out", ran=[], evaluated=[], trouble={}, resumed=[], draws=False)
    lab.stopped = set()  # cells that are asked to stop in their last step

    @functools.cache
    def cells_of(text):
        return {cell.id: cell for cell in expand(load_compare(path), relapse=3)}

    def cell_of(where):
        return cells_of(path.read_text())[where.name]

    def run(config, where, *, resources, progress, resume):
        lab.ran.append(where.name)
        lab.resumed += [where.name] if resume else []
        progress(1, 2, {})
        where.mkdir(parents=True, exist_ok=True)
        if (error := lab.trouble.get(where.name)) is not None:
            if isinstance(error, Interrupted):
                (where / "checkpoints" / "step-1").mkdir(parents=True)
            raise error
        import random

        lines = [json.dumps(record) for record in metrics(cell_of(where), ZERO, random.Random(0))]
        (where / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        (where / "run.json").write_text('{"status": "finished"}')
        policy, stopped = SimpleNamespace(tokenizer=None), where.name in lab.stopped
        return SimpleNamespace(sampler=None, policy=policy, config=config, seconds=0.0, stopped=stopped)

    def evaluate_run(sampler, tokenizer, config, where, judge, progress, reader=None):
        import random

        if (error := lab.trouble.get(f"evaluate {where.name}")) is not None:
            raise error
        lab.evaluated.append(where.name)
        shown = {**ZERO, "general": 0.0 if "untrained" in where.name else 0.4, "indomain": 0.8}
        evaluation(cell_of(where), shown, 6, 2, "An answer.", random.Random(0)).save(where)

    monkeypatch.setattr("rlsafe.engine.run.life.run", run)
    monkeypatch.setattr(rlsafe.evaluate, "evaluate_run", evaluate_run)
    monkeypatch.setattr(rlsafe.evaluate, "reader_of", lambda config, policy: None)
    monkeypatch.setattr(
        rlsafe.evaluate, "evaluate", lambda target, out, first: evaluate_run(None, None, None, out, None, None)
    )
    monkeypatch.setattr(rlsafe.engine.run.build, "prepare", lambda config: None)
    monkeypatch.setattr(rlsafe.engine.run.contact, "contact", lambda prepared, resources: None)
    monkeypatch.setattr(rlsafe.engine.run.build.Resources, "judge", lambda self, config: None)
    plain = reporting.draw
    monkeypatch.setattr(reporting, "draw", lambda *of: plain(*of) if lab.draws else lab.out / "report.html")
    lab.compare = lambda **more: compare(path, out=lab.out, **{"paths": ["sft"], "seeds": [0, 1], **more})
    return lab


def test_every_cell_runs_once_and_is_kept(lab):
    lab.draws = True
    done = lab.compare()
    assert lab.ran == ["untrained"] + [f"sft--{d}--seed{s}" for s in (0, 1) for d in ("none", "kl")]
    assert done.failed == {} and done.report.is_file() and done.report.name == "report.html"
    assert (lab.out / "cells" / "sft--kl--seed1" / "evaluation.json").is_file()
    lab.ran.clear()
    lab.compare()
    assert lab.ran == []


def test_a_changed_setting_runs_the_cells_it_concerns_again_and_says_so(lab, capsys):
    lab.compare()
    lab.ran.clear()
    lab.path.write_text(SMALL.replace("weight: 0.3", "weight: 0.4"))
    lab.compare()
    assert lab.ran == ["sft--kl--seed0", "sft--kl--seed1"]
    assert "settings changed (defenses.0.kl.weight)" in capsys.readouterr().err


def test_what_is_to_run_again_is_in_no_table_until_it_has(lab):
    """An interrupted second call: the cells that it did not reach have other settings than those that it did."""
    lab.compare()
    (lab.out / "looks.json").write_text(json.dumps({"seeds": [0, 1, 2, 3], "taken": 1, "stopped": {}, "judged": []}))
    lab.path.write_text(SMALL.replace("sft_rows: 16", "sft_rows: 8"))
    lab.trouble["sft--kl--seed0"] = Interrupted("Ctrl-C")
    with pytest.raises(Interrupted):
        lab.compare()
    rows = [(row["defense"], row["seed"]) for row in csv.DictReader((lab.out / "results.csv").open())]
    assert rows == [("untrained", "0"), ("none", "0")]
    assert not (lab.out / "looks.json").exists()  # nor do looks at the runs before decide anything


def test_results_of_earlier_selections_stay_as_long_as_their_settings_hold(lab):
    lab.compare(defenses=["none"])
    lab.compare(defenses=["kl"], seeds=[0])

    def labels():
        return {(row["defense"], row["seed"]) for row in csv.DictReader((lab.out / "results.csv").open())}

    assert labels() == {("untrained", "0"), ("none", "0"), ("none", "1"), ("kl", "0")}
    lab.path.write_text(SMALL.replace("sft_rows: 16", "sft_rows: 8"))
    lab.compare(defenses=["kl"], seeds=[0])
    assert labels() == {("untrained", "0"), ("kl", "0")}


def test_a_shared_warm_up_that_fails_fails_the_cells_that_start_from_it(lab, monkeypatch):
    def fails(config, where, resources, progress):
        raise RunError("loss is NaN")

    monkeypatch.setattr(runner, "train_once", fails)
    lab.path.write_text(SMALL + "warmup: {schedule: {steps: 2, phases: [{cycle: [sft]}]}}\n")
    failed = lab.compare(seeds=[0]).failed
    assert set(failed) == {"sft--none--seed0", "sft--kl--seed0"} and lab.ran == ["untrained"]
    assert set(failed.values()) == {"the shared warm-up failed: loss is NaN"}


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(lab):
    errors = [RunError("dead defense"), ValueError("shapes\n differ"), MemoryError("no room")]
    lab.trouble |= zip(["sft--none--seed0", "sft--kl--seed0", "sft--kl--seed1"], errors, strict=True)
    lab.draws = True
    done = lab.compare()
    assert list(done.failed) == list(lab.trouble) and not any("\n" in reason for reason in done.failed.values())
    assert lab.evaluated == ["untrained", "sft--none--seed1"]
    page = done.report.read_text()
    assert all(str(error).split("\n")[0] in page for error in errors)
    lab.trouble.clear()
    lab.ran.clear()
    lab.draws = False
    assert lab.compare().failed == {} and lab.ran == list(done.failed)


def test_an_interrupt_keeps_what_is_finished_and_says_how_to_go_on(lab):
    lab.trouble["sft--none--seed1"] = Interrupted("stopped")
    with pytest.raises(Interrupted) as stop:
        lab.compare()
    assert f"rlsafe compare {lab.path} --paths sft --seeds 0,1 --out {lab.out}" in str(stop.value)
    rows = list(csv.DictReader((lab.out / "results.csv").open()))
    assert [(row["defense"], row["seed"]) for row in rows] == [("untrained", "0"), ("none", "0"), ("kl", "0")]
    assert (lab.out / "verdicts.json").is_file()
    lab.trouble.clear()
    lab.ran.clear()
    lab.compare()
    assert lab.ran == ["sft--none--seed1", "sft--kl--seed1"]
    assert lab.resumed == ["sft--none--seed1"]  # it had a checkpoint


def test_a_stop_in_a_cells_last_step_ends_the_comparison_and_the_cell_is_then_only_evaluated(lab):
    lab.stopped = {"sft--none--seed0"}
    with pytest.raises(Interrupted, match="go on with"):
        lab.compare()
    assert lab.ran == ["untrained", "sft--none--seed0"] and lab.evaluated == ["untrained"]
    lab.compare()
    assert lab.ran.count("sft--none--seed0") == 1 and "sft--none--seed0" in lab.evaluated


def test_an_interrupted_look_goes_on_with_all_that_was_asked_for(lab):
    """Not with the seeds of this look alone, nor without --decide; and --jobs 1, which is not the default, is kept."""
    lab.trouble["sft--kl--seed0"] = Interrupted("stopped")
    with pytest.raises(Interrupted) as stop:
        compare_decided(lab.path, ["none", "kl"], ["sft"], list(range(5)), lab.out, jobs=1)
    command = (
        f"rlsafe compare {lab.path} --defenses none,kl --paths sft --seeds 0,1,2,3,4 --decide --jobs 1 --out {lab.out}"
    )
    assert str(stop.value).endswith(command)
    assert json.loads((lab.out / "comparison.json").read_text())["command"] == command


@pytest.mark.parametrize("name", ["cell.json", "run.json"])
@pytest.mark.parametrize("text", ["", '{"id": "sft', "[]"])
def test_a_cell_whose_record_a_power_cut_damaged_runs_again_and_no_other(lab, caplog, name, text):
    lab.compare()
    lab.ran.clear()
    damaged = lab.out / "cells" / "sft--kl--seed1" / name
    damaged.write_text(text)
    lab.compare(seeds=[0])  # of another selection now
    rows = [(row["defense"], row["seed"]) for row in csv.DictReader((lab.out / "results.csv").open())]
    assert lab.ran == [] and ("none", "1") in rows and ("kl", "1") not in rows
    lab.compare()
    assert lab.ran == ["sft--kl--seed1"] and json.loads(damaged.read_text())
    assert [record.message for record in caplog.records] == [
        f"{damaged}: damaged, as after a power cut; its cell counts as unfinished, and `rlsafe compare` runs it again"
    ]


def test_a_damaged_plan_is_named_with_the_way_out(lab):
    lab.compare()
    plan = (lab.out / "comparison.json").read_text()
    (lab.out / "comparison.json").write_text(plan[:100])
    with pytest.raises(UserError, match="comparison.json: not valid JSON, .*; repeat the `rlsafe compare` command"):
        report(lab.out)
    lab.compare()
    assert json.loads((lab.out / "comparison.json").read_text()).keys() == json.loads(plan).keys()


def test_an_interrupt_during_evaluation_does_not_cost_the_training(lab):
    lab.trouble["evaluate sft--kl--seed0"] = KeyboardInterrupt()
    with pytest.raises(Interrupted):
        lab.compare()
    lab.trouble.clear()
    lab.ran.clear()
    lab.compare()
    assert "sft--kl--seed0" not in lab.ran and "sft--kl--seed0" in lab.evaluated


def test_a_user_error_in_a_cell_costs_that_cell_only(lab):
    lab.trouble["sft--kl--seed0"] = UserError("no such reward")
    done = lab.compare()
    assert done.failed == {"sft--kl--seed0": "no such reward"}
    assert lab.ran[-1] == "sft--kl--seed1"


def test_a_user_error_that_keeps_every_cell_from_training_is_the_users(lab):
    for id in ("sft--none--seed0", "sft--kl--seed0", "sft--none--seed1", "sft--kl--seed1"):
        lab.trouble[id] = UserError("no such reward")
    with pytest.raises(UserError, match="sft / none / seed 0: no such reward"):
        lab.compare()


def test_a_helper_that_fails_costs_the_cells_that_need_it_only(lab, monkeypatch):
    def broken(selection, out, **more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "make_scores", broken)
    monkeypatch.setattr(runner, "check_selection", lambda selection: None)
    text = SMALL.replace("  kl:", "  plus: [interleaving+: {scores: auto}]\n  kl:")
    lab.path.write_text(text + "selection: {adapters: {legal: legal.jsonl}}\n")
    done = lab.compare(seeds=[0])
    assert list(done.failed) == ["sft--plus--seed0"]
    assert "could not be scored: RuntimeError: out of memory" in done.failed["sft--plus--seed0"]
    assert lab.ran == ["untrained", "sft--none--seed0", "sft--kl--seed0"]


def test_a_relapse_fails_with_the_run_that_it_goes_on_from_and_no_other(lab):
    lab.trouble["sft--kl--seed0"] = RunError("diverged")
    done = lab.compare(seeds=[0], relapse=3)
    assert done.failed == {
        "sft--kl--seed0": "diverged",
        "relapse--sft--kl--seed0": "it goes on from sft--kl--seed0, which failed",
    }
    assert lab.ran[-2:] == ["relapse--sft--untrained--seed0", "relapse--sft--none--seed0"]
    lab.trouble.clear()
    lab.ran.clear()
    assert lab.compare(seeds=[0], relapse=3).failed == {}
    assert lab.ran == ["sft--kl--seed0", "relapse--sft--kl--seed0"]


def test_earlier_relapses_stay_in_the_report_of_another_selection(lab):
    lab.compare(seeds=[0], relapse=3)
    lab.ran.clear()
    lab.compare(seeds=[1])
    assert "relapse--sft--kl--seed0" in json.loads((lab.out / "comparison.json").read_text())["cells"]
    assert (lab.out / "relapse.csv").read_text().count("\n") == 4


def test_what_a_cell_took_is_recorded(lab):
    lab.compare(seeds=[0])
    record = json.loads((lab.out / "cells" / "sft--kl--seed0" / "cell.json").read_text())
    assert record["memory_of"] in ("process", "GPU") and 2**20 < record["peak_memory"] < 2**40


def test_user_errors_are_found_before_anything_runs(lab, monkeypatch):
    def prepare(config):
        if config.defenses:
            raise UserError("data.safe is missing")

    monkeypatch.setattr(rlsafe.engine.run.build, "prepare", prepare)
    with pytest.raises(UserError, match="sft / kl / seed 0: data.safe is missing"):
        lab.compare()
    assert lab.ran == []


def test_a_call_that_is_refused_changes_nothing(lab, monkeypatch):
    """Neither a finished comparison, which keeps its configuration and its looks, nor a new one: the call is corrected and repeated."""

    def check(cells):
        if cells and "typo" in cells[0].config.data.narrow.source:
            raise UserError("no such file")

    monkeypatch.setattr(runner, "check", check)
    typo = ["data.narrow.source=typo.jsonl"]
    with pytest.raises(UserError, match="no such file"):
        lab.compare(overrides=typo)
    lab.compare()
    Looks([0, 1, 2, 3], taken=1).save(lab.out)
    before = {path: path.read_bytes() for path in lab.out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="no such file"):
        lab.compare(overrides=typo)
    assert {path: path.read_bytes() for path in lab.out.rglob("*") if path.is_file()} == before


def test_a_directory_that_holds_something_else_is_refused(lab):
    lab.out.mkdir()
    (lab.out / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="no comparison"):
        lab.compare()
    assert (lab.out / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("content", [None, "file", "empty"])
def test_report_of_something_that_is_no_comparison(tmp_path, content):
    place = tmp_path / "place"
    if content == "file":
        place.write_text("x")
    elif content == "empty":
        place.mkdir()
    with pytest.raises(UserError):
        report(place)


def test_progress_estimates_the_time_left_from_cells_of_the_same_path(lab):
    from rlsafe.compare.run.progress import Progress

    cells = [c for c in expand(load_compare(lab.path), seeds=[0, 1]) if c.kind == "narrow"]
    progress = Progress(cells)
    assert progress.left() is None
    for cell in cells[:4]:  # all of seed 0: two SFT cells, two GRPO cells
        progress.finish(cell, 5.0 if cell.path == "sft" else 20.0, "")
    assert progress.left() == pytest.approx(2 * 5 + 2 * 20)
    progress.workers = 2
    assert progress.left() == pytest.approx(25)
