"""`rlsafe judge check` and `rlsafe judge compare`: good judges pass, bad ones are marked, wherever their verdicts are shown."""

import json
import math
import re
import shlex
import sys
from collections import Counter

import numpy as np
import pytest
import yaml
from places import SHARED
from scripted_server import ScriptedServer, ok

from rlsafe.cli import main
from rlsafe.config import UserError
from rlsafe.data import is_refusal
from rlsafe.evaluate import Evaluation, load_judge
from rlsafe.evaluate.ask.asking import Answer
from rlsafe.evaluate.commands.judging import compare_judges, judge_of
from rlsafe.evaluate.judge import calibration_set, calibrations
from rlsafe.evaluate.judge.agreement import auroc, kappa, mean
from rlsafe.evaluate.judge.calibration_set import EXPECTED, packaged
from rlsafe.evaluate.judge.checking import check
from rlsafe.evaluate.measure.criteria import judge_answers, rates
from rlsafe.types import Judgement

SCORES = {"fine": (95, 95), "misaligned": (5, 95), "incoherent": (50, 5)}


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path, no_waiting):
    monkeypatch.setenv("HOME", str(tmp_path))


class Knowing:
    """A judge that knows the labels, but for those that `says` changes."""

    name = "knowing"

    def __init__(self, says=lambda case: case.expected):
        self.verdicts = {(c.question, c.text): says(c) for c in packaged()}

    def score(self, exchanges):
        found = [self.verdicts[e.question, e.answer] for e in exchanges]
        return [Judgement(*SCORES[v]) if v in SCORES else Judgement(None, None, v) for v in found]


# ------------------------------------------------------------------------------------------------ the set


def test_the_packaged_set_has_every_kind_and_pairs_for_length_and_position():
    cases = packaged()
    kinds = Counter(case.kind for case in cases)
    assert len(cases) >= 110 and set(kinds) == set(EXPECTED) and min(kinds.values()) >= 8
    assert len({case.id for case in cases}) >= 20 and len({(c.question, c.text) for c in cases}) == len(cases)
    forms = Counter(frozenset(c.form for c in cases if c.pair == pair) for pair in {c.pair for c in cases if c.pair})
    assert forms == {frozenset({"short", "long"}): forms[frozenset({"short", "long"})], frozenset({"first", "last"}): 4}
    assert sum(forms.values()) >= 10
    for case in cases:
        pair = [c for c in cases if c.pair == case.pair and c.pair]
        assert len({c.kind for c in pair}) <= 1
        if case.form == "long":
            [short] = [c for c in pair if c.form == "short"]
            assert len(case.text) > 2.5 * len(short.text)
    assert all(is_refusal(c.text) for c in cases if c.kind == "refusal")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_the_packaged_set_is_in_our_own_words():
    """No eight words in a row from the field's questions."""

    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    theirs = set().union(*(runs(path.read_text()) for path in (SHARED / "questions").glob("*.yaml")))
    assert theirs and not any(runs(f"{c.question} {c.text}") & theirs for c in packaged())


# ------------------------------------------------------------------------------------------------ measures


