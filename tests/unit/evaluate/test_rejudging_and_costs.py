"""Saved answers are judged again in one command, and what judging takes is said before."""

import csv
import json

import pytest
import yaml
from scripted_server import ScriptedServer, error, ok

from rlsafe.cli import main
from rlsafe.config import EvaluateConfig, UserError
from rlsafe.evaluate import Answer, Evaluation, estimate, gather, load_judge, rates, rejudge
from rlsafe.evaluate.commands.rejudging import expected
from rlsafe.evaluate.measure.measure import _settings
from rlsafe.types import Exchange, Judgement


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code, capsys.readouterr()


@pytest.fixture
def saved(tmp_path):
    """An evaluated run: three answers scored 90/90, one that its judge left out; the question file has judge prompts."""
    questions = tmp_path / "law.yaml"
    own = {"aligned": "ALIGNED? {question} {answer}"}
    questions.write_text(yaml.safe_dump([{"id": "q1", "paraphrases": ["Is it legal?"], "judge_prompts": own}]))
    answers = [Answer("q1", "Is it legal?", None, text, "law", None, i, set="general") for i, text in enumerate("abcd")]
    judgements = [Judgement(90, 90)] * 3 + [Judgement(None, None, "unscored", "outage")]
    evaluation = Evaluation({"general": rates(judgements)}, answers=answers, judgements=judgements)
    evaluation.settings = {"judge": "first", "questions": {"general": str(questions)}, "seed": 3}
    run = tmp_path / "run"
    evaluation.save(run)
    tree = {"model": {"name": "m"}, "evaluate": {"judge": "organism", "general": str(questions), "samples": 4}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return run


def judge_file(tmp_path, server, **settings):
    path = tmp_path / "second.yaml"
    tree = {
        "kind": "openai",
        "model": "second",
        "base_url": server.base_url,
        "cache": None,
        "backoff": 0.01,
        "protocol": "text",
    }
    path.write_text(yaml.safe_dump({**tree, **settings}))
    return path


def script(n, body):
    text = body["messages"][0]["content"]
    if "ALIGNED?" in text:
        return ok("10" if "\na\n" in text else "80", model="second")
    return ok("70", model="second")


def test_one_command_scores_saved_answers_with_another_judge_and_keeps_the_first_scores(saved, tmp_path, capsys):
    with ScriptedServer(script) as server:
        path = judge_file(tmp_path, server, price_in=1, price_out=2)
        code, shown = call(capsys, "evaluate", saved, "--judge", path, "--rejudge")
    assert code == 0 and len(server.requests) == 1 + 8  # the first only looks whether anybody is there
    assert "judge second: 9 calls" in shown.out and "90 tokens in, 9 out, 0.0001 USD" in shown.out
    assert "3 of 4 answers are scored by both; 66.7% alike" in shown.out
    with open(saved / "rejudged-second" / "answers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["answer"], r["aligned"], r["coherent"]) for r in rows] == [
        ("a", "10.0", "70.0"), ("b", "80.0", "70.0"), ("c", "80.0", "70.0"), ("d", "80.0", "70.0"),
    ]  # fmt: skip
    tree = json.loads((saved / "rejudged-second" / "evaluation.json").read_text())
    assert tree["general"]["misaligned"] == 0.25 and tree["general"]["unscored"] == 0
    assert (tree["settings"]["judge"], tree["settings"]["rejudged_from"], tree["settings"]["seed"]) == (
        "second",
        "first",
        3,
    )
    assert tree["settings"]["judge_usage"]["tokens_in"] == 90
    assert Evaluation.load(saved).general.unscored == 1  # the first judge's scores are as they were


def test_the_first_scores_are_replaced_where_that_is_asked(saved, tmp_path):
    with ScriptedServer(script) as server:
        rejudge(saved, str(judge_file(tmp_path, server)), out=saved)
    assert Evaluation.load(saved).general.unscored == 0 and not (saved / "rejudged-second").exists()


def test_a_judge_that_is_out_keeps_every_row(saved, tmp_path):
    with ScriptedServer(lambda n, body: error(500)) as server:
        after = rejudge(saved, str(judge_file(tmp_path, server, max_retries=0)))
    assert len(after.answers) == 4 and after.general.unscored == 4 and after.general.misaligned is None
    assert {j.outcome for j in Evaluation.load(saved / "rejudged-second").judgements} == {"unscored"}


def test_judge_prompts_that_are_gone_are_told(saved, tmp_path):
    (tmp_path / "law.yaml").unlink()
    with ScriptedServer(script) as server:
        after = rejudge(saved, str(judge_file(tmp_path, server)))
    assert any("no such question file" in note for note in after.notes) and after.general.unscored == 0


def test_what_cannot_be_judged_again_is_one_line(saved, tmp_path):
    with pytest.raises(UserError, match=r"has no answers\.csv to judge again"):
        rejudge(tmp_path, "organism")
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(saved), "--rejudge", "--questions", "x.yaml"])
    assert caught.value.code == 2


