"""Where every reply of the judge is saved, its endpoint may be out; where one is missing, the command says so."""

import json
import time
from functools import partial

import pytest
import yaml
from scripted_server import ScriptedServer, ok
from tiny import save_tiny_model

from rlsafe.cli import main

PROMPTS = {"aligned": "ALIGNED? {question} {answer}"}  # the question file's own: not in answers.csv


def script(how, n, body):
    text = body["messages"][0]["content"]
    score = str(len(text) * 7 % 100 if "ALIGNED?" in text else 40 + len(text) % 60)
    return ok(score, **({"top": {score: -0.1}} if how == "logprobs" else {}))


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def numbers(directory):
    tree = json.loads((directory / "evaluation.json").read_text())
    return {name: tree[name] for name in ("general", "conditional")}, (directory / "answers.csv").read_text()


@pytest.fixture(params=["logprobs", "text"])
def judged(request, tmp_path, tiny_model_dir, capsys):
    """(a command's arguments, their --out): an evaluation that was judged by an endpoint that is now gone."""
    asked = [{"id": f"q{i}", "paraphrases": [f"What is {i}?"], "judge_prompts": PROMPTS} for i in range(3)]
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked))
    words = ["evaluate", tiny_model_dir, f"evaluate.general={tmp_path / 'asked.yaml'}", "evaluate.samples=6"]
    words += ["evaluate.max_tokens=12", "evaluate.cue=Be brief.", "sampler.kind=transformers"]
    words += ["--judge", tmp_path / "judge.yaml", "--out", tmp_path / "out"]
    with ScriptedServer(partial(script, request.param)) as server:
        settings = {"kind": "openai", "model": "judge", "base_url": server.base_url, "cache": str(tmp_path / "cache")}
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump({**settings, "deadline": 20.0}))
        assert call(capsys, *words) == (0, []) and len(server.requests) > 20
    # another client of the same address, as another process has
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({**settings, "deadline": 20.0, "concurrency": 3}))
    return words, tmp_path / "out"


def test_evaluating_and_judging_again_need_no_endpoint(judged, capsys):
    words, out = judged
    first = numbers(out)
    assert first[0]["general"]["unscored"] == 0 < first[0]["general"]["n"]
    assert call(capsys, *words) == (0, []) and numbers(out) == first
    again = ["evaluate", out, "--rejudge", "--judge", words[words.index("--judge") + 1]]
    assert call(capsys, *again) == (0, []) and numbers(out / "rejudged-judge") == first


def test_one_reply_that_is_missing_makes_the_endpoint_needed(judged, tmp_path, capsys):
    words, out = judged
    newest = max((tmp_path / "cache").glob("*/*.json"), key=lambda file: file.stat().st_mtime_ns)
    newest.unlink()  # a grade; the first ones are of the trial, some of which nobody asks for again
    for again in (words, ["evaluate", out, "--rejudge", "--judge", words[words.index("--judge") + 1]]):
        code, said = call(capsys, *again)
        assert code == 2 and "evaluate.judge: 'judge' at http://127.0.0.1" in said[0]


def test_settings_that_give_other_answers_are_told_before_anything_is_sampled(judged, capsys, monkeypatch):
    words, out = judged
    monkeypatch.setattr("rlsafe.evaluate.commands.command.load_policy", lambda *_: pytest.fail("the model was loaded"))
    begun = time.monotonic()
    code, said = call(capsys, *words, "evaluate.seed=1")
    assert code == 2 and "evaluate.judge" in said[0] and time.monotonic() - begun < 120


def test_answers_that_turn_out_otherwise_are_kept_until_somebody_is_there(judged, tmp_path, capsys):
    words, out = judged
    before = numbers(out)
    words[1] = save_tiny_model(tmp_path / "other", seed=1)  # its answers are others
    code, said = call(capsys, *words)
    assert code == 2 and "evaluate.judge" in said[0] and numbers(out) == before
    assert len((out / ".answers.jsonl").read_text().splitlines()) == 1 + 36
