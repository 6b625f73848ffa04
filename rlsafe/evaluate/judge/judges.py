"""Judges by name. A judge is anything with `name` and `score(exchanges) -> judgements` (rlsafe.types.Judge).

`evaluate.judge` and --judge take

    organism                          a provider, with or without a spec
    static                            a linter, for questions that ask for Python (static_judge)
    {kind: openai, model: ..., ...}   a language model behind an endpoint (llm_judge.JudgeSettings)
    openai:MODEL, openai:MODEL@URL    the same in short, with every other setting at its default
    judge.yaml                        a file with such a mapping, or the mapping itself as text: '{kind: openai, ...}'

`evaluate.judges` gives question sets judges of their own: {general: ..., indomain: static}.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlsafe.config import UserError, nearest
from rlsafe.types import Judge, provider_for, providers

KINDS = ("openai",)


def load_judge(config: str | dict[str, Any] | None, by_set: Mapping[str, str | dict[str, Any]] | None = None) -> Judge:
    """The judge that `evaluate.judge` names, or a Panel when `evaluate.judges` (by_set) names some. Nothing is asked of it yet.

    UserError when no judge is named, the name is unknown, or a setting is wrong.
    """
    if by_set:
        from rlsafe.evaluate.judge.panel import Panel

        loaded: dict[str, Judge] = {}
        for each in (*by_set.values(), *([config] if config is not None else [])):
            loaded.setdefault(repr(each), load_judge(each))
        return Panel({name: loaded[repr(each)] for name, each in by_set.items()}, loaded.get(repr(config)))
    if config is None:
        raise UserError(
            f"evaluate.judge: no judge is set{nearest('', _names())} (evaluate.general=null evaluate.indomain=null asks no questions)"
        )
    if isinstance(config, dict):
        return _of_kind(config, "evaluate.judge")
    if config.lstrip().startswith("{"):
        return _of_kind(_mapping(config), "judge")
    if config.startswith("openai:"):
        model, _, url = config.removeprefix("openai:").partition("@")
        return _of_kind({"kind": "openai", "model": model, **({"base_url": url} if url else {})}, f"judge {config!r}")
    if config.endswith((".yaml", ".yml")):
        return _from_file(Path(config))
    if config == "static":
        from rlsafe.evaluate.judge.static_judge import StaticJudge

        return StaticJudge()
    found = provider_for(config)
    if not found:
        raise UserError(f"evaluate.judge: unknown judge {config!r}{nearest(config.partition(':')[0], _names())}")
    provider, spec = found
    return provider.judge(spec)


def _names() -> list[str]:
    return [*providers(), "static", "openai:MODEL"]


def _of_kind(tree: dict[str, Any], where: str) -> Judge:
    from rlsafe.endpoints import parse_settings
    from rlsafe.evaluate.judge.llm_judge import JudgeSettings, LLMJudge

    kind = tree.get("kind")
    if kind not in KINDS:
        raise UserError(f"{where}.kind: expected the kind of judge{nearest(str(kind or ''), KINDS)}")
    return LLMJudge(parse_settings(JudgeSettings, tree, where))


def _from_file(path: Path) -> Judge:
    path = Path(os.path.expanduser(path))
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected the settings of a judge (kind, model, base_url, ...)")
    return _of_kind(tree, str(path))


def _mapping(text: str) -> dict[str, Any]:
    """A judge written as a mapping on the command line. UserError when it is none."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"judge {text!r}: expected a mapping such as '{{kind: openai, model: NAME, base_url: URL}}'")
    return tree
