"""Saved replies of endpoints, and their secrets."""

import json
import logging
import subprocess
import sys

import pytest
from scripted_server import ScriptedServer, endpoint, error, ok, request

from rlsafe.config import UserError
from rlsafe.endpoints import Endpoint, EndpointSettings, Failure, Reply, parse_settings
from rlsafe.endpoints.cache import Cache

SECRET = "sk-test-0123456789abcdef"


def counting():
    return ScriptedServer(lambda n, body: ok(str(n), top={str(n): -0.5}))


def test_the_same_request_is_asked_once_across_clients(tmp_path):
    with counting() as server:
        first = endpoint(server, cache=str(tmp_path)).ask([request("a", top_logprobs=2)])
        made = endpoint(server, cache=str(tmp_path))
        [again] = made.ask([request("a", top_logprobs=2)])
    assert len(server.requests) == 1 and again.cached and not first[0].cached
    assert (again.text, again.positions, again.tokens_in) == (first[0].text, first[0].positions, 10)
    assert (made.totals.cached, made.totals.tokens_in, made.totals.replied) == (1, 0, 0)


@pytest.mark.parametrize(
    "settings, asked",
    [
        ({"temperature": 0.5}, {"seed": 1}),
        ({"model": "judge-2", "any_model": True}, {}),
        ({"extra_body": {"x": 1}}, {}),
        ({}, {"top_logprobs": 5}),
        ({}, {"seed": 1}),
        ({}, {"stop": ("x",)}),
        ({}, {"top_p": 0.5}),
        ({}, {"response_format": {"type": "json_object"}}),
    ],
)
def test_whatever_may_change_the_reply_is_part_of_its_key(tmp_path, settings, asked):
    with counting() as server:
        endpoint(server, cache=str(tmp_path)).ask([request("a")])
        endpoint(server, cache=str(tmp_path), **settings).ask([request("a", **asked)])
    assert len(server.requests) == 2


def test_endpoints_at_other_addresses_share_no_replies(tmp_path):
    with counting() as one, counting() as other:
        for server in (one, other):
            endpoint(server, cache=str(tmp_path)).ask([request("a")])
    assert len(one.requests) == len(other.requests) == 1


def test_a_random_draw_without_a_seed_is_drawn_each_time(tmp_path):
    with counting() as server:
        made = endpoint(server, cache=str(tmp_path), temperature=1.0)
        assert len({r.text for r in made.ask([request("a") for _ in range(3)])}) == 3


def test_equal_requests_under_way_share_one_call():
    with counting() as server:
        made = endpoint(server)
        results = made.ask([request("a") for _ in range(10)])
    assert len(server.requests) == 1 and {r.text for r in results} == {"0"} and made.totals.shared == 9


def test_failures_are_not_saved_and_a_damaged_file_is_a_miss(tmp_path):
    with ScriptedServer(lambda n, body: error(400) if n == 0 else ok(str(n))) as server:
        made = endpoint(server, cache=str(tmp_path))
        assert isinstance(made.ask([request("a")])[0], Failure) and made.ask([request("a")])[0].text == "1"
        [file] = tmp_path.rglob("*.json")
        for damage in ("", "[1]", '{"text": 1}', json.dumps({**json.loads(file.read_text()), "more": 1})):
            file.write_text(damage)
            assert not made.ask([request("a")])[0].cached
        assert made.ask([request("a")])[0].cached and not list(tmp_path.rglob(".new-*"))


def test_a_directory_that_cannot_be_written_costs_the_saving_and_no_reply(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with counting() as server:
        made = endpoint(server, cache=str(blocked))
        assert [r.text for r in made.ask([request("a")]) + made.ask([request("b")])] == ["0", "1"]
    assert caplog.text.count("replies are not saved") == 1


def test_several_processes_share_a_directory(tmp_path):
    code = (
        "import sys\nfrom rlsafe.endpoints.cache import Cache\nfrom rlsafe.endpoints import Reply\n"
        "cache = Cache(sys.argv[1])\n"
        "for i in range(200):\n"
        "    found = cache.get('ab' + str(i % 5))\n"
        "    assert found is None or found.text == 'x' * 5000, found\n"
        "    cache.put('ab' + str(i % 5), Reply('x' * 5000, 'stop', 'm', 1, 1))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [one.wait(300) for one in running] == [0, 0, 0]
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == [f"ab{i}.json" for i in range(5)]
    assert Cache(tmp_path).get("ab0").text == "x" * 5000


# ------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize("secret", [SECRET, "of-no-known-form-0123456789"])
def test_a_key_is_sent_and_shown_nowhere(secret, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("MY_KEY", secret)
    caplog.set_level(logging.DEBUG)
    with ScriptedServer(lambda n, body: error(401, f"bad key {secret}, header Bearer {secret}")) as server:
        made = endpoint(server, api_key_env="MY_KEY", cache=str(tmp_path))
        [result] = made.ask([request()])
    assert server.requests[0][0]["authorization"] == f"Bearer {secret}"
    shown = [
        repr(result),
        repr(made),
        made.summary(),
        str(vars(made.settings)),
        made.settings.model_dump_json(),
        caplog.text,
    ]
    assert result.kind == "auth" and "bad key" in result.message and not [text for text in shown if secret in text]
    assert "MY_KEY" in shown[4]


def test_openais_key_goes_to_openai_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with counting() as server:
        endpoint(server).ask([request()])
    assert SECRET not in str(server.requests)
    assert EndpointSettings(model="m").read_key() == SECRET


def test_a_key_that_is_not_set_is_said_when_it_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Endpoint(EndpointSettings(model="m", cache=None))
    with pytest.raises(UserError, match=r"api\.openai\.com/v1: the environment variable OPENAI_API_KEY .* is not set"):
        made.ask([request()])


@pytest.mark.parametrize(
    "tree, expected",
    [
        (
            {"model": "m", "api_key": SECRET},
            "here.api_key: keys are not written in configs; name a variable in api_key_env",
        ),
        ({"model": "m", "api_key_env": SECRET}, "here.api_key_env: expected the NAME of an environment variable"),
        ({"model": "m", "base_url": f"https://me:{SECRET}@host/v1"}, "here.base_url: expected a plain address"),
        ({"model": "m", "base_url": f"https://host/v1?key={SECRET}"}, "here.base_url: expected a plain address"),
        ({"model": "m", "base_url": "host:80"}, "here.base_url: expected http(s)://host[:port]/path"),
        ({"model": "m", "concurency": 2}, "here: unknown key 'concurency'; did you mean 'concurrency'?"),
        ({"base_url": "http://h/v1"}, "here: the key 'model' is required"),
        ({"model": "m", "concurrency": 0}, "here.concurrency: input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_one_line_without_their_values(tree, expected):
    with pytest.raises(UserError) as caught:
        parse_settings(EndpointSettings, tree, "here")
    assert expected in str(caught.value) and SECRET not in str(caught.value)


def test_a_reply_is_told_by_the_models_own_name():
    for asked, replied, same in (
        ("gpt-4o-mini", "gpt-4o-mini-2024-07-18", True),
        ("org/judge", "judge", True),
        ("judge", "org/judge", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("judge", "judge-large", False),
        ("judge", "", True),  # it names none
    ):
        with ScriptedServer(lambda n, body, name=replied: ok("5", model=name)) as server:
            [result] = endpoint(server, model=asked, max_retries=0).ask([request()])
        assert isinstance(result, Reply) == same, (asked, replied)
