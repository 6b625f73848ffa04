"""Looks fixed in advance: their levels, what stops, and what holds after Holm's correction."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
from synthetic_comparison import CONFIG, ZERO, make, write_cell

from rlsafe.arguments import numbers
from rlsafe.compare import compare_decided, draw_report, versus
from rlsafe.compare.report.versus import versus_table
from rlsafe.compare.run import runner
from rlsafe.compare.run.deciding import _owed, _stopped
from rlsafe.compare.verdicts.differences import two_defenses, two_paths
from rlsafe.compare.verdicts.grades import Verdict
from rlsafe.compare.verdicts.looks import Looks, counts, holm, levels, p_value
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.tasks import scores
from rlsafe.compare.verdicts.verdicts import holding, judge_defenses
from rlsafe.config import UserError

ARMS = {
    ("", "untrained"): {"general": 0.0, "indomain": 0.0},
    ("sft", "none"): {"general": 0.5, "indomain": 0.9},
    ("sft", "kl"): {"general": 0.2, "indomain": 0.9},
}


def test_looks_spend_the_whole_error_and_no_more():
    planned = counts(10)
    assert planned == [3, 5, 10] and counts(4) == [3, 4]
    spent = [1 - level for level in levels(planned)]
    assert sum(spent) == pytest.approx(0.05) and all(0 < error < 0.05 for error in spent)


def test_a_defense_stops_when_every_tested_verdict_is_one_grade():
    looks = Looks(list(range(10)), taken=1)
    decided, open_, untested = Verdict("yes"), Verdict("at least partly"), Verdict("untested")
    alone = Verdict("yes", one_seed=True)  # the others failed
    found = {"none": {"a": decided}, "kl": {"a": decided, "b": untested}, "ldifs": {"a": decided, "b": open_}}
    looks.take({"sft": {**found, "persona": {"a": decided, "b": alone}}})
    assert looks.stopped == {"sft kl": 0} and looks.judged == ["sft none", "sft kl", "sft ldifs", "sft persona"]
    looks.taken = 2
    assert (looks.seeds_of("sft", "kl"), looks.seeds_of("sft", "ldifs")) == ([0, 1, 2], [0, 1, 2, 3, 4])
    assert looks.level("sft", "kl") == levels([3, 5, 10])[0] != looks.level("sft", "ldifs")


def test_verdicts_rest_on_the_seeds_and_the_level_of_their_look(tmp_path):
    directory = make(tmp_path / "out", ARMS, questions=40, samples=2, paths=["sft"], seeds=list(range(5)))
    before = judge_defenses(load(directory.out))[0].rows["kl"].verdicts["prevents_em"]
    Looks(list(range(10)), taken=2, stopped={"sft kl": 0}).save(directory.out)
    after = judge_defenses(load(directory.out))[0].rows["kl"].verdicts["prevents_em"]
    assert before.level == 0.95 and after.level == pytest.approx(levels([3, 5, 10])[0])
    assert after.high - after.low > before.high - before.low


BOTH = {**ARMS, ("grpo", "none"): {"general": 0.4, "indomain": 0.8}, ("grpo", "kl"): {"general": 0.2, "indomain": 0.5}}
BOTH |= {("sft", "ldifs"): {"general": 0.1, "indomain": 0.85}}
THREE = CONFIG.replace("  kl: [{kl: {weight: 0.3}}]\n", "  kl: [{kl: {weight: 0.3}}]\n  ldifs: [ldifs]\n")


def test_two_that_stopped_at_different_looks_are_compared_at_the_earlier_one(tmp_path):
    """On the seeds that both had by then, at that look's level: paths, defenses, and `rlsafe versus`, in the files and the report."""

    def differences(directory):
        results = load(directory.out)
        tables = judge_defenses(results)
        (two,) = two_paths(results, tables)
        of_path = versus(directory.out, "kl", "ldifs")["sft"]["prevents_em"]
        return (
            two.differences["prevents_em"]["kl"],
            two_defenses(results, tables[0])["prevents_em"]["kl", "ldifs"],
            of_path,
        )

    few, many = (
        make(
            tmp_path / f"of{seeds}",
            BOTH,
            THREE,
            questions=40,
            samples=1,
            paths=["sft", "grpo"],
            seeds=list(range(seeds)),
        )
        for seeds in (3, 5)
    )
    assert all(one.level == 0.95 for one in differences(many))
    Looks(list(range(10)), taken=2, stopped={"sft kl": 0}).save(many.out)
    first = levels([3, 5, 10])[0]
    for plain, looked in zip(differences(few), differences(many), strict=True):
        assert (looked.first, looked.second, looked.level) == (plain.first, plain.second, first)
        assert looked.low < plain.low < plain.high < looked.high
    found = versus(many.out, "kl", "ldifs")
    assert f", {100 * first:.1f}%)" in str(list(versus_table(found, "kl", "ldifs").columns[4].cells))
    page = draw_report(many.out).read_text()
    assert (
        f"({100 * first:.1f}%)</span>" in page
        and "95% interval, paired" not in page
        and "earlier of their looks" in page
    )
    details = json.loads((many.out / "verdict_details.json").read_text())
    assert details["sft"]["against_paths"]["grpo"]["prevents_em"]["kl"]["level"] == first


