"""The endpoint client: typed replies, retries, limits, outages."""

import asyncio
import threading
import time
from collections import Counter

import pytest
from scripted_server import ScriptedServer, endpoint, error, ok, request

from rlsafe.endpoints import Failure, Reply


def test_a_reply_is_typed_and_the_request_says_all_that_was_asked():
    with ScriptedServer(lambda n, body: ok("85", top={"85": -0.1, "90": -2.5})) as server:
        made = endpoint(
            server, extra_body={"chat_template_kwargs": {"enable_thinking": False}}, price_in=2, price_out=8
        )
        [reply] = made.ask([request(top_logprobs=20, seed=3, stop=("x",))])
    assert isinstance(reply, Reply) and (reply.text, reply.finish, reply.cached) == ("85", "stop", False)
    assert reply.positions[0].top == (("85", -0.1), ("90", -2.5))
    body = server.requests[0][1]
    assert body == {
        "model": "judge", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "temperature": 0.0,
        "logprobs": True, "top_logprobs": 20, "seed": 3, "stop": ["x"], "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert (made.totals.tokens_in, made.totals.tokens_out) == (10, 1)
    assert made.totals.cost == pytest.approx((10 * 2 + 8) / 1e6)


def test_faults_are_retried_and_counted_and_the_reply_is_the_servers_own():
    script = [
        error(500), error(429, retry_after="0.01"), (200, {"Content-Length": "999"}, b'{"choices": ['), (200, {}, b'{"cho'),
        ok("1", model="other"), (200, {}, b'{"choices": []}'), (200, {}, b'[1]'), ok("77"),
    ]  # fmt: skip
    with ScriptedServer(lambda n, body: script[n]) as server:
        made = endpoint(server)
        [reply] = made.ask([request()])
    assert isinstance(reply, Reply) and reply.text == "77" and reply.attempts == 8
    assert dict(made.totals.faults) == {"server": 1, "rate_limit": 1, "connection": 1, "bad_reply": 3, "wrong_model": 1}
    assert made.totals.failed == 0 and "7 attempts went wrong" in made.summary()


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": [{"message": {"content": 5}}], "model": "judge"}',
        b'{"choices": [{"message": {"content": "5"}}], "model": 5}',
        b'{"choices": [{"message": {"content": "5"}}], "model": "judge", "usage": {"prompt_tokens": "1"}}',
        b"null",
        b"<html>busy</html>",
        b"",
    ],
)
def test_a_reply_of_another_shape_is_no_reply(body):
    with ScriptedServer(lambda n, _: (200, {}, body)) as server:
        [result] = endpoint(server, max_retries=1).ask([request()])
    assert isinstance(result, Failure) and (result.kind, result.attempts) == ("bad_reply", 2)


@pytest.mark.parametrize("bad", [float("nan"), 0.7, "-0.1", True])
def test_a_log_probability_that_is_none_is_no_reply(bad):
    with ScriptedServer(lambda n, _: ok("85", top={"85": bad})) as server:
        [result] = endpoint(server, max_retries=0).ask([request(top_logprobs=2)])
    assert result.kind == "bad_reply"


def test_a_batch_goes_on_around_what_fails():
    def script(n, body):
        return error(400, "too long") if "long" in body["messages"][0]["content"] else ok("5")

    with ScriptedServer(script) as server:
        made = endpoint(server)
        results = made.ask([request("a"), request("long"), request("b")])
    assert [type(r).__name__ for r in results] == ["Reply", "Failure", "Reply"]
    assert results[1].kind == "rejected" and "too long" in results[1].message and results[1].attempts == 1
    assert dict(made.totals.failures) == {"rejected": 1} and made.totals.replied == 2


def test_no_more_requests_at_a_time_than_allowed():
    four = threading.Barrier(4, timeout=60)

    def script(n, body):
        if n < 4:
            four.wait()
        time.sleep(0.01)
        return ok("5")

    with ScriptedServer(script) as server:
        assert all(isinstance(r, Reply) for r in endpoint(server, concurrency=4).ask([request(i) for i in range(40)]))
    assert server.most_at_once == 4


def test_retry_after_holds_back_every_request_of_the_endpoint():
    times = []

    def script(n, body):
        times.append(time.monotonic())
        return error(429, retry_after="0.3") if n == 0 else ok("5")

    with ScriptedServer(script) as server:
        results = endpoint(server, concurrency=1).ask([request(i) for i in range(5)])
    assert all(isinstance(r, Reply) for r in results) and times[1] - times[0] >= 0.3


@pytest.mark.parametrize("limit", [{"requests_per_minute": 600}, {"tokens_per_minute": 600 * 11}])
def test_requests_and_tokens_a_minute_are_kept(limit):
    with ScriptedServer(lambda n, body: ok("5")) as server:  # each takes 10 + 1 tokens: 600 of them a minute
        made = endpoint(server, concurrency=2, **limit)
        begun = time.monotonic()
        made.ask([request(i) for i in range(13)])
    assert 0.9 <= time.monotonic() - begun < 30


def test_slow_replies_time_out_and_the_deadline_ends_the_retries():
    def script(n, body):
        time.sleep(0.5)
        return ok("5")

    with ScriptedServer(script) as server:
        [late] = endpoint(server, timeout=0.1, max_retries=1).ask([request()])
        begun = time.monotonic()
        [never] = endpoint(server, timeout=0.1, deadline=0.5, max_retries=99).ask([request()])
    assert (late.kind, late.attempts) == ("timeout", 2)
    assert never.kind == "deadline" and time.monotonic() - begun < 5 and "timeout" not in late.message


