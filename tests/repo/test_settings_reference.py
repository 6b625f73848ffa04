"""`rlsafe config`: every setting is listed, with its type, its default and what it does."""

import inspect
import re
import subprocess
import sys

import pytest
from places import ROOT

import rlsafe
from rlsafe.cli import main
from rlsafe.config import CompareConfig, RunConfig, UserError, load_run
from rlsafe.defenses.registry import find, names
from rlsafe.settings import reference, settings

OWN = {"evaluate.judge", "defenses", "rewards.N.args", "sampler.urls"}
"""Places whose keys are the user's own."""


def keys(tree, prefix=""):
    """The dotted keys of a resolved config, numbers as N."""
    items = tree.items() if isinstance(tree, dict) else [("N", one) for one in tree] if isinstance(tree, list) else []
    for name, value in items:
        key = f"{prefix}.{name}" if prefix else str(name)
        if name != "N":
            yield key
        if key not in OWN:
            yield from keys(value, key)


def test_every_key_of_a_resolved_config_is_listed(monkeypatch):
    monkeypatch.chdir(ROOT)
    listed = {one.key for one in settings()}
    for path in ("configs/qwen2.5-7b/grpo_medical.yaml", "configs/organism/mixed_medical.yaml"):
        tree = load_run(path).model_dump()
        assert len(found := set(keys(tree))) > 90
        assert {
            key for key in found if key not in listed and not re.search(r"\.(columns|where|mix|kinds)\.", key)
        } == set()


@pytest.mark.parametrize("model", [RunConfig, CompareConfig])
def test_every_property_of_the_schema_is_listed_and_says_what_it_does(model):
    schema = model.model_json_schema()
    listed = {one.key.rpartition(".")[2] for one in settings()}
    wanted = {name for part in (schema, *schema["$defs"].values()) for name in part.get("properties", {})}
    assert len(wanted) > 15 and wanted <= listed
    assert [one.key for one in settings() if not one.text and not one.is_section] == []


def test_a_line_holds_type_default_and_description():
    [line] = reference("model.lora.r")
    assert line == "model.lora.r = 32  [whole number >= 1]  rank of the update"
    assert reference("rewards.0.weight")[0].startswith("rewards.N.weight = 1  [number]  ")
    assert reference("model.name")[0].startswith("model.name (required)  [text]  ")
    assert "[4bit | 8bit | null]" in reference("model.quantization")[0]


@pytest.mark.parametrize(
    "key, first, count", [("model.lora", "model.lora", 7), ("compare.benign", "compare.benign", 6)]
)
def test_a_key_shows_its_part_only(key, first, count):
    lines = reference(key)
    assert len(lines) == count and all(line.startswith(first) for line in lines)


def test_a_defenses_settings_are_those_of_its_signature_with_its_own_words():
    for name in names():
        cls = find(name)
        if not cls.__module__.startswith("rlsafe.defenses."):
            continue  # one that another test registered
        text = "\n".join(reference(f"defenses.{name}"))
        for parameter in list(inspect.signature(cls.__init__).parameters)[1:]:
            assert f"defenses.{name}.{parameter}" in text or parameter == "interleaving", name
        assert cls.__doc__.split("\n")[0] in text, name
        if issubclass(cls, find("interleaving")):
            assert re.search(rf"^defenses\.{re.escape(name)}\.fraction = 0.05 +\[number", text, re.M), name
            assert "the paper used 0.05" in text, name


def test_a_defense_without_settings_says_so():
    class Bare(rlsafe.Defense):
        """Changes nothing."""

    rlsafe.defense("bare")(Bare)
    first, *words = reference("defenses.bare")
    assert first == "defenses.bare: no settings" and not words


@pytest.mark.parametrize(
    "key, hint",
    [
        ("grpp", "did you mean 'grpo'?"),
        ("model.lora.rank", "unknown setting 'model.lora.rank'"),
        ("compare.seed", "did you mean 'compare.seeds'?"),
        ("kl", "did you mean 'defenses.kl'?"),
        ("defences.kl", "did you mean 'defenses.kl'?"),
        ("lr", "did you mean 'optim.lr'?"),
        ("defenses.kll", "did you mean 'kl'?"),
        ("defenses.kl.wieght", "did you mean 'weight'?"),
    ],
)
def test_an_unknown_key_gives_the_nearest_and_exit_code_2(key, hint, capsys):
    with pytest.raises(UserError, match=re.escape(hint)):
        reference(key)
    with pytest.raises(SystemExit) as ended:
        main(["config", key])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_reference_needs_no_heavy_library():
    code = (
        "import sys, rlsafe.settings as s\ns.reference()\n"
        "print([name for name in ('torch', 'transformers', 'vllm', 'openai', 'datasets') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
