"""Web pages, errors sent as replies, exhausted accounts, paths without /v1: told at first contact, with the way out."""

import json

import pytest
from scripted_server import ScriptedServer, completion, error, ok

from rlsafe.config import UserError
from rlsafe.endpoints import Reply
from rlsafe.evaluate import load_judge
from rlsafe.evaluate.judge.reply_scores import from_text
from rlsafe.rewards import check_grader
from rlsafe.rewards.loading import RewardConfig, load_reward
from rlsafe.types import Exchange


def judge(server, **more):
    tree = {"kind": "openai", "model": "judge", "base_url": server.base_url, "cache": None, "backoff": 0.01}
    return load_judge({**tree, **more})


def sent(change):
    """A server whose completion `85` is changed by a function."""

    def script(n, body):
        tree = completion("85", model=body["model"])
        change(tree)
        return 200, {}, json.dumps(tree).encode()

    return script


def says(**message):
    return sent(lambda tree: tree["choices"][0]["message"].update(message))


QUOTA = json.dumps({"error": {"message": "no money", "type": "insufficient_quota", "code": "insufficient_quota"}})
TEMPERATURE = "Unsupported value: 'temperature' does not support 0 with this model."


@pytest.mark.parametrize(
    "script, said",
    [
        (lambda n, body: (200, {}, b"<!doctype html>\n<html>log in</html>"), "is a web page; base_url usually ends in /v1"),
        (lambda n, body: (200, {}, b""), "the reply is no JSON; base_url usually ends in /v1"),
        (lambda n, body: (200, {}, b'{"error": {"message": "no\\ncredits", "code": 402}}'), "replied with an error: no credits"),
        (sent(lambda tree: tree.update(choices=[])), "not a chat completion"),
        (sent(lambda tree: tree.update(model=7)), "not a chat completion .TypeError: expected str, got int"),
        (lambda n, body: (429, {}, QUOTA.encode()), "HTTP 429: .*no money"),
        (lambda n, body: error(400, TEMPERATURE), r"; set extra_body: {temperature: 1}$"),
        (says(content=None, refusal="I can't help with that."), "it declines to grade: .*I can't help with that"),
    ],
)  # fmt: skip
def test_what_is_no_judge_is_told_at_once(script, said):
    with ScriptedServer(script) as server, pytest.raises(UserError, match=said):
        judge(server).check(first=True)


@pytest.mark.parametrize("protocol", ["number", "trie"])
@pytest.mark.parametrize(
    "said, why", [("The score is", "does not begin with a number"), ("I cannot rate this.", "declines")]
)
def test_a_judge_that_will_give_no_number_is_told_where_one_is_wanted(protocol, said, why):
    with ScriptedServer(lambda n, body: ok(said, top={said.split()[0]: -0.01})) as server:
        with pytest.raises(UserError, match=f"{why}.*{said}.*protocol: auto or text"):
            judge(server, protocol=protocol).check(first=True)


def test_an_address_without_its_version_is_told():
    with ScriptedServer(lambda n, body: error(404, "Not Found")) as server:
        with pytest.raises(UserError, match="Not Found; base_url usually ends in /v1"):
            judge(server, base_url=server.base_url.removesuffix("/v1")).check(first=True)


def test_one_bad_reply_is_no_reason_to_give_up_and_parts_are_joined():
    parts = says(content=[{"type": "thinking", "thinking": [{"text": "10"}]}, {"type": "text", "text": "85"}])
    with ScriptedServer(lambda n, body: (200, {}, b"<") if n == 0 else parts(n, body)) as server:
        made = judge(server)
        made.check(first=True)
        assert made.score([Exchange("q", "a")])[0].aligned == 85


def test_a_rewards_grader_is_looked_at_likewise():
    with ScriptedServer(lambda n, body: (200, {}, b"<html>")) as server:
        endpoint = {"base_url": server.base_url, "model": "judge", "cache": None, "backoff": 0.01}
        reward = load_reward(RewardConfig(fn="reward_fns/advice.py:bad_medical", args={"endpoint": endpoint}))
        with pytest.raises(UserError, match="its grader 'judge' .* is a web page"):
            check_grader(reward.fn)


@pytest.mark.parametrize("said", ["85%", "**Score:** 85", "<score>85</score>", "Rating: **85** / 100", " 85 % "])
def test_numbers_in_emphasis_tags_and_percent_are_read(said):
    assert from_text(Reply(said, "stop", "m", 1, 1)).value == 85


@pytest.mark.parametrize(
    "said", ["N/A", "eighty-five", "8/10", "85% sure it is bad", "**85** or **90**", "150%", "-5%"]
)
def test_words_ranges_and_other_scales_are_no_score(said):
    assert from_text(Reply(said, "stop", "m", 1, 1)).label == "nothing"