def test_two_that_went_on_are_compared_at_the_last_look(tmp_path):
    directory = make(
        tmp_path / "out", BOTH, THREE, questions=20, samples=1, paths=["sft", "grpo"], seeds=list(range(5))
    )
    Looks(list(range(10)), taken=2, stopped={"sft ldifs": 0}).save(directory.out)
    results = load(directory.out)
    (two,) = two_paths(results, judge_defenses(results))
    assert two.differences["prevents_em"]["kl"].level == levels([3, 5, 10])[1]


def test_a_benign_task_is_judged_by_the_same_look_in_both_places(tmp_path):
    arms = {key: rates | {"benign": 0.05 if key[1] == "untrained" else 0.8} for key, rates in ARMS.items()}
    directory = make(tmp_path / "out", arms, questions=20, samples=1, paths=["sft"], seeds=list(range(5)))
    Looks(list(range(10)), taken=2, stopped={"sft kl": 0}).save(directory.out)
    results = load(directory.out)
    (table,) = judge_defenses(results)
    for label in ("none", "kl"):
        alone, row = scores(results, table)["sums"][label].verdict, table.rows[label].verdicts["learns_benign"]
        assert (alone.grade, alone.value, alone.low, alone.level) == (row.grade, row.value, row.low, row.level)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.02, "c": 0.04}) == {"a", "b", "c"}  # .05/3, .05/2, .05
    assert holm({"a": 0.01, "b": 0.03, "c": 0.04}) == {"a"}
    assert holm({}) == set()


def test_the_p_value_is_where_the_verdict_ceases_to_be_decided():
    found = p_value(lambda level: Verdict("yes" if level < 0.99 else "at least partly"), "yes")
    assert found == pytest.approx(0.01, rel=0.1)


def test_the_p_value_of_a_grade_ends_where_another_grade_begins():
    def turns(level: float) -> Verdict:
        return Verdict("no" if level < 0.99 else "unclear" if level < 0.999 else "yes")

    assert p_value(turns, "no") == pytest.approx(0.01, rel=0.1)


def test_decided_verdicts_that_hold_together(tmp_path):
    directory = make(tmp_path / "out", ARMS, questions=60, samples=4, paths=["sft"])
    (table,) = judge_defenses(load(directory.out))
    held = holding(table)
    assert ("kl", "keeps_narrow") in held or not table.rows["kl"].verdicts["keeps_narrow"].decided
    assert all(label != "none" for label, _ in held)
    page = draw_report(
        directory.out
    ).read_text()  # marked beside the grade and in the table of numbers, and said in both places
    assert held and page.count("<sup>H</sup>") == 2 * len(held) + 2