@pytest.mark.slow
def test_a_retry_does_not_wait_behind_a_long_queue():
    """Twice as long as the deadline in all, and no request comes near it."""
    tried = set()

    def script(n, body):
        time.sleep(0.02)
        text = body["messages"][0]["content"]
        return ok("5") if text in tried or tried.add(text) else error(500)

    with ScriptedServer(script) as server:
        begun = time.monotonic()
        results = endpoint(server, concurrency=2, deadline=2.0).ask([request(i) for i in range(400)])
    assert time.monotonic() - begun > 4 and {type(r) for r in results} == {Reply}


def test_what_will_hardly_pass_is_not_tried_again_and_again_unless_the_endpoint_has_worked():
    with ScriptedServer(lambda n, body: error(404, "no such model")) as server:
        [gone] = endpoint(server).ask([request()])
    assert (gone.kind, gone.attempts) == ("not_found", 3) and "no such model" in gone.message
    with ScriptedServer(lambda n, body: error(404, "no such model") if 0 < n < 6 else ok("5")) as server:
        made = endpoint(server)
        assert [type(made.ask([request(i)])[0]) for i in range(2)] == [Reply, Reply]


def test_faults_of_other_kinds_do_not_use_up_what_a_seldom_one_may_take():
    bare = ok("5")  # without log-probs
    script = [error(500), error(500), error(503), bare, bare, error(500), bare, ok("7", top={"7": 0.0}), *[bare] * 6]
    script.append(ok("8", top={"8": 0.0}))
    with ScriptedServer(lambda n, body: script[n]) as server:
        made = endpoint(server, max_retries=20, backoff=0.001)
        assert [made.ask([request(text, top_logprobs=2)])[0].text for text in "ab"] == ["7", "8"]
    with ScriptedServer(lambda n, body: bare) as server:
        [never] = endpoint(server, max_retries=20).ask([request(top_logprobs=2)])
    assert (never.kind, never.attempts) == ("no_logprobs", 4)


def test_an_endpoint_that_is_down_fails_the_rest_at_once_and_is_looked_at_again():
    broken = threading.Event()
    broken.set()
    with ScriptedServer(lambda n, body: error(503) if broken.is_set() else ok("5")) as server:
        made = endpoint(server, deadline=0.8, concurrency=8, max_retries=99, backoff=0.05)
        first = made.ask([request(i) for i in range(20)])
        assert {r.kind for r in first} <= {"deadline", "outage"} and made.down
        asked, begun = len(server.requests), time.monotonic()
        rest = made.ask([request(i) for i in range(500)])
        assert {r.kind for r in rest} <= {"deadline", "outage"} and time.monotonic() - begun < 30
        assert len(server.requests) - asked < 100  # not 500 attempts at a server that is down
        broken.clear()
        time.sleep(0.9)
        again = made.ask([request(i) for i in range(20)])
    assert all(isinstance(r, Reply) for r in again) and not made.down
    assert made.totals.failed == 520 and made.totals.replied == 20


def test_time_in_which_nobody_asks_is_no_outage():
    """One answer is refused to the end and so is the last thing that is heard; a fault after a long pause then tells nothing."""
    with ScriptedServer(lambda n, body: script(body["messages"][0]["content"])) as server:
        seen = Counter()

        def script(text):
            seen[text] += 1
            return error(503) if text == "never" or (text == "later 0" and seen[text] == 1) else ok("5")

        made = endpoint(server, deadline=1.0, max_retries=3, backoff=0.02, concurrency=2)
        assert [isinstance(r, Reply) for r in made.ask([request("never"), request("once")])] == [False, True]
        time.sleep(1.1)
        assert not made.down
        later = made.ask([request(f"later {i}") for i in range(20)])
    assert all(isinstance(r, Reply) for r in later) and seen["later 0"] == 2


def test_a_field_of_ours_that_is_null_is_left_out():
    with ScriptedServer(lambda n, body: ok("5")) as server:
        endpoint(server, extra_body={"temperature": None}).ask([request()])
    assert "temperature" not in server.requests[0][1]


def test_an_error_sent_as_a_reply_shows_no_key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-key-1234")
    body = b'{"error": {"message": "Incorrect API key provided: secret-key-1234"}}'
    with ScriptedServer(lambda n, _: (200, {}, body)) as server:
        [result] = endpoint(server, max_retries=0, api_key_env="SOME_KEY").ask([request()])
    assert isinstance(result, Failure) and result.message.endswith("Incorrect API key provided: ***")


def test_it_serves_threads_and_other_event_loops_while_the_caller_goes_on():
    release = threading.Event()

    def script(n, body):
        release.wait(60)
        return ok(body["messages"][0]["content"])

    with ScriptedServer(script) as server:
        made = endpoint(server)
        futures = [made.submit(request(i)) for i in range(4)]
        assert not any(f.done() for f in futures)  # submit does not wait
        release.set()

        async def both():
            return await asyncio.gather(made.chat(request("x")), made.chat(request("y")))

        assert [r.text for r in asyncio.run(both())] == ["x", "y"]
        assert [f.result(60).text for f in futures] == ["0", "1", "2", "3"]
