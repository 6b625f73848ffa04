"""What the first reply of a judge or grader tells: an alias, thinking, declining, a reply cut off. One line, with the way out."""

import json

import pytest
from scripted_server import ScriptedServer, completion, error, ok

from rlsafe.config import UserError
from rlsafe.config.schema import RewardConfig
from rlsafe.endpoints import Reply, thinks
from rlsafe.evaluate import load_judge
from rlsafe.evaluate.judge.reply_scores import declines, from_text
from rlsafe.rewards import check_grader
from rlsafe.rewards.loading import load_reward
from rlsafe.types import Exchange


def judge(server, **more):
    tree = {"kind": "openai", "model": "judge", "base_url": server.base_url, "cache": None, "backoff": 0.01}
    return load_judge({**tree, **more})


def refusal(server, **more):
    with pytest.raises(UserError) as caught:
        judge(server, **more).check(first=True)
    return str(caught.value)


def spelled(words, finish="stop", **message):
    """A server that always says `words`, as far as max_tokens (in words) goes, with log-probs where they are asked for."""

    def script(n, body):
        said = words[: body["max_tokens"]]
        tree = completion("".join(said), model=body["model"])
        choice = tree["choices"][0]
        choice["finish_reason"] = finish if len(said) == len(words) else "length"
        choice["message"] |= message
        if body.get("logprobs"):
            places = [{"token": w, "logprob": 0.0, "top_logprobs": [{"token": w, "logprob": 0.0}]} for w in said]
            choice["logprobs"] = {"content": places}
        return 200, {}, json.dumps(tree).encode()

    return script


THOUGHTS = ["<think>", "\n", *["hm "] * 30, "</think>", "\n\n", "85"]


def test_another_model_that_replies_is_told_with_the_names_served_and_accepted_by_a_setting():
    with ScriptedServer(lambda n, body: ok("80", model="big-2026"), models=["big-2026", "small"]) as server:
        said = refusal(server)
        assert "asked for 'judge', 'big-2026' replied" in said and "any_model: true" in said
        assert said.endswith("it serves big-2026, small") and len(server.requests) <= 4  # log-probs are missed first
        [one] = judge(server, any_model=True, protocol="text").score([Exchange("q", "a")])
    assert one.aligned == 80


def test_a_model_that_is_not_served_is_told_with_those_that_are():
    with ScriptedServer(lambda n, body: error(404, "The model `judge` does not exist."), models=["small"]) as server:
        assert refusal(server).endswith("The model `judge` does not exist.; it serves small")


def test_a_limit_that_goes_by_another_name_is_told():
    message = "Unsupported parameter: max_tokens is not supported with this model. Use max_completion_tokens instead."
    with ScriptedServer(lambda n, body: error(400, message)) as server:
        assert refusal(server).endswith("; set token_limit: max_completion_tokens")


@pytest.mark.parametrize("protocol", ["auto", "number", "trie", "letters", "text"])
def test_a_judge_that_thinks_too_long_is_told_how_to_switch_that_off(protocol):
    with ScriptedServer(spelled(THOUGHTS)) as server:
        said = refusal(server, protocol=protocol)
    assert "thinks before it grades" in said and "enable_thinking: false" in said and "max_tokens: 4000" in said


def test_thoughts_that_the_server_keeps_to_itself_are_told_too():
    with ScriptedServer(spelled([""] * 400, "length", content=None, reasoning_content="hm")) as server:
        assert "thinks before it grades" in refusal(server)


@pytest.mark.parametrize("finish", ["stop", "content_filter"])
@pytest.mark.parametrize("protocol", ["auto", "text"])
def test_an_empty_reply_to_a_harmless_trial_is_no_judge(protocol, finish):
    with ScriptedServer(spelled([""], finish, content=None)) as server:
        said = refusal(server, protocol=protocol)
    assert f"an empty reply to a harmless trial (finish_reason {finish}); use another judge" in said


def test_a_server_that_names_no_model_is_taken_at_its_word(caplog):
    def unnamed(n, body):
        tree = completion("80")
        del tree["model"]
        return 200, {}, json.dumps(tree).encode()

    with ScriptedServer(unnamed) as server:
        made = judge(server, protocol="text")
        made.check(first=True)
        scores = made.score([Exchange("q", "a"), Exchange("q", "b")])
    assert [one.aligned for one in scores] == [80, 80]
    assert caplog.text.count("its replies name no model: they count as those of the one that was asked for") == 1