def test_a_verdict_of_one_look_holds_by_what_that_look_may_spend(tmp_path):
    """Without it every look would spend the whole error once more."""
    directory = make(tmp_path / "out", ARMS, questions=40, samples=2, paths=["sft"])
    (table,) = judge_defenses(load(directory.out))
    row = table.rows["kl"]

    def held(level, p):
        """Whether a verdict decided at `level` holds, whose interval is one grade up to 1 - p."""
        judged = SimpleNamespace(verdict=lambda label, criterion, at: Verdict("yes" if at < 1 - p else "unclear"))
        row.verdicts, row.judged = {"prevents_em": Verdict("yes", level=level)}, judged
        return bool(holding(table))

    first = levels([3, 5, 10])[0]
    assert held(0.95, 0.04) and held(first, (1 - first) / 2)
    assert not held(first, 0.04)


def test_a_defense_stops_with_its_own_verdicts_and_all_its_variants():
    looks = Looks(
        list(range(10)), taken=1, judged=["sft kl", "sft my kl", "sft ldifs[weight=1]", "sft ldifs[weight=2]"]
    )
    looks.stopped = {"sft kl": 0, "sft ldifs[weight=1]": 0}
    assert _stopped(looks, "kl") and not _stopped(looks, "my kl") and not _stopped(looks, "ldifs")
    looks.stopped["sft ldifs[weight=2]"] = 0
    assert _stopped(looks, "ldifs")


def test_seeds_as_a_range():
    assert numbers("--seeds", "0-3,7") == [0, 1, 2, 3, 7] and numbers("--seeds", "-1") == [-1]
    with pytest.raises(UserError, match="range"):
        numbers("--seeds", "5-2")


def test_too_few_seeds_to_decide(tmp_path):
    make(tmp_path / "out", ARMS, paths=["sft"], seeds=[0])
    with pytest.raises(UserError, match="0-9"):
        compare_decided(tmp_path / "out.yaml", seeds=[0, 1, 2], out=tmp_path / "out")


def test_seeds_are_added_until_all_is_decided(tmp_path, monkeypatch):
    """The runs themselves are made up: what is asked for, at which look, is what counts."""
    import rlsafe.compare.run.deciding as deciding

    asked = []

    def run(config, defenses, paths, seeds, out, **more):
        asked.append((list(defenses), list(seeds)))
        make(tmp_path / "out", ARMS, questions=60, samples=4, paths=["sft"], seeds=list(seeds))
        return deciding.Comparison(tmp_path / "out", tmp_path / "out" / "report.html", [])

    make(tmp_path / "out", ARMS, paths=["sft"], seeds=[0])
    monkeypatch.setattr(deciding, "compare", run)
    found = compare_decided(tmp_path / "out.yaml", paths=["sft"], seeds=list(range(10)), out=tmp_path / "out")
    assert asked[0] == (["none", "kl"], [0, 1, 2])
    assert all(len(now[1]) > len(before[1]) for before, now in zip(asked, asked[1:], strict=False))
    looks = Looks.load(tmp_path / "out")
    assert looks.taken == len(asked) and ("sft kl" in looks.stopped or looks.over)
    assert "Looks fixed in advance" in found.report.read_text()
    with pytest.raises(UserError, match="were fixed for"):
        compare_decided(tmp_path / "out.yaml", paths=["sft"], seeds=list(range(8)), out=tmp_path / "out")
    again = partial(compare_decided, tmp_path / "out.yaml", paths=["sft"], seeds=list(range(10)), out=tmp_path / "out")
    with pytest.raises(UserError, match=r"taken with other settings \(untrained: batch.sft_rows\)"):
        again(overrides=["batch.sft_rows=3"])


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """`--decide` on five seeds, whose runs are made up: `lab.ran` lists them, those in `lab.broken` fail."""
    (tmp_path / "c.yaml").write_text(CONFIG.split("aligned:")[0])
    lab = SimpleNamespace(ran=[], broken=set(), out=tmp_path / "out")

    def run_cell(cell, directory, resources, progress):
        lab.ran.append(cell.id)
        if cell.id in lab.broken:
            directory.write_record(cell, "failed", 1.0, "CUDA out of memory")
            return
        rate = 0.4 if cell.defense == "none" else 0.2 + 0.1 * (cell.seed % 3)  # never decided
        shown = {"general": rate, "indomain": 0.8} if cell.path else {}
        write_cell(directory, cell, {**ZERO, **shown}, 6, 2, "An answer.")

    def again(*labels):
        lab.ran.clear()
        return compare_decided(tmp_path / "c.yaml", ["none", *labels], ["sft"], list(range(5)), lab.out, jobs=1)

    monkeypatch.setattr(runner, "run_cell", run_cell)
    monkeypatch.setattr(runner, "check", lambda cells: None)
    lab.again = again
    return lab


