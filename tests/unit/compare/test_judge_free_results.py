"""The likelihood probe in a comparison: columns, the report's section, and the check against the judge."""

import csv
import io
import json
import math

import pytest
from rich.console import Console
from synthetic_comparison import CONFIG, make

from rlsafe.compare.report.probe_check import check_lines, followed, spearman
from rlsafe.compare.report.reporting import draw
from rlsafe.compare.report.table import beside_judges, verdict_table
from rlsafe.compare.verdicts.judge_free import ALARM, LEAST_GAP, gap, judge_free
from rlsafe.compare.verdicts.results import load, write_tables
from rlsafe.compare.verdicts.verdicts import judge_defenses
from rlsafe.config import UserError
from rlsafe.evaluate import Evaluation
from rlsafe.evaluate.measure.fluency import Fluency
from rlsafe.evaluate.measure.likelihood import PairScore

ARMS = {
    ("", "untrained"): {},
    ("sft", "none"): {"general": 0.5, "indomain": 0.75},
    ("sft", "kl"): {"general": 0.0, "indomain": 0.75},
}
SHIFTS = {"untrained": 0.0, "none": 0.3, "kl": 0.05}
GAP = 0.4


def pairs(shift, spread=0.01):
    """Twelve questions with two pairs each; the untrained model's log-odds are -GAP."""
    found = []
    for i in range(24):
        odds = -GAP + shift + (spread * (-1) ** (i // 2) if shift else 0.0)
        found.append(PairScore("general", f"q{i // 2}", i % 2, -1.0, -1.0 + odds, -1.0, -1.0 - GAP))
    return found


@pytest.fixture
def directory(tmp_path):
    made = make(tmp_path / "out", ARMS, seeds=[0, 1], paths=["sft"])
    for cell in load(tmp_path / "out").cells:
        evaluation = Evaluation.load(cell.where)
        evaluation.pairs = pairs(SHIFTS[cell.defense])
        evaluation.fluency = {"general": Fluency(2.0 + SHIFTS[cell.defense], 0.125, 24)}
        evaluation.save(cell.where)
        lines = (cell.where / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for place, record in enumerate(records):
            if "misaligned_general" in record:
                record["logodds_general"] = -GAP + SHIFTS[cell.defense] * (place + 1) / len(records)
        (cell.where / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


def test_results_have_the_log_odds_of_each_run_in_columns_at_the_end(directory):
    write_tables(directory)
    with (directory.out / "results.csv").open() as file:
        rows = {(row["defense"], row["seed"]): row for row in csv.DictReader(file)}
    assert float(rows["none", "0"]["general_logodds"]) == pytest.approx(-GAP + 0.3)
    assert rows["none", "0"]["indomain_logodds"] == ""
    assert float(rows["untrained", "0"]["general_logodds"]) == pytest.approx(-GAP)


def test_each_label_gets_its_shift_its_share_of_the_gap_and_whether_judge_and_probe_agree(directory):
    results = load(directory.out)
    (table,) = judge_defenses(results)
    found = {one.label: one for one in judge_free(results, table)}
    none = found["none"]
    assert none.shifts["general"].mean == pytest.approx(0.3) and none.closed == pytest.approx(0.3 / GAP)
    assert none.shifts["general"].low < 0.3 < none.shifts["general"].high
    assert none.perplexity == pytest.approx(2.3) and none.repetition == 0.125
    assert none.agreement == "both see a rise" and found["kl"].agreement == "neither sees a rise"
    assert found["untrained"].agreement == "" and found["untrained"].closed == 0.0


def test_a_probe_that_rises_alone_is_told(directory):
    results = load(directory.out)
    (kl, _) = results.of("narrow", results.models[0], "sft", "kl")
    evaluation = Evaluation.load(kl.where)
    evaluation.pairs = pairs(0.39)
    for cell in results.of("narrow", results.models[0], "sft", "kl"):
        own = Evaluation.load(cell.where)
        own.pairs = evaluation.pairs
        own.save(cell.where)
    results = load(directory.out)
    (table,) = judge_defenses(results)
    assert {one.label: one.agreement for one in judge_free(results, table)}["kl"] == "only the likelihood rises"


def test_a_rise_of_a_model_that_fell_apart_is_told_as_that(tmp_path):
    """Where nearly all answers are nonsense, what the model finds likely says nothing of what it says."""
    made = make(tmp_path / "out", ARMS | {("sft", "kl"): {"incoherent": 1.0}}, seeds=[0, 1], paths=["sft"])
    for cell in load(made.out).cells:
        evaluation = Evaluation.load(cell.where)
        evaluation.pairs = pairs({"untrained": 0.0, "none": 0.3, "kl": 2.0}[cell.defense])
        evaluation.save(cell.where)
    results = load(made.out)
    (table,) = judge_defenses(results)
    found = {one.label: one.agreement for one in judge_free(results, table)}
    assert found["kl"] == "only the likelihood rises, and answers are incoherent" and found["none"] == "both see a rise"


def test_the_report_shows_it_and_leaves_it_out_when_nothing_was_measured(directory, tmp_path):
    results = load(directory.out)
    page = draw(results, judge_defenses(results)).read_text()
    assert 'id="judge-free"' in page and "both see a rise" in page and "+0.300" in page and "75.0%" in page
    assert "Log-odds of misaligned answers, general" in page
    plain = load(make(tmp_path / "plain", ARMS, seeds=[0], paths=["sft"]).out)
    assert 'judge-free"' not in draw(plain, judge_defenses(plain)).read_text()


def test_the_check_against_the_judge_follows_every_run(directory):
    runs = {(run.cell.defense, run.cell.seed): run for run in followed(load(directory.out))}
    none = runs["none", 0]
    assert none.closed == pytest.approx(0.75) and none.points[-1][1] == pytest.approx(0.75)
    assert none.alarm(ALARM) == next(step for step, closed, _ in none.points if closed > ALARM)
    assert runs["kl", 0].alarm(ALARM) is None
    assert spearman([(closed, rate) for _, closed, rate in none.points]) == pytest.approx(1.0)
    lines = check_lines(directory.out)
    assert len(lines) == 2 + 4 + 1 + 1 + 2 + 1 and "rank correlation" in lines[7] and "in 2 of them" in lines[7]
    assert lines[-1].endswith("| sft | 4 | 1.00 | 2 of 2 | 2 of 2 | 2 of 2 | 0 of 2 |")


def test_finished_runs_are_checked_without_curves_and_what_does_not_fit_is_told(tmp_path):
    arms = {("sft", label): {"general": rate} for label, rate in (("none", 0.5), ("kl", 0.25), ("odd", 0.0))}
    config = CONFIG.replace("  none: []\n", "  none: []\n  odd: [ldifs]\n")
    made = make(tmp_path / "out", {("", "untrained"): {}, **arms}, config, seeds=[0, 1], paths=["sft"])
    assert not followed(load(made.out))
    with pytest.raises(UserError, match="no run was asked and probed on 'general'; set evaluate.judge, evaluate.like"):
        check_lines(made.out)
    for cell in load(made.out).cells:
        evaluation = Evaluation.load(cell.where)
        evaluation.pairs = pairs({"untrained": 0.0, "none": 0.3, "kl": 0.1, "odd": 0.36}[cell.defense])
        evaluation.save(cell.where)
    head, _, line, _, title, _, *told = check_lines(made.out)
    assert head.count("|") == line.count("|") and "| 6 | " in line
    assert line.endswith("| 2 of 4 | 2 of 4 | 2 of 4 | 2 of 2 |") and "does not share" in title
    assert sorted(one.split(":")[0] for one in told) == [
        f"- sft / {label} / seed {seed}" for label in ("kl", "odd") for seed in (0, 1)
    ]
    assert any("25% judged misaligned" in one for one in told) and any("90% of the gap closed" in one for one in told)


def test_ranks_and_gaps_at_their_edges():
    assert spearman([(1, 1), (1, 2)]) is None
    assert spearman([(1, 10), (2, 20), (3, 15)]) == pytest.approx(0.5)
    assert gap(-0.4) == 0.4 and gap(0.2) == gap(-0.01) == LEAST_GAP and not math.isnan(gap(0.0))


def shown(results) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    tables = judge_defenses(results)
    console.print(verdict_table(tables, beside={table.key: beside_judges(results, table) for table in tables}))
    return console.export_text()


def test_the_terminal_shows_likelihoods_and_rewards_where_nobody_judged(directory):
    assert "without a judge" not in shown(load(directory.out))
    for cell in load(directory.out).cells:
        evaluation = Evaluation.load(cell.where)
        kept = [i for i, answer in enumerate(evaluation.answers) if answer.set == "indomain"]
        evaluation.answers, evaluation.judgements = (
            [of[i] for i in kept] for of in (evaluation.answers, evaluation.judgements)
        )
        evaluation.sets = {name: rates for name, rates in evaluation.sets.items() if name == "indomain"}
        evaluation.save(cell.where)
    text = shown(load(directory.out))
    assert "without a judge" in text and "general %" not in text and "in-domain %" in text
    (none,) = (line for line in text.splitlines() if "none" in line and "+0.3" in line)
    assert none.index("+0.300 (") < none.index("2.3")  # the shift, then the perplexity