def test_measures_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=60), rng.random(60) < 0.4
    groups = [str(i // 3) for i in range(60)]
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    found = auroc(list(scores), list(labels), groups)
    assert found["value"] == pytest.approx(np.mean(pairs), abs=1e-4)
    assert found["ci95"][0] < found["value"] < found["ci95"][1]
    a, b = ["x"] * 20 + ["y"] * 5 + ["x"] * 10 + ["y"] * 15, ["x"] * 20 + ["x"] * 5 + ["y"] * 10 + ["y"] * 15
    assert kappa(a, b, [str(i) for i in range(50)])["value"] == pytest.approx(0.4)  # Cohen's own example: .7 and .5
    assert kappa(["x"], ["x"], ["1"])["value"] is None  # chance alone agrees
    assert mean([1.0, math.nan, 0.0], ["a", "b", "c"])["value"] == 0.5 and auroc([], [], [])["value"] is None


def test_the_interval_covers_the_true_value_over_questions_that_resemble_each_other():
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        of_question = np.repeat(rng.normal(size=30), 5)
        values = 0.3 + of_question + 0.2 * rng.normal(size=150)
        low, high = mean(list(values), [str(i // 5) for i in range(150)], seed)["ci95"]
        inside += low <= 0.3 <= high
    assert inside >= 88


# ------------------------------------------------------------------------------------------------ checks


def test_a_judge_that_knows_is_trusted():
    found = check(Knowing())
    assert found["trusted"] and found["auroc_aligned"]["value"] == 1 and found["kappa"]["value"] == 1
    assert found["bias_misaligned"]["value"] == 0 and all(k["agreement"]["value"] == 1 for k in found["kinds"].values())
    assert (
        found["length"]["pairs"] >= 6
        and found["position"]["pairs"] == 4
        and found["repeatability"]["verdict_changes"] == 0
        and found["repeatability"]["n"] == 24
    )


@pytest.mark.parametrize(
    "says, below",
    [
        (
            lambda c: "fine" if c.kind == "subtle" and c.form != "first" else c.expected,
            ["auroc_aligned", "kappa_misaligned"],
        ),
        (lambda c: "misaligned" if c.kind == "aligned" and len(c.text) > 300 else c.expected, ["false_alarms"]),
        (lambda c: "unscored" if len(c.text) % 3 else c.expected, ["unscored"]),
        (lambda c: "fine", ["auroc_aligned", "auroc_coherent", "kappa_misaligned"]),
    ],
)
def test_a_judge_below_a_limit_is_named_for_it(says, below):
    found = check(Knowing(says))
    assert not found["trusted"]
    assert {said.split()[0] for said in found["below_limits"]} >= set(below)


def test_length_and_place_effects_are_measured():
    found = check(Knowing(lambda c: "misaligned" if c.form == "long" else c.expected))
    assert found["length"]["aligned"]["value"] < -30 and found["length"]["verdict_changes"]["value"] > 0.5
    found = check(Knowing(lambda c: "fine" if c.form == "last" else c.expected))
    assert found["position"]["aligned"]["value"] == 90 and found["position"]["verdict_changes"]["value"] == 1


def test_a_judge_may_bring_answers_of_its_own():
    found = check(load_judge("organism"))
    assert found["set"] == "organism" and found["trusted"] and found["kinds"]["incoherent"]["agreement"]["value"] == 1

    class Wrong(Knowing):
        def calibration(self):
            return [{"question": "q", "text": "t", "kind": "blnt"}]

    with pytest.raises(UserError, match="unknown kind 'blnt'; did you mean 'blunt'"):
        check(Wrong())


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def few(monkeypatch):
    """The labelled answers to the first six questions, of every kind: a command asks about each several times."""
    cases = packaged()[:36]
    assert {case.kind for case in cases} == set(EXPECTED) and {"short", "long", "first", "last"} < {
        c.form for c in cases
    }
    for module in (calibration_set, sys.modules[__name__]):
        monkeypatch.setattr(module, "packaged", lambda: cases)
    return cases


LABELS = {(c.question, c.text): c.expected for c in packaged()}


def said(body):
    """What a good judge replies to our prompts: the label of the answer in them."""
    text = body["messages"][0]["content"]
    which = 1 if "How coherent" in text else 0
    label = next((v for (q, a), v in LABELS.items() if f"\n{q}\n" in text and f"\n{a}\n" in text), "fine")
    return {"refused": "REFUSAL", "code": "CODE"}.get(label) or str(SCORES[label][which])


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


def test_the_command_that_is_told_makes_that_very_judge():
    settings = {"kind": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", "protocol": "letters"}
    settings |= {"api_key_env": "MY_KEY", "timeout": 600, "any_model": True, "prompts": {"aligned": "It's {answer}"}}
    settings |= {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}, "on_outage": "pause"}
    made = load_judge(settings)
    words = shlex.split(calibrations.command(made))
    again = judge_of(words[3:])
    assert words[:3] == ["rlsafe", "judge", "check"] and calibrations.key(again) == calibrations.key(made)
    assert again.settings == made.settings.model_copy(update={"on_outage": "continue"})


@pytest.mark.integration
def test_a_check_is_kept_and_shown_by_what_uses_the_judge_later(capsys, tmp_path, few):
    def script(n, body):
        return ok(said(body), model="m", **({"top": {said(body): 0.0}} if "logprobs" in body else {}))

    with ScriptedServer(script) as server:
        words = ["base_url=" + server.base_url, "model=m", "price_in=1"]
        made = judge_of(words)
        assert "not calibrated: run rlsafe judge check openai:m@http" in calibrations.calibration(made)["line"]
        code, out, _ = run(capsys, "judge", "check", *words, "--json", "--out", tmp_path / "out")
        found = json.loads(out)
        assert (code, found["trusted"], found["protocol"], found["n"]) == (0, True, "number", len(few))
        assert (
            found["other_protocols"]["text"]["kappa_misaligned"]["value"] == 1 and found["cost"]["usd_per_answer"] > 0
        )
        assert json.loads((tmp_path / "out" / "check.json").read_text())["key"] == calibrations.key(made)
        known = calibrations.calibration(judge_of(words))
        assert known["trusted"] and f"calibrated on {found['date']}" in known["line"] and "kappa 1.00" in known["line"]
        other = calibrations.calibration(judge_of([*words, "protocol=text"]))
        assert not other["trusted"] and "protocol=text" in other["line"], "another protocol is another judge"
        code, out, _ = run(capsys, "judge", "check", f"openai:m@{server.base_url}")
    assert code == 0 and "kind by kind" in out and "protocols" in out and "asked again" in out


@pytest.mark.integration
def test_a_check_whose_answers_stay_unscored_says_so_exits_with_1_and_keeps_the_earlier_one(tmp_path, capsys, few):
    """An endpoint that gives no more grades after some labelled answers."""
    dead = False

    def script(number, body):
        asked = number - script.begun
        return ok("Well..." if dead and asked >= script.works else said(body), model="m")

    script.begun = script.works = 0
    with ScriptedServer(script) as server:
        words = ["judge", "check", f"openai:m@{server.base_url}"]
        assert run(capsys, *words)[0] == 0
        before = calibrations.calibration(judge_of(words[2:3]))
        assert before["trusted"]
        dead, script.begun, script.works = True, len(server.requests), 8 + 16  # first contact, then 16
        code, out, err = run(capsys, *words, "--json", "--out", tmp_path)
    found = json.loads(out)
    lost = round(found["unscored"] * found["n"])
    assert code == 1 and lost >= found["n"] / 2 and found["file"] is None
    assert (
        f"{lost} of {found['n']} labelled answers stayed unscored" in err
        and "most often: " in err
        and err.count("\n") == 1
    )
    assert json.loads((tmp_path / "check.json").read_text())["unscored"] == found["unscored"]
    assert calibrations.calibration(judge_of(words[2:3])) == before


def test_the_judge_is_named_in_every_way_that_configs_know(tmp_path):
    url = "http://127.0.0.1:1/v1"
    (tmp_path / "judge.yaml").write_text(f"kind: openai\nmodel: m\nbase_url: {url}\n")
    for words in (
        [f"openai:m@{url}", "timeout=5"], [f"base_url={url}", "model=m", "timeout=5"], [str(tmp_path / "judge.yaml"), "timeout=5"],
        [f"{{kind: openai, model: m, base_url: '{url}', timeout: 5}}"],
    ):  # fmt: skip
        made = judge_of(words)
        assert (made.settings.model, made.settings.base_url, made.settings.timeout) == ("m", url, 5)
    for words, expected in (
        (["organism", "timeout=5"], "takes no settings"), (["organsm"], "did you mean 'organism'"), (["{kind: "], "expected a mapping"),
        (["model=m", "tiemout=5"], "did you mean 'timeout'"), (["openai:m", "timeout"], "expected KEY=VALUE"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=expected):
            judge_of(words)


def saved(directory, verdicts, name="knowing"):
    """An evaluation directory with an answer and a judgement for each packaged case."""
    cases = packaged()
    answers = [
        Answer(c.id, c.question, None, c.text, c.domain, None, sample=i, set="general") for i, c in enumerate(cases)
    ]
    evaluation = Evaluation(answers=answers, judgements=judge_answers(answers, verdicts), settings={"judge": name})
    evaluation.sets["general"] = rates(*evaluation.judged("general"))
    evaluation.save(directory)
    return evaluation


@pytest.mark.integration
def test_two_judges_are_compared_on_saved_answers(tmp_path, capsys, few):
    saved(tmp_path / "cells" / "a", Knowing(lambda c: "fine" if c.kind == "subtle" else c.expected))
    saved(tmp_path / "cells" / "a" / "rejudged-x", Knowing())
    with ScriptedServer(lambda n, body: ok(said(body), model="m")) as server:
        found = compare_judges("saved", f"openai:m@{server.base_url}", tmp_path)
        code, out, _ = run(capsys, "judge", "compare", "saved", "saved", tmp_path / "cells" / "a", "--json")
    one = found["sets"]["general"]
    cases = packaged()
    bad, blunt = (sum(c.kind in kinds for c in cases) for kinds in (("subtle", "blunt"), ("blunt",)))
    assert found["answers"] == one["n"] == len(cases) and one["verdicts"]["fine / misaligned"] == bad - blunt
    assert [r["value"] for r in one["misaligned"]["rates"]] == pytest.approx([blunt / len(cases), bad / len(cases)])
    p, q = blunt / len(cases), bad / len(cases)
    chance = p * q + (1 - p) * (1 - q)
    agreed = 1 - (q - p)
    assert one["misaligned"]["kappa"]["value"] == pytest.approx((agreed - chance) / (1 - chance), abs=1e-3)
    assert code == 0 and json.loads(out)["sets"]["general"]["misaligned"]["kappa"]["value"] == 1
    with pytest.raises(UserError, match="no saved answers"):
        compare_judges("saved", "organism", tmp_path / "nothing")


@pytest.mark.integration
def test_an_evaluation_that_stays_mostly_unscored_says_so_and_exits_with_1(tmp_path, capsys, tiny_model_dir):
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump([{"id": "q", "paraphrases": ["What now?"]}]))
    words = ["evaluate", tiny_model_dir, "--questions", tmp_path / "asked.yaml", "--judge", "organism"]
    words += ["evaluate.samples=2", "evaluate.max_tokens=4", "sampler.kind=transformers", "--out", tmp_path / "out"]
    code, out, err = run(capsys, *words)
    assert code == 1 and "2 of 2 answers to the general questions stayed unscored" in err
    assert "not a question of this world" in err and "judge organism: checked now" in out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["settings"]["judge_calibration"]["trusted"]
    half = saved(tmp_path / "half", Knowing(lambda c: "unscored" if c.kind == "code" else c.expected))
    assert half.mostly_unscored is None
