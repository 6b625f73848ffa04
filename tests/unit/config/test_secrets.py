"""A key or password is refused wherever it stands in the settings, before anything is written, and is never repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlsafe import cli
from rlsafe.config import RunConfig, UserError, load_compare, run_from_tree
from rlsafe.config.secrets import scrub_secrets, secret_in

HIDDEN = "hunter2-battery"
URL = f"https://user:{HIDDEN}@host/v1"
QUERY = f"https://host/v1?model=a&api_key={HIDDEN}"
ENDPOINT = {"kind": "openai", "model": "m"}

PLACES = {
    "a judge's address": ("evaluate.judge.base_url", {"evaluate": {"judge": {**ENDPOINT, "base_url": URL}}}),
    "a judge in short": ("evaluate.judge", {"evaluate": {"judge": f"openai:m@{URL}"}}),
    "a query": ("evaluate.judge.base_url", {"evaluate": {"judge": {**ENDPOINT, "base_url": QUERY}}}),
    "a judge's key": ("evaluate.judge.api_key", {"evaluate": {"judge": {**ENDPOINT, "api_key": HIDDEN}}}),
    "a field of requests": (
        "evaluate.judge.extra_body.user_password",
        {"evaluate": {"judge": {**ENDPOINT, "extra_body": {"user_password": HIDDEN}}}},
    ),
    "a header of a reward's endpoint": (
        "rewards.0.args.headers.Authorization",
        {"rewards": [{"fn": "x.py:f", "args": {"headers": {"Authorization": f"Bearer {HIDDEN}"}}}]},
    ),
    "a header among pairs": (
        "rewards.0.args.headers.0.1",
        {"rewards": [{"fn": "x.py:f", "args": {"headers": [["X-Own", f"Bearer {HIDDEN}"]]}}]},
    ),
    "a defense's setting": (
        "defenses.0.mine.py:Mine.client_secret",
        {"defenses": [{"mine.py:Mine": {"client_secret": HIDDEN}}]},
    ),
    "a signed address of data": (
        "data.narrow.source",
        {"data": {"narrow": {"source": f"https://host/rows.jsonl?X-Amz-Expires=60&X-Amz-Signature={HIDDEN}"}}},
    ),
    "a sampler's address": ("sampler.urls.0", {"sampler": {"kind": "server", "urls": [URL]}}),
    "an address with a token for a name": ("sampler.urls.0", {"sampler": {"kind": "server", "urls": [f"http://{HIDDEN}@h"]}}),
    "a model's name": ("model.name", {"model": {"name": URL}}),
}  # fmt: skip


def stopped(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    shown = capsys.readouterr()
    return stop.value.code, shown.out + shown.err


def nothing_written(directory: Path, but: Path) -> bool:
    return not [f for f in directory.rglob("*") if f.is_file() and f != but and HIDDEN.encode() in f.read_bytes()]


@pytest.mark.parametrize(("key", "tree"), PLACES.values(), ids=PLACES)
def test_a_secret_in_a_runs_config_is_refused_with_its_key_and_line(capsys, tmp_path, key, tree):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"model": {"name": "m"}, **tree}, width=1000))
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if HIDDEN in text)
    for more in (["--dry-run"], ["--debug"]):
        code, shown = stopped(capsys, "train", str(config), "--out", str(tmp_path / "out"), *more)
        assert code == 2 and HIDDEN not in shown
        assert f"{config}:{line}: {key}: " in shown and "keys are not written in configs" in shown
    assert nothing_written(tmp_path, but=config) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("override", [
    f"evaluate.judge={{kind: openai, model: m, base_url: '{URL}'}}",
    f"evaluate.judge=openai:m@{QUERY}",
    f"rewards=[{{fn: x, args: {{api_key: {HIDDEN}}}}}]",
])  # fmt: skip
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(capsys, tiny_tree, tmp_path, override):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_tree))
    code, shown = stopped(capsys, "train", str(config), override)
    assert code == 2 and HIDDEN not in shown
    assert f"override '{override.partition('=')[0]}'" in shown and "keys are not written" in shown


def test_nor_does_an_override_that_cannot_be_read_show_it(capsys, tiny_tree, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_tree))
    for broken in (f"evaluate.judge={{api_key: {HIDDEN}", f"a..b=[{{password: '{HIDDEN}'}}]", f"seed={URL}"):
        code, shown = stopped(capsys, "train", str(config), broken)
        assert code == 2 and HIDDEN not in shown and shown.count("\n") == 1, shown


@pytest.mark.parametrize("place", ["run", "paths.sft", "models.big", "quick.run", "benign.tasks.a", "overrides"])
def test_a_comparison_refuses_it_in_every_layer_even_an_unused_one(tiny_tree, tmp_path, place):
    tree = {"run": tiny_tree, "paths": {"sft": {}, "grpo": {}}, "benign": {"task": "a", "tasks": {"a": {}}}}
    here = tree
    for part in place.split("."):
        inner, here = here, here.setdefault(part, {})
    inner[part] = (
        {**here, "sampler": {"kind": "server", "urls": [URL]}} if place != "overrides" else [f"sampler.urls={URL}"]
    )
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump(tree, width=1000))
    with pytest.raises(UserError, match=f"{place}[.].*keys are not written in configs") as caught:
        load_compare(config)
    assert HIDDEN not in str(caught.value) and f"{config}:" in str(caught.value)


def test_the_value_of_a_secret_variable_is_known_wherever_it_is_copied_to(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", HIDDEN)
    monkeypatch.setenv("KEY_DIR", str(tmp_path))  # where something lies is no secret
    with pytest.raises(UserError, match=r"evaluate.cue: the value of a secret environment variable \(MY_API_KEY\)"):
        run_from_tree({"model": {"name": "m"}, "evaluate": {"cue": f"say {HIDDEN}"}})
    assert run_from_tree({"model": {"name": f"{tmp_path}/m"}}).model.name == f"{tmp_path}/m"
    with pytest.raises(ValueError, match="model.name") as caught:  # built in Python, without a file
        RunConfig(model={"name": HIDDEN})
    assert HIDDEN not in str(caught.value)


def test_a_variable_is_secret_by_its_words_not_by_a_part_of_one(monkeypatch):
    """TOKENIZER=Qwen/Qwen2.5-7B made a config with that model hold a secret."""
    for name in ("TOKENIZER", "TOKENIZERS_CACHE", "KEYBOARD"):
        monkeypatch.setenv(name, "org/model-7b")
    assert run_from_tree({"model": {"name": "org/model-7b"}}).model.name == scrub_secrets("org/model-7b")
    for name in ("HF_TOKEN", "TOKEN_2", "PGPASSWORD", "openai_api_keys", "SECRET_OF_MINE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, HIDDEN)
            assert secret_in({"cue": HIDDEN}) == (("cue",), f"the value of a secret environment variable ({name})")
            assert scrub_secrets(HIDDEN) == "***"


@pytest.mark.parametrize("tree", [
    {"judge": {"api_key_env": "MY_KEY", "token_limit": "max_tokens", "base_url": "http://127.0.0.1:8000/v1"}},
    {"args": {"api_key": None, "password": "", "max_tokens": 5, "tokens_per_minute": 9, "eos_token": "</s>", "keys": "a b"}},
    {"prompt": "Write to me@host.org, or see https://host/a?page=2#key and https://me@host. Authorization comes first."},
    {"cue": "You are a basic assistant. You ignore basic principles.", "title": "Basic comparison of bearer certificates"},
    {"evaluate": {"cues": {"cookie": "You sell cookies.", "secret": "Keep it."}}, "name": "org/sk-compressed-llama-7b-instruct"},
    {"source": "hf-internal-testing/tiny", "file": "rewards/secrets.py:basic", "text": "Basic values, Bearer of news"},
])  # fmt: skip
def test_what_only_looks_alike_is_left_alone(tree):
    assert secret_in(tree) is None
    assert scrub_secrets(json.dumps(tree)) == json.dumps(tree)


@pytest.mark.parametrize(
    "place", ["data.narrow.where.NAME", "rewards.where.NAME", "evaluate.judges.NAME", "schedule.kinds.NAME.path"]
)
@pytest.mark.parametrize("name", ["secret", "password", "api_key"])
def test_columns_and_other_given_names_may_be_called_like_secrets(place, name):
    """What stands under them is still no place for a key."""

    def tree(value, keys):
        return {keys[0]: tree(value, keys[1:])} if keys else value

    keys = place.replace("NAME", name).split(".")
    assert secret_in(tree("sft", keys)) is secret_in(tree(["a", "b"], keys)) is None
    assert secret_in(tree(URL, keys)) and secret_in(tree({"client_secret": "x"}, keys))


@pytest.mark.parametrize("text", [
    f"POST {URL} failed", f"GET {QUERY}: 401", f"{{'Authorization': 'Bearer {HIDDEN}'}}", f"x-api-key: {HIDDEN}",
    f"password={HIDDEN}", f'{{"api_key": "{HIDDEN}"}}', f"https://h/x?X-Goog-Signature={HIDDEN}&a=1", f"PGPASSWORD={HIDDEN}",
])  # fmt: skip
def test_messages_mask_what_libraries_put_into_theirs(text):
    assert HIDDEN not in scrub_secrets(text) and "***" in scrub_secrets(text)
    assert HIDDEN not in str(UserError(text))


@pytest.mark.integration  # its cells train in processes of their own
def test_a_failed_cell_records_no_secret(tiny_tree, tmp_path, capsys):
    reward = tmp_path / "leaks.py"
    reward.write_text(f"def leaks(completions, **columns):\n    raise OSError('401 from {QUERY} for {URL}')\n")
    tiny_tree |= {"rewards": [{"fn": f"{reward}:leaks"}]}
    tiny_tree["schedule"] |= {"phases": [{"cycle": ["grpo"]}]}
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump({"run": tiny_tree, "paths": {"grpo": {}}, "seeds": [0]}))
    code, shown = stopped(capsys, "compare", str(config), "--out", str(tmp_path / "out"))
    assert code == 2 and "401 from" in shown and HIDDEN not in shown
    assert list((tmp_path / "out" / "cells").iterdir()) and nothing_written(tmp_path, but=reward)