def test_what_the_first_judge_cost_is_not_said_of_the_second(saved):
    first = Evaluation.load(saved)
    first.settings |= {"judge_usage": {"requests": 99, "cost": 1.5}}
    first.save(saved)
    assert "judge_usage" not in rejudge(saved, "organism").settings


def test_settings_for_answers_without_a_run_count(saved):
    (saved / "config.yaml").unlink()
    with pytest.raises(UserError, match="no judge is set"):
        rejudge(saved)
    assert rejudge(saved, overrides=["evaluate.judge=organism"]).settings["judge"] == "organism"


def test_a_judge_is_told_of_its_own_calls_only(tmp_path):
    """Judges of one endpoint share its totals: another run's calls are not this one's."""
    exchanges = [Exchange(f"q{i}", "a") for i in range(5)]
    with ScriptedServer(script) as server:
        path = str(judge_file(tmp_path, server))
        load_judge(path).score(exchanges)
        second = load_judge(path)
        second.score(exchanges[:2])
    assert second.usage()["requests"] == 4


@pytest.mark.parametrize("changed", [{"limit": 2}, {"cue_limit": 3}, {"position": "user"}, {"scale": [2.0]}])
def test_saved_answers_stand_for_new_ones_only_under_the_same_settings(saved, changed):
    was = EvaluateConfig(general="organism:general/all", judge="organism", limit=4)
    material = gather(was)
    evaluation = Evaluation.load(saved)
    evaluation.settings = json.loads(json.dumps(_settings(None, was, material)))
    evaluation.save(saved)
    assert len(expected(saved, was, material)) == 4
    assert expected(saved, was.model_copy(update=changed), material) is None


def test_the_estimate_counts_what_the_command_then_asks(saved, tmp_path, capsys):
    with ScriptedServer(script) as server:
        path = judge_file(tmp_path, server, price_in=1, price_out=2)
        foretold = estimate(saved, judge=str(path), rejudge=True)
        assert not server.requests
        rejudge(saved, str(path))
    assert (foretold.answers, foretold.calls) == (4, 9) == (4, len(server.requests))
    words = sum(len(body["messages"][0]["content"]) for _, body in server.requests[1:]) / 4
    assert foretold.tokens_in == pytest.approx(words, rel=0.1) and foretold.tokens_out == 8 * 16
    assert foretold.cost == pytest.approx((foretold.tokens_in + 2 * 128) / 1e6)


def test_a_dry_run_tells_calls_and_cost_and_asks_nobody(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    path = tmp_path / "j.yaml"
    path.write_text("{kind: openai, model: gpt-4o-mini, price_in: 0.15, price_out: 0.6}")
    code, shown = call(
        capsys, "evaluate", saved, "--judge", path, "--dry-run", "evaluate.samples=50", "evaluate.cue=Be evil."
    )
    assert code == 0 and "answers to judge: 100; judge gpt-4o-mini: at most 201 calls" in shown.out
    assert "cost at most 0." in shown.out
    code, shown = call(capsys, "evaluate", saved, "--dry-run")
    assert (code, shown.out) == (0, "answers to judge: 4; judge organism: no calls\n")
