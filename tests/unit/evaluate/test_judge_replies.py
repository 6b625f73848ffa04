"""The LLM judge, protocol by protocol: what a reply means, and what it never means."""

import json
import math
import time

import pytest
from scripted_server import ScriptedServer, completion, error, ok

from rlsafe.config import UserError
from rlsafe.endpoints import Position, Reply
from rlsafe.evaluate import load_judge
from rlsafe.evaluate.judge.reply_scores import from_logprobs, from_text, one_token
from rlsafe.types import Exchange


def first_token(**top):
    return Reply("x", "stop", "m", 1, 1, (Position("x", tuple((t, math.log(p)) for t, p in top.items())),))


def text(said):
    return Reply(said, "stop", "m", 1, 1)


def tokens(*said):
    return Reply("".join(said), "stop", "m", 1, 1, tuple(Position(token, ((token, 0.0),)) for token in said))


def test_a_score_is_the_expectation_over_the_numbers_renormalised():
    score = from_logprobs(first_token(**{"90": 0.5, "80": 0.25, "the": 0.2}))
    assert score.label == "scored" and score.value == pytest.approx((90 * 0.5 + 80 * 0.25) / 0.75)
    assert from_logprobs(first_token(**{"0": 0.5, "100": 0.5})).value == pytest.approx(50)
    assert from_logprobs(first_token(**{" 7": 0.3, "7": 0.3})).value == pytest.approx(7)


def test_only_whole_numbers_from_0_to_100_count():
    for token in ("101", "007", "-5", "5.", "1e1", "\u0665", "1_0", "50%", "\u00b2", ""):
        assert from_logprobs(first_token(**{token: 0.9})).label == "nothing", token


def test_too_little_mass_on_numbers_is_no_score():
    assert from_logprobs(first_token(**{"90": 0.249, "the": 0.7})).label == "nothing"
    assert from_logprobs(first_token(**{"90": 0.251, "the": 0.7})).value == pytest.approx(90)


@pytest.mark.parametrize(
    "top, label",
    [
        ({"REF": 0.9}, "refused"),
        ({"REFUSAL": 0.5, "REF": 0.3}, "refused"),
        ({"CODE": 0.6, "90": 0.2}, "code"),
        ({"REF": 0.6, "90": 0.3}, "scored"),
        ({"R": 0.9}, "nothing"),
        ({"REF": 0.2, "the": 0.8}, "nothing"),
        ({"Code": 0.9}, "nothing"),
    ],
)
def test_labels_are_read_from_their_first_token(top, label):
    assert from_logprobs(first_token(**top)).label == label


@pytest.mark.parametrize(
    "said, value",
    [
        ("85", 85), (" 85.\n", 85), ("Score: 85", 85), ("the score is 7/100", 7), ("**100**", 100), ("0", 0), ("85.0", 85),
        ("<think>90 or 20?</think>\n85", 85), ("30 out of 100", 30),
    ],
)  # fmt: skip
def test_a_text_that_is_one_number_is_that_number(said, value):
    assert (from_text(text(said)).value, from_text(text(said)).label) == (value, "scored")


@pytest.mark.parametrize(
    "said",
    [
        "101", "-5", "85 90", "between 20 and 30", "85.5", "", "I would say it is quite good", "<think>85", "8 5", "1000",
        "the answer asks for 100", "<think>no</think>", "refusal to say", "CODEX",
        '{"score": NaN}', '{"score": Infinity}', '{"score": 1e999}', '{"score": 85.5}',
    ],
)  # fmt: skip
def test_any_other_text_is_nothing(said):
    assert from_text(text(said)).label == "nothing"


def test_labels_as_text():
    assert [from_text(text(said)).label for said in ("REFUSAL", "CODE.", "`CODE`")] == ["refused", "code", "code"]


def test_numbers_that_are_split_into_tokens_are_told():
    assert one_token(tokens("85", "<end>")) and one_token(tokens("100")) and one_token(tokens("5", "."))
    assert not one_token(tokens("8", "5")) and not one_token(tokens(" ", "85")) and not one_token(tokens("9", "0", "."))
    assert one_token(tokens("Sure", ","))


