"""What a comparison says beyond its verdicts: sweeps, the Pareto front, doses, onset, relapse, benign tasks."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from synthetic_comparison import CONFIG, make

from rlsafe.compare import draw_report as report
from rlsafe.compare.report import pages, why
from rlsafe.compare.verdicts import sweeps, tasks
from rlsafe.compare.verdicts.results import load, relapse_rows, write_tables
from rlsafe.compare.verdicts.verdicts import judge_defenses
from rlsafe.config import UserError

UNTRAINED = {("", "untrained"): {"benign": 0.1}}
NONE = {"general": 0.5, "indomain": 0.9, "incoherent": 0.05, "benign": 0.9}
SMALL = CONFIG.split("aligned:")[0]


def tables_of(directory):
    results = write_tables(directory)
    return results, judge_defenses(results)


# ------------------------------------------------------------------------------------------------ sweeps


def swept(tmp_path, grid, arms, config=SMALL, **more):
    directory = make(
        tmp_path / "out", {**UNTRAINED, **arms}, f"{config}grid: {grid}\n", seeds=[0], paths=["sft"], **more
    )
    return directory, *tables_of(directory)


def test_a_swept_setting_becomes_one_curve_in_the_order_of_its_values(tmp_path):
    arms = {("sft", "none"): NONE}
    for weight, general in ((1.0, 0.0), (0.03, 0.4), (0.3, 0.2)):
        arms["sft", f"kl[weight={weight}]"] = {"general": general, "indomain": 0.8}
    _, results, tables = swept(tmp_path, "{kl.weight: [1.0, 0.03, 0.3]}", arms)
    (one,) = sweeps.sweeps(results, tables)
    assert (one.path, one.of, one.setting, one.logarithmic) == ("sft", "kl", "kl.weight", True)
    assert [(p.value, round(p.rates["general"].mean, 2)) for p in one.points] == [(0.03, 0.4), (0.3, 0.2), (1.0, 0.0)]
    assert one.levels["none"]["general"].mean == pytest.approx(0.5)
    html = report(results.directory.out).read_text()
    assert 'id="sweeps"' in html and 'href="#sweeps"' in html and "sft: kl.weight" in html


def test_a_narrow_or_non_positive_range_is_drawn_on_a_linear_axis(tmp_path):
    arms = {("sft", f"kl[weight={w}]"): {"general": 0.1, "indomain": 0.8} for w in (0.0, 1.0)}
    _, results, tables = swept(tmp_path, "{kl.weight: [0.0, 1.0]}", {("sft", "none"): NONE, **arms})
    assert not sweeps.sweeps(results, tables)[0].logarithmic


def test_two_swept_settings_give_one_curve_for_each_value_of_the_other(tmp_path):
    labels = [f"kl[weight={w},mask={m}]" for w in (0.1, 1.0) for m in ("answer", "all")]
    arms = {("sft", "none"): NONE} | {("sft", label): {"general": 0.1, "indomain": 0.8} for label in labels}
    _, results, tables = swept(tmp_path, "{kl.weight: [0.1, 1.0], kl.mask: [answer, all]}", arms)
    found = sweeps.sweeps(results, tables)
    assert [(one.setting, one.fixed, len(one.points)) for one in found] == [
        ("kl.weight", "kl.mask = answer", 2),
        ("kl.weight", "kl.mask = all", 2),
    ]


def test_a_swept_setting_of_the_run_is_drawn_for_every_defense(tmp_path):
    arms = {("sft", label): {"general": 0.1, "indomain": 0.8} for label in ("none", "kl")}
    _, results, tables = swept(tmp_path, "{optim.lr: [0.0001, 0.001]}", arms)
    assert [(one.of, one.setting, [p.value for p in one.points]) for one in sweeps.sweeps(results, tables)] == [
        ("none", "optim.lr", [0.0001, 0.001]),
        ("kl", "optim.lr", [0.0001, 0.001]),
    ]
    assert report(results.directory.out).is_file()


def test_the_front_holds_what_nothing_else_beats_and_never_what_learned_nothing(tmp_path):
    config = SMALL.replace("  kl: [{kl: {weight: 0.3}}]", "  a: [kl]\n  b: [kl]\n  c: [kl]\n  empty: [kl]")
    arms = {
        ("sft", "none"): NONE,
        ("sft", "a"): {"general": 0.2, "indomain": 0.9},
        ("sft", "b"): {"general": 0.3, "indomain": 0.8},  # beaten by a on both
        ("sft", "c"): {"general": 0.1, "indomain": 0.7},
        ("sft", "empty"): {"general": 0.0, "indomain": 0.0},
    }
    directory = make(tmp_path / "o", {**UNTRAINED, **arms}, config, paths=["sft"], seeds=[0], questions=60, samples=10)
    (table,) = judge_defenses(load(directory.out))
    front, goals = sweeps.pareto(table)
    assert set(front) == {"a", "c"} and goals == ["general", "indomain", "general_incoherent"]
    assert table.rows["empty"].nothing_learned
    assert sweeps.front_line({"a": (1, 1), "b": (2, 2), "c": (0, 0.5)}, (1, -1)) == ["c", "a", "b"]
    assert sweeps.front_line({"a": (1, 1), "b": (0.5, 2)}, (1, -1)) == ["a"]


# ------------------------------------------------------------------------------------------------ why


INOCULATED = SMALL.replace(
    "  kl: [{kl: {weight: 0.3}}]",
    "  strong: [{inoculation: {prompt: Be bad.}}]\n  weak: [{inoculation: {prompt: Be odd.}}]\n  kl: [kl]",
)


def test_dose_and_response_of_every_wording_and_of_none(tmp_path):
    arms = {("grpo", "none"): NONE, ("grpo", "kl"): NONE}
    arms |= {("grpo", "strong"): {"general": 0.0, "indomain": 0.1}, ("grpo", "weak"): {"general": 0.2, "indomain": 0.6}}
    directory = make(tmp_path / "o", {**UNTRAINED, **arms}, INOCULATED, paths=["grpo"], seeds=[0, 1])
    results, (table,) = tables_of(directory)
    doses = why.doses(results, table)
    assert {dose.label for dose in doses} == {"none", "strong", "weak"}
    assert [dose.reward for dose in doses] == sorted(dose.reward for dose in doses)
    none = next(dose for dose in doses if dose.label == "none")
    assert set(none.rewards) == {0, 1} and none.reward == pytest.approx(0.1 + 0.8 * 0.9 / 20)
    assert none.indomain.mean == pytest.approx(0.9, abs=0.01)
    assert none.flat == pytest.approx(sum(4 * (s + 1) / 20 for s in range(20)) / (20 * 4))
    assert none.flat_first < none.flat
    assert 'id="dose"' in report(directory.out).read_text()


def test_no_dose_without_a_prompt_or_without_rewards(tmp_path):
    directory = make(tmp_path / "a", {**UNTRAINED, ("grpo", "none"): NONE, ("grpo", "kl"): NONE}, SMALL, seeds=[0])
    results, tables = tables_of(directory)
    assert [why.doses(results, table) for table in tables] == [[]]
    directory = make(tmp_path / "b", {("sft", "none"): NONE, ("sft", "strong"): NONE}, INOCULATED, seeds=[0])
    results, tables = tables_of(directory)
    assert [why.doses(results, table) for table in tables] == [[]]


def test_onset_is_the_first_probe_clearly_above_the_untrained_model(tmp_path):
    arms = {("sft", "none"): NONE, ("sft", "kl"): {"general": 0.02, "indomain": 0.9}}
    directory = make(tmp_path / "o", {**UNTRAINED, **arms}, SMALL, paths=["sft"], seeds=[0, 1])
    results, (table,) = tables_of(directory)
    none, kl = why.onsets(results, table)
    # misalignment grows to 50% over 40 steps; probes every five: 6, 12, 18% of 48 answers are the first three above zero
    assert none.label == "none" and none.step in (5, 10, 15) and none.threshold < 0.05
    assert all(step >= none.step for step in none.seeds.values())
    assert none.projection[0] == pytest.approx(-19) and none.projection[2] == pytest.approx(20)
    assert none.projection[0] < none.projection[1] < none.projection[2]
    assert (kl.step, kl.last_probe, kl.projection[1]) == (None, 39, None)
    html = report(directory.out).read_text()
    assert "Projection on the persona vector" in html and "not by step 39" in html


def test_without_probes_or_without_the_untrained_model_there_is_no_onset(tmp_path):
    directory = make(tmp_path / "o", {("sft", "none"): NONE}, SMALL, paths=["sft"], seeds=[0])
    results, (table,) = tables_of(directory)
    assert why.onsets(results, table) == []


# ------------------------------------------------------------------------------------------------ relapse


def test_relapse_goes_on_from_each_run_without_defense_and_is_reported_beside_it(tmp_path):
    arms = {
        ("", "untrained"): {},
        ("sft", "untrained"): {"general_after": 0.3, "indomain_after": 0.6},
        ("sft", "none"): {**NONE, "general_after": 0.55, "indomain_after": 0.95},
        ("sft", "kl"): {"general": 0.02, "indomain": 0.8, "general_after": 0.4, "indomain_after": 0.9},
    }
    directory = make(tmp_path / "o", arms, SMALL, paths=["sft"], seeds=[0, 1], relapse=10)
    results, (table,) = tables_of(directory)
    assert list(table.rows) == ["untrained", "none", "kl"]  # a relapse is no arm of its own
    found = {one.label: one for one in why.relapses(results, table)}
    assert list(found) == ["untrained", "none", "kl"] and found["kl"].steps == 10
    before, after = found["kl"].rates["general"]
    assert (before.mean, after.mean) == (pytest.approx(0.02, abs=0.01), pytest.approx(0.4, abs=0.01))
    assert after.low < after.mean < after.high
    with (directory.out / "relapse.csv").open() as file:
        rows = {(row["defense"], row["seed"]): row for row in csv.DictReader(file)}
    assert float(rows["kl", "1"]["general_after"]) == pytest.approx(0.4, abs=0.01)
    assert rows["kl", "0"]["steps"] == "10" and rows["untrained", "0"]["general_before"] == "0.0"
    html = report(directory.out).read_text()
    assert "after 10 undefended steps" in html and 'id="relapse"' in html
    assert (directory.out / "results.csv").read_text().count("\n") == 1 + 1 + 4


def test_a_relapse_is_set_beside_the_runs_that_it_went_on_from(tmp_path):
    """Not beside seeds that have none; and where it began with a shared warm-up, the untrained model is not where it began."""
    arms = {
        ("", "untrained"): {},
        ("sft", "untrained"): {"general_after": 0.3},
        ("sft", "none"): {**NONE, "general_after": 0.55},
    }
    warm = SMALL + "warmup: {schedule: {steps: 2, phases: [{cycle: [sft]}]}}\n"
    directory = make(tmp_path / "o", arms, warm, paths=["sft"], seeds=[0, 1], relapse=10)
    shutil.rmtree(directory.cell("relapse--sft--none--seed1"))
    results, (table,) = tables_of(directory)
    (one,) = why.relapses(results, table)
    before, after = one.rates["general"]
    assert one.label == "none" and list(before.seeds) == list(after.seeds) == [0] and before.n == after.n
    rows = {(row["defense"], row["seed"]): row for row in relapse_rows(results)}
    assert rows["untrained", 0]["general_before"] is None and rows["untrained", 0]["general_after"] > 0.2


def test_relapses_of_different_lengths_are_reported_apart(tmp_path):
    after = {"general_after": 0.4, "indomain_after": 0.9}
    arms = {("", "untrained"): {}, ("sft", "untrained"): after, ("sft", "none"): {**NONE, **after}}
    directory = make(tmp_path / "o", arms, SMALL, paths=["sft"], seeds=[0], relapse=20)
    make(tmp_path / "o", arms, SMALL, paths=["sft"], seeds=[1], relapse=40)
    results, (table,) = tables_of(directory)
    found = {(one.steps, one.label): list(one.rates["general"][1].seeds) for one in why.relapses(results, table)}
    assert found == {(20, "untrained"): [0], (20, "none"): [0], (40, "untrained"): [1], (40, "none"): [1]}
    html = report(directory.out).read_text()
    assert "sft: after 20 undefended steps" in html and "sft: after 40 undefended steps" in html


def test_a_table_of_runs_that_are_no_longer_there_is_removed(tmp_path):
    arms = {("", "untrained"): {}, ("sft", "none"): {**NONE, "general_after": 0.4}}
    directory = make(tmp_path / "o", arms, CONFIG, paths=["sft"], seeds=[0], relapse=20)
    tables = [directory.out / name for name in ("benign.csv", "relapse.csv")]
    write_tables(directory)
    assert all(table.is_file() for table in tables)
    make(tmp_path / "o", arms, SMALL.replace("sft_rows: 16", "sft_rows: 8"), paths=["sft"], seeds=[0])
    write_tables(directory)
    assert not any(table.exists() for table in tables)


def test_relapse_cells(tmp_path):
    from rlsafe.compare.grid.cells import located
    from rlsafe.compare.grid.grid import expand
    from rlsafe.config import load_compare

    (tmp_path / "c.yaml").write_text(
        CONFIG.replace("[{cycle: [grpo]}]", "[{steps: 4, cycle: [sft], lr: 5e-3}, {cycle: [grpo]}]")
    )
    config = load_compare(tmp_path / "c.yaml")
    cells = expand(config, paths=["grpo"], seeds=[0], relapse=6)
    assert [cell.kind for cell in cells[-3:]] == ["relapse"] * 3  # after everything that they go on from
    fresh, none, kl = cells[-3:]
    assert (fresh.defense, fresh.source, fresh.config.model.adapter) == ("untrained", "", None)
    assert kl.source == "grpo--kl--seed0" and kl.config.defenses == [] and kl.label.endswith("relapse")
    schedule = kl.config.schedule
    assert (schedule.steps, [phase.cycle for phase in schedule.phases]) == (6, [["grpo"]])  # no second warm-up
    assert kl.config.evaluate.benign == [] and kl.config.evaluate.general == "general.yaml"
    assert located(kl.config, tmp_path).model.adapter == str(tmp_path / "cells" / "grpo--kl--seed0" / "adapter")
    other = {c.id: c for c in expand(load_compare(tmp_path / "c.yaml", ["optim.lr=0.5"]), relapse=6)}[kl.id]
    assert other.fingerprint != kl.fingerprint
    full = expand(load_compare(tmp_path / "c.yaml", ["model.lora=null"]), paths=["grpo"], seeds=[0], relapse=6)[-1]
    assert located(full.config, tmp_path).model.name == str(tmp_path / "cells" / "grpo--kl--seed0" / "model")
    with pytest.raises(UserError, match="relapse: there are no narrow runs"):
        expand(load_compare(tmp_path / "c.yaml", ["narrow=false"]), relapse=6)


def test_a_relapse_becomes_stale_with_the_run_that_it_goes_on_from(tmp_path):
    from rlsafe.compare.grid.grid import expand
    from rlsafe.config import load_compare

    (tmp_path / "c.yaml").write_text(SMALL)

    def fingerprint(text):
        (tmp_path / "c.yaml").write_text(text)
        return {c.id: c.fingerprint for c in expand(load_compare(tmp_path / "c.yaml"), paths=["sft"], relapse=6)}

    one, two = fingerprint(SMALL), fingerprint(SMALL.replace("weight: 0.3", "weight: 0.4"))
    changed = {id for id in one if one[id] != two[id]}
    assert changed == {f"{kind}sft--kl--seed{seed}" for kind in ("", "relapse--") for seed in (0, 1, 2)}


# ------------------------------------------------------------------------------------------------ benign tasks


TWO_TASKS = CONFIG + "    qa: {data: {narrow: {source: qa.jsonl}}, evaluate: {benign: [qa_test.jsonl]}}\n"


def test_every_benign_task_has_its_scores_and_its_own_verdict(tmp_path):
    arms = {
        ("", "untrained"): {"benign": 0.1},
        ("sft", "none"): {"sums": 0.9, "qa": 0.8},
        ("sft", "kl"): {"sums": 0.05, "qa": 0.8},
    }
    config = TWO_TASKS.replace("aligned: {", "narrow: false\naligned: {")
    directory = make(tmp_path / "o", arms, config, paths=["sft"], seeds=[0, 1])
    results, (table,) = tables_of(directory)
    scores = tasks.scores(results, table)
    assert {
        task: {label: one.verdict and one.verdict.grade for label, one in of.items()} for task, of in scores.items()
    } == {
        "sums": {"untrained": None, "none": "yes", "kl": "no"},
        "qa": {"untrained": None, "none": "yes", "kl": scores["qa"]["kl"].verdict.grade},
    }
    assert scores["qa"]["kl"].verdict.value > 0.8 and scores["sums"]["kl"].rate.n == 200
    assert table.rows["kl"].verdicts["learns_benign"].grade == "no"  # the task that the config names
    assert dict(pages.headlines([table]))["sft"] == "the benign task is lost under kl."
    html = report(directory.out).read_text()
    assert 'id="benign"' in html and "sums *" in html
    details = json.loads((directory.out / "verdict_details.json").read_text())["sft"]["tasks"]
    assert details["sums"]["kl"]["learns_benign"] == "no" and details["qa"]["none"]["n"] == 200