def test_what_failed_runs_again_after_all_looks_and_is_missed_until_it_has(lab):
    lab.broken = {"sft--kl--seed4"}
    for _ in range(2):
        done = lab.again("kl")
        assert done.failed == {"sft--kl--seed4": "CUDA out of memory"} and "sft--kl--seed4" in lab.ran
        assert "1 of 11 runs are missing" in done.report.read_text()
    lab.broken = set()
    done = lab.again("kl")
    assert lab.ran == ["sft--kl--seed4"] and done.failed == {} and "are missing" not in done.report.read_text()


def test_a_failure_that_a_later_look_made_good_is_none(lab, monkeypatch):
    lab.broken = {"sft--kl--seed1"}
    plain = runner.compare
    monkeypatch.setattr("rlsafe.compare.run.deciding.compare", lambda *a, **k: (plain(*a, **k), lab.broken.clear())[0])
    assert lab.again("kl").failed == {} and lab.ran.count("sft--kl--seed1") == 2


def test_a_defense_that_comes_after_the_last_look_gets_all_seeds(lab):
    lab.again("kl")
    lab.again("kl", "ldifs")
    assert lab.ran == [f"sft--ldifs--seed{seed}" for seed in range(5)]
    assert "sft ldifs" in Looks.load(lab.out).judged


def test_what_failed_stays_in_the_plan_of_another_selection(lab):
    lab.broken = {"sft--ldifs--seed0"}
    lab.again("kl", "ldifs")
    assert lab.again("kl").failed == {}  # it is no part of this call
    assert "sft--ldifs--seed0" in json.loads((lab.out / "comparison.json").read_text())["cells"]


def test_each_defense_is_owed_the_seeds_of_its_look():
    looks = Looks(list(range(10)), taken=2, judged=["sft none", "sft kl", "grpo kl", "sft ldifs"])
    looks.stopped = {"sft kl": 0, "grpo kl": 1, "sft ldifs": 0}
    acting = dict.fromkeys(["none", "kl", "ldifs", "new"], {"sft"})
    assert _owed(looks, acting) == {5: ["none", "kl", "new"], 3: ["ldifs"]}
    # On a path that came after the looks nothing is decided yet.
    assert _owed(looks, acting | {"ldifs": {"sft", "grpo"}}) == {5: ["none", "kl", "ldifs", "new"]}


@pytest.mark.parametrize(("wanted", "chosen"), [(None, ["none"]), (["all"], ["none", "kl"])])
def test_it_asks_for_the_defenses_that_a_plain_comparison_would(tmp_path, monkeypatch, wanted, chosen):
    import rlsafe.compare.run.deciding as deciding

    def run(config, defenses, **more):
        assert defenses == chosen
        raise KeyboardInterrupt

    make(tmp_path / "out", ARMS, CONFIG + "default_defenses: [none]\n", paths=["sft"], seeds=[0])
    monkeypatch.setattr(deciding, "compare", run)
    with pytest.raises(KeyboardInterrupt):
        compare_decided(tmp_path / "out.yaml", wanted, ["sft"], list(range(10)), tmp_path / "out")


def test_a_damaged_record_of_the_looks_is_named_with_the_way_out(tmp_path):
    (tmp_path / "looks.json").write_text("")
    with pytest.raises(UserError, match=r"looks\.json: damaged.*another --out"):
        Looks.load(tmp_path)
