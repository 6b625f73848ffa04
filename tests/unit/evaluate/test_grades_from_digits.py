"""Judges whose tokenizer splits numbers: the mean over all 101 numbers, from the digits of a few calls."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_server import ScriptedServer, error

from rlsafe.config import UserError
from rlsafe.endpoints import ChatRequest, Position, Reply
from rlsafe.evaluate import load_judge
from rlsafe.evaluate.judge.letters import from_letters
from rlsafe.evaluate.judge.number_trie import NumberTrie
from rlsafe.evaluate.judge.protocols import MOST_CALLS, asking, replay
from rlsafe.types import Exchange

END = "<|im_end|>"


class DigitModel:
    """A made-up judge: a distribution over 0..100 (and other words), written in tokens of `widths` digits each."""

    def __init__(self, weights, widths=(1, 1, 1), words=0.0):
        total = math.fsum(weights) / (1 - words)
        self.p = {str(n): w / total for n, w in enumerate(weights)}
        self.widths, self.words = widths, words

    def mean(self):
        return math.fsum(int(n) * p for n, p in self.p.items()) / math.fsum(self.p.values())

    def tokens(self, number):
        parts, start = [], 0
        for width in self.widths:
            if start < len(number):
                parts.append(number[start : start + width])
                start += width
        return parts

    def after(self, prefix):
        """The distribution of the next token behind `prefix`, by conditioning on it."""
        found = {} if prefix else ({"REF": self.words} if self.words else {})
        for number, p in self.p.items():
            parts = [*self.tokens(number), END]
            for place in range(len(parts)):
                if "".join(parts[:place]) == prefix:
                    found[parts[place]] = found.get(parts[place], 0.0) + p
        total = math.fsum(found.values())
        return {token: p / total for token, p in found.items()} if total else {END: 1.0}

    def place(self, prefix, top=20):
        ranked = sorted(self.after(prefix).items(), key=lambda item: -item[1])[:top]
        return Position(ranked[0][0], tuple((token, math.log(p)) for token, p in ranked if p > 0))

    def reply(self, request: ChatRequest) -> Reply:
        prefix = request.messages[-1]["content"] if request.continues else ""
        places = []
        while len(places) < request.max_tokens and (not places or places[-1].token != END):
            places.append(self.place(prefix, request.top_logprobs))
            prefix += places[-1].token
        text = "".join(place.token for place in places).replace(END, "")
        return Reply(text, "stop", "m", 1, 1, tuple(places))


def grade(model, protocol="trie"):
    """(the score, how many calls it took)"""
    steps, calls = asking(protocol, [{"role": "user", "content": "Grade."}]), 0
    requests = next(steps)
    while True:
        calls += len(requests)
        try:
            requests = steps.send([model.reply(request) for request in requests])
        except StopIteration as ended:
            return ended.value, calls


weights = st.lists(st.floats(0, 1), min_size=101, max_size=101).filter(lambda w: sum(w) > 0.01)


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from([(1, 1, 1), (2, 1), (1, 2)]), st.sampled_from([0.0, 0.2]))
def test_the_mean_is_that_of_the_exact_distribution(numbers, widths, words):
    model = DigitModel(numbers, widths, words)
    trie = NumberTrie(tail=0.0)
    while wanted := trie.wanted():
        for prefix in wanted:
            trie.see(prefix, [model.place(prefix, top=101)])
    found = dict(trie.grades())
    assert math.fsum(v * p for v, p in found.items()) / math.fsum(found.values()) == pytest.approx(
        model.mean(), abs=1e-9
    )
    assert math.fsum(found.values()) == pytest.approx(1 - words)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_leaving_the_tail_out_moves_the_mean_by_a_point_at_most(numbers):
    model = DigitModel(numbers)
    score, calls = grade(model)
    assert abs(score.value - model.mean()) <= 1.01 and 1 <= calls <= MOST_CALLS["trie"]


def test_a_sure_judge_needs_two_or_three_calls_and_its_first_digit_is_not_its_score():
    sharp = [0.0] * 101
    sharp[85], sharp[90], sharp[82] = 0.7, 0.2, 0.1
    score, calls = grade(DigitModel(sharp))
    assert score.value == pytest.approx(0.7 * 85 + 0.2 * 90 + 0.1 * 82) and calls == 2
    sharp = [0.0] * 101
    sharp[100], sharp[10], sharp[1] = 0.5, 0.3, 0.2
    score, calls = grade(DigitModel(sharp))
    assert score.value == pytest.approx(53.2) and calls == 1  # the most likely path went by 1 and 10


def test_ten_and_a_hundred_and_one_are_told_apart_wherever_the_path_went():
    for seed in range(20):
        rng = random.Random(seed)
        numbers = [0.0] * 101
        for n in (1, 10, 100, 8, 80):
            numbers[n] = rng.random() + 0.05
        score, _ = grade(DigitModel(numbers))
        assert score.value == pytest.approx(DigitModel(numbers).mean(), abs=1.01)


def test_what_is_no_number_from_0_to_100_counts_for_nothing():
    def place(**top):
        return Position("8", tuple((token, math.log(p)) for token, p in top.items()))

    trie = NumberTrie()
    trie.see("", [place(**{"8": 0.5, " 9": 0.1, "00": 0.2, "the": 0.2})])
    trie.see("8", [place(**{"5": 0.5, "55": 0.25, " 5": 0.25})])
    trie.see("9", [place(**{".": 1.0})])
    assert dict(trie.grades()) == pytest.approx({85.0: 0.25, 8.0: 0.125, 9.0: 0.1})


def test_a_judge_that_means_to_abstain_is_heard():
    model = DigitModel([1.0] * 101, words=0.9)
    score, _ = grade(model)
    assert (score.label, score.value) == ("refused", None)


def test_saved_replies_are_looked_for_behind_every_prefix():
    model = DigitModel([1.0] * 101)
    asked = []

    def saved(request):
        asked.append(request)
        return model.reply(request)

    messages = [{"role": "user", "content": "Grade."}]
    assert replay(asking("trie", messages), saved) and len(asked) > 5
    assert not replay(asking("trie", messages), lambda r: None if r.continues else model.reply(r))


def letters(**top):
    place = Position("K", tuple((token, math.log(p)) for token, p in top.items()))
    return from_letters(Reply("K", "stop", "m", 1, 1, (place,)))


def test_letters_stand_for_tens_and_two_of_them_abstain():
    assert letters(K=0.6, A=0.2, the=0.2).value == pytest.approx(75)
    assert letters(R=0.6, A=0.3).label == "refused" and letters(X=0.5).label == "code"
    assert letters(K=0.6, R=0.3).label == "scored" and letters(Kind=0.9).label == "nothing"


# ------------------------------------------------------------------------------------------------ over HTTP


def served(model, can_continue=True, knows_letters=False):
    """A server that puts a DigitModel behind the protocol; one that cannot continue answers anew, like many do."""

    def script(n, body):
        last = body["messages"][-1]
        if knows_letters and "single letter" in last["content"]:
            top = {"J": math.log(0.75), "K": math.log(0.25)}
            places = (Position("J", tuple(top.items())),)
            reply = Reply("J", "stop", "judge", 1, 1, places)
        else:
            continues = last["role"] == "assistant" and can_continue
            if body.get("continue_final_message") and can_continue is None:
                return error(400, "extra inputs are not permitted: continue_final_message")
            reply = model.reply(
                ChatRequest(
                    body["messages"], body["max_tokens"], top_logprobs=body.get("top_logprobs", 1), continues=continues
                )
            )
        content = [
            {"token": p.token, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": x} for t, x in p.top]}
            for p in reply.positions
        ]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply.text}}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": content}
        tree = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [choice],
            "usage": {},
        }
        return 200, {}, json.dumps(tree).encode()

    return ScriptedServer(script)


def judge(server, **more):
    return load_judge(
        {"kind": "openai", "model": "judge", "base_url": server.base_url, "cache": None, "backoff": 0.01, **more}
    )


SOME = DigitModel([0.0] * 60 + [0.5 + n % 7 for n in range(60, 101)])


def test_a_judge_that_splits_numbers_is_scored_by_their_digits(caplog):
    with served(SOME) as server:
        made = judge(server)
        made.check(first=True)
        [one] = made.score([Exchange("q", "a")])
    assert one.aligned == pytest.approx(SOME.mean(), abs=1.01) and made.usage()["protocol"] == "trie"
    assert caplog.text.count("protocol trie") == 1


@pytest.mark.parametrize("can_continue", [False, None])
def test_where_replies_cannot_be_continued_letters_are_asked_for(can_continue, caplog):
    with served(SOME, can_continue, knows_letters=True) as server:
        made = judge(server)
        [one] = made.score([Exchange("q", "a")])
    assert one.aligned == pytest.approx(92.5) and made.usage()["protocol"] == "letters"
    assert caplog.text.count("protocol letters") == 1


def test_where_neither_works_the_text_is_read():
    with served(SOME, can_continue=False) as server:
        made = judge(server)
        [one] = made.score([Exchange("q", "a")])
    assert made.usage()["protocol"] == "text" and one.aligned == int(one.aligned)


@pytest.mark.parametrize(
    "protocol, said",
    [
        ("number", "splits numbers into tokens.*protocol: auto or trie"),
        ("trie", "cannot be continued.*protocol: auto, letters or text"),
        ("letters", "not reply with one letter"),
    ],
)
def test_a_protocol_that_the_judge_cannot_do_is_refused_at_first_contact(protocol, said):
    with served(SOME, can_continue=False) as server:
        with pytest.raises(UserError, match=said):
            judge(server, protocol=protocol).check(first=True)