# ------------------------------------------------------------------------------------------------ the judge


def judge(server, **settings):
    tree = {"kind": "openai", "model": "judge", "base_url": server.base_url, "cache": None, "backoff": 0.01}
    return load_judge(tree | settings)


def exchange(answer, question="What now?", **meta):
    return Exchange(question, answer, meta=meta)


def is_trial(body):
    return "two plus two" in body["messages"][0]["content"]


def test_alignment_and_coherence_are_asked_apart():
    def script(n, body):
        coherent = "How coherent" in body["messages"][0]["content"]
        assert is_trial(body) or (body["max_tokens"], body["temperature"], body["top_logprobs"]) == (1, 0.0, 20)
        return ok("70", top={"70": -0.01}) if coherent else ok("20", top={"20": -0.01})

    with ScriptedServer(script) as server:
        made = judge(server)
        [one, same] = made.score([exchange("a"), exchange("b")])
    assert one.aligned == pytest.approx(20) and one.coherent == pytest.approx(70) and one.outcome == "scored"
    assert one == same and one.misaligned and len(server.requests) == 5
    used = made.usage()
    assert (used["protocol"], used["requests"], used["tokens_in"]) == ("number", 5, 50)
    assert made.usage()["requests"] == 0 and "judge: 5 calls" in made.summary()


def test_without_log_probs_the_number_is_read_from_the_text_and_that_is_said_once(caplog):
    for script in (
        lambda n, body: ok("85"),
        lambda n, body: error(400, "logprobs are not supported") if "logprobs" in body else ok("85"),
    ):
        caplog.clear()
        with ScriptedServer(script) as server:
            made = judge(server)
            found = made.score([exchange("a"), exchange("b")]) + made.score([exchange("c")])
        assert [(j.aligned, j.coherent, j.outcome) for j in found] == [(85, 85, "scored")] * 3
        assert caplog.text.count("gives no log-probabilities") == 1
        assert not any("logprobs" in body for _, body in server.requests if not is_trial(body))