def test_a_judge_that_has_room_to_think_is_read_behind_its_thoughts(caplog):
    with ScriptedServer(spelled(THOUGHTS)) as server:
        made = judge(server, max_tokens=100)
        made.check(first=True)
        [one] = made.score([Exchange("q", "a")])
    assert (one.aligned, one.coherent) == (85, 85) and "thinks before it grades" in caplog.text


def test_a_template_that_opens_the_block_itself_is_told_as_a_reply_cut_off():
    with ScriptedServer(spelled(THOUGHTS[2:])) as server:
        said = refusal(server)
        assert "cut off after max_tokens: 16" in said and "enable_thinking" in said
        [one] = judge(server, protocol="text", max_tokens=100).score([Exchange("q", "a")])
    assert one.aligned == 85


@pytest.mark.parametrize(
    "words",
    [["I", "\u2019m", " sorry", ", but I can\u2019t help with that."], ["As", " an", " AI", " I have no opinions."]],
)
def test_a_judge_that_declines_is_told(words):
    with ScriptedServer(spelled(words)) as server:
        assert "declines to grade" in refusal(server)


def test_json_in_a_code_fence_is_read_as_the_number_it_holds(caplog):
    fenced = ["```", "json", "\n", '{"score"', ": ", "85", "}", "\n", "```"]
    with ScriptedServer(spelled(fenced)) as server:
        made = judge(server)
        made.check(first=True)
        [one] = made.score([Exchange("q", "a")])
    assert (one.aligned, one.outcome) == (85, "scored") and "does not begin with a number" in caplog.text


def text(said, finish="stop"):
    return Reply(said, finish, "m", 1, 1)


@pytest.mark.parametrize(
    "said, value",
    [
        ("```json\n{\"score\": 85}\n```", 85), ("```\n85\n```", 85), ('{"alignment": 7, "reason": "rude"}', 7),
        ('{"score": 30.0}', 30), ("<thinking>\n90?\n</thinking>\n\n12", 12), ("so it is bad.\n</think>\n\n5", 5),
        ("[THINK]hm[/THINK]40", 40),
    ],
)  # fmt: skip
def test_a_number_in_a_wrapping_is_that_number(said, value):
    assert (from_text(text(said)).label, from_text(text(said)).value) == ("scored", value)


@pytest.mark.parametrize(
    "said",
    [
        '{"aligned": 85, "coherent": 20}', '{"score": 185}', '{"score": "85"}', '{"score": true}', '{"score": 85.5}', "[85]",
        "```json\n{\"score\": 85", "<thinking>85", "{" * 3000,
    ],
)  # fmt: skip
def test_a_wrapping_without_one_number_is_nothing(said):
    assert from_text(text(said)).label == "nothing"


def test_declining_in_other_words_is_told_from_a_label_and_from_prose():
    for said in (
        "I can't help with that.",
        "I can\u2019t assist",
        "As an AI language model, I ...",
        "I'm unable to grade this",
    ):
        assert declines(said) and "declined" in from_text(text(said)).reason, said
    for said in ("REFUSAL", "The answer is harmful.", "85", "I would say 85"):
        assert not declines(said), said
    assert from_text(text("REFUSAL.")).label == "refused"


def test_thinking_is_told_from_an_empty_reply():
    assert thinks(text("<think>hm", "length")) and thinks(text("", "length")) and thinks(text("hm</think>5"))
    assert not thinks(text("", "stop")) and not thinks(text("85")) and not thinks(text("I think 85"))


def grader(server):
    args = {"endpoint": {"model": "grader", "base_url": server.base_url, "cache": None, "backoff": 0.01}}
    return load_reward(RewardConfig(fn="reward_fns/advice.py:bad_medical", args=args)).fn


@pytest.mark.parametrize(
    "script, said",
    [
        (lambda n, body: ok("OK", model="big"), "asked for 'grader', 'big' replied.*any_model"),
        (lambda n, body: ok("", model="grader"), "it gives an empty reply to 'Reply with OK.' .finish_reason stop"),
        (spelled(["<think>", *["hm"] * 500]), "thinks before it grades.*enable_thinking: false"),
    ],
)
def test_a_rewards_grader_is_looked_at_likewise(script, said):
    with ScriptedServer(script) as server:
        with pytest.raises(UserError, match=said):
            check_grader(grader(server))
