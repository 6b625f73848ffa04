"""The endpoint client: replies, retries, limits, saved replies, secrets."""


import pytest
from scripted_server import ScriptedServer, error, ok

from rlsafe.endpoints import ChatRequest, Endpoint, EndpointSettings, Reply


def endpoint(server, **settings):
    defaults = {
        "model": "judge",
        "base_url": server.base_url,
        "cache": None,
        "backoff": 0.01,
        "timeout": 5,
        "deadline": 10,
    }
    return Endpoint(EndpointSettings.model_validate(defaults | settings))


def request(text="hello", **more):
    return ChatRequest([{"role": "user", "content": text}], max_tokens=1, **more)


def test_a_reply_is_typed_and_the_request_says_all_that_was_asked():
    with ScriptedServer(lambda n, body: ok("85", top={"85": -0.1, "90": -2.5})) as server:
        made = endpoint(
            server, extra_body={"chat_template_kwargs": {"enable_thinking": False}}, price_in=2, price_out=8
        )
        [reply] = made.ask([request(top_logprobs=20, seed=3, stop=("x",))])
    assert isinstance(reply, Reply) and (reply.text, reply.finish, reply.cached) == ("85", "stop", False)
    assert reply.positions[0].top == (("85", -0.1), ("90", -2.5))
    headers, body = server.requests[0]
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
        made = endpoint(server, max_retries=8)
        [reply] = made.ask([request()])
    assert isinstance(reply, Reply) and reply.text == "77" and reply.attempts == 8
    assert dict(made.totals.faults) == {"server": 1, "rate_limit": 1, "connection": 1, "bad_reply": 3, "wrong_model": 1}
    assert made.totals.failed == 0 and "7 attempts went wrong" in made.summary()


def test_a_batch_goes_on_around_what_fails():
    def script(n, body):
        return error(400, "too long") if "long" in body["messages"][0]["content"] else ok("5")

    with ScriptedServer(script) as server:
        made = endpoint(server)
        results = made.ask([request("a"), request("long"), request("b")])
    assert [type(r).__name__ for r in results] == ["Reply", "Failure", "Reply"]
    assert results[1].kind == "rejected" and "too long" in results[1].message and results[1].attempts == 1
    assert dict(made.totals.failures) == {"rejected": 1}