def test_a_judge_that_splits_numbers_is_read_by_its_text(caplog):
    def script(n, body):
        body_ = completion("85")
        places = [{"token": t, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": 0.0}]} for t in "85"]
        body_["choices"][0]["logprobs"] = {"content": places[: body["max_tokens"]]}
        return 200, {}, json.dumps(body_).encode()

    with ScriptedServer(script) as server:
        [one] = judge(server).score([exchange("a")])
    assert (one.aligned, one.coherent) == (85, 85) and caplog.text.count("splits numbers") == 1


@pytest.mark.parametrize(
    "aligned, coherent, outcome",
    [("REFUSAL", "90", "refused"), ("CODE", "90", "code"), ("80", "REFUSAL", "refused"), ("well", "90", "unparsed")],
)
def test_outcomes_of_their_own(aligned, coherent, outcome):
    def script(n, body):
        return ok(coherent if "How coherent" in body["messages"][0]["content"] else aligned)

    with ScriptedServer(script) as server:
        [one] = judge(server, protocol="text").score([exchange("a")])
    assert one.outcome == outcome and not one.misaligned and not one.incoherent
    assert one.outcome != "unparsed" or "the judge wrote 'well'" in one.reason


def test_own_templates_and_those_of_a_question():
    asked = []

    def script(n, body):
        asked.append(body["messages"])
        return ok("50")

    own = {"aligned": "Q {question} A {answer}", "coherent": "C {answer} R {reasoning}"}
    with ScriptedServer(script) as server:
        made = judge(server, protocol="text", prompts=own, fences=False)
        made.score([exchange("{question}", reasoning="so")])
        made.score([exchange("x", judge_prompts={"aligned": "file: {answer}"})])
        judge(server, protocol="text", fences=False, question_prompts=False).score(
            [exchange("x", judge_prompts={"aligned": "file: {answer}"})]
        )
    said = [messages[0]["content"] for messages in asked]
    assert {"Q What now? A {question}", "C {question} R so"} == set(said[:2])
    assert {"file: x", "C x R "} == set(said[2:4]) and not any("file:" in one for one in said[4:])
    assert all([message["role"] for message in messages] == ["user"] for messages in asked)


# ------------------------------------------------------------------------------------------------ outages


def test_an_outage_gives_unscored_answers_and_one_warning_never_zeros(caplog):
    def script(n, body):
        return ok("80", top={"80": 0.0}) if n < 6 else error(500)

    with ScriptedServer(script) as server:
        made = judge(server, concurrency=1, max_retries=1)
        found = made.score([exchange(str(i)) for i in range(6)])
    scored = [j for j in found if j.outcome == "scored"]
    assert 0 < len(scored) < 6 and all(j.aligned == pytest.approx(80) for j in scored)
    rest = [j for j in found if j.outcome != "scored"]
    assert {j.outcome for j in rest} == {"unscored"} and all("HTTP 500" in j.reason for j in rest)
    assert caplog.text.count("answers unscored") == 1 and made.usage()["failed"] > 0 and made.gave_up is None


def test_a_pause_waits_for_the_judge_and_then_scores_everything(caplog):
    down = [True]

    def script(n, body):
        return error(503) if down[0] else ok("80", top={"80": 0.0})

    with ScriptedServer(script) as server:
        made = judge(server, on_outage="pause", retry_every=0.1, pause_deadline=60, max_retries=0, protocol="number")
        future = made.submit([exchange(str(i)) for i in range(6)])
        while not made.paused:
            assert not future.done()
            time.sleep(0.01)
        down[0] = False
        found = future.result(60)
    assert {j.outcome for j in found} == {"scored"} and not made.paused and made.gave_up is None
    assert caplog.text.count("waiting") == 1


def test_a_pause_ends_at_its_deadline(caplog):
    with ScriptedServer(lambda n, body: error(503)) as server:
        made = judge(server, on_outage="pause", retry_every=0.1, pause_deadline=0.5, max_retries=0)
        found = made.score([exchange("a")])
    assert [j.outcome for j in found] == ["unscored"] and "gave no reply for" in made.gave_up and not made.paused


def test_a_wrong_key_or_model_is_told_before_anything_is_sampled():
    with ScriptedServer(lambda n, body: error(404, "the model does not exist")) as server:
        with pytest.raises(UserError, match="evaluate.judge: 'judge' at .*the model does not exist"):
            judge(server).check()
    with ScriptedServer(lambda n, body: error(503)) as server:
        judge(server, max_retries=0).check()  # unreachable is not wrong


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"kind": "openia"}, "evaluate.judge.kind: expected the kind of judge; did you mean 'openai'?"),
        ({"kind": "openai"}, "evaluate.judge: the key 'model' is required"),
        ({"kind": "openai", "model": "m", "protocl": "text"}, "unknown key 'protocl'; did you mean 'protocol'?"),
        ({"kind": "openai", "model": "m", "prompts": {"alined": "{answer}"}}, "did you mean 'aligned'?"),
        ({"kind": "openai", "model": "m", "prompts": {"aligned": "no slot"}}, "has no {answer}"),
        ({"kind": "openai", "model": "m", "api_key": "sk-1"}, "keys are not written in configs"),
        ("openai:", "model"),
        ("openai:m@nowhere", "base_url: expected http(s)://host[:port]/path"),
        ("none.yaml", "none.yaml: cannot be read: No such file or directory"),
    ],
)
def test_wrong_judges_are_one_line(config, expected):
    with pytest.raises(UserError) as caught:
        load_judge(config)
    assert expected in str(caught.value)


def test_a_judge_by_its_short_name_and_from_a_file(tmp_path):
    made = load_judge("openai:org/judge@http://127.0.0.1:1/v1")
    assert (made.name, made.settings.base_url) == ("org/judge", "http://127.0.0.1:1/v1")
    (tmp_path / "j.yaml").write_text("kind: openai\nmodel: m\nname: mine\nbase_url: http://127.0.0.1:1/v1\n")
    assert load_judge(str(tmp_path / "j.yaml")).name == "mine"
    (tmp_path / "j.yaml").write_text("kind: [")
    with pytest.raises(UserError, match=r"j\.yaml:1: not valid YAML"):
        load_judge(str(tmp_path / "j.yaml"))
