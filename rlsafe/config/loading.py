"""YAML <-> settings: includes, and errors that name the key, the file and the line."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from rlsafe.config.base import SECRET, alternatives
from rlsafe.config.comparison import CompareConfig
from rlsafe.config.errors import UserError, nearest
from rlsafe.config.files import at_home
from rlsafe.config.overrides import Marks, apply_override, read_yaml, set_by, types_within, write_yaml
from rlsafe.config.schema import RunConfig
from rlsafe.config.undone import check_grid, check_twice

C = TypeVar("C", bound=BaseModel)


def merge(under: Any, over: Any) -> Any:
    """`over` wins; mappings merge key by key, everything else is replaced."""
    if isinstance(under, Mapping) and isinstance(over, Mapping):
        return {**under, **{key: merge(under.get(key), value) for key, value in over.items()}}
    return over


def _walk(node: yaml.Node, file: str, path: tuple[str, ...], marks: Marks) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            where = f"{file}:{key.start_mark.line + 1}"
            if name in seen:
                raise UserError(f"{where}: the key {name!r} is written twice")
            seen.add(name)
            marks[(*path, name)] = where
            _walk(value, file, (*path, name), marks)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            marks[(*path, str(index))] = f"{file}:{value.start_mark.line + 1}"
            _walk(value, file, (*path, str(index)), marks)


def load_tree(path: str | Path, _above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Marks]:
    """Read a YAML file and everything it includes.

    `include: other.yaml` (or a list; relative to the file; later wins) may stand at the top or in any mapping, whose keys it
    then supplies; the keys written beside it win.
    UserError names the file and the line.
    """
    if "://" in str(path):
        raise UserError(f"{path}: expected a YAML file on this machine, not an address")
    path = Path(path)
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.glob("*.y*ml"))[:6])
        raise UserError(
            f"{path}: is a directory; expected a YAML file{f', such as one of: {inside}' if inside else ''}"
        )
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config file{nearest(path.name, siblings)}")
    if path.resolve() in _above:
        raise UserError(f"{path}: includes itself")
    try:
        text = path.read_text(encoding="utf-8")
        node, data = read_yaml(yaml.compose, text), read_yaml(yaml.load, text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: expected a mapping of settings, got {type(data).__name__ if data is not None else 'an empty file'}"
        )
    marks: Marks = {}
    assert node is not None
    _walk(node, str(path), (), marks)
    return _resolve_includes(data, marks, path, (), (*_above, path.resolve()))


def _resolve_includes(
    data: dict[str, Any], marks: Marks, path: Path, prefix: tuple[str, ...], above: tuple[Path, ...]
) -> tuple[dict[str, Any], Marks]:
    for key, value in data.items():
        if isinstance(value, dict):
            data[key], marks = _resolve_includes(value, marks, path, (*prefix, key), above)
    includes = data.pop("include", [])
    merged: dict[str, Any] = {}
    merged_marks: Marks = {}
    for name in includes if isinstance(includes, list) else [includes]:
        if not isinstance(name, str):
            where = marks.get((*prefix, "include"), path)  # what `<<` merges in has no line here
            raise UserError(f"{where}: include takes file names, got {name!r}")
        part, part_marks = load_tree(path.parent / at_home(name), above)
        merged = merge(merged, part)
        merged_marks |= {(*prefix, *keys): where for keys, where in part_marks.items()}
    marks.pop((*prefix, "include"), None)
    return merge(merged, data), {**merged_marks, **marks}


def _options(model: type[BaseModel], location: Iterable[str | int]) -> list[str]:
    """Field names valid at `location` of a settings class (the location of an unknown key, without the key)."""
    current: Any = model
    for step in location:
        if isinstance(step, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        if step not in current.model_fields:
            continue
        found = [
            a
            for a in types_within(current.model_fields[step].annotation)
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        current = found[0] if found else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def dotted_key(name: str, model: type[BaseModel] = RunConfig) -> str:
    """The dotted key of the setting that is called `name` in a settings class or below it, the least deep one; else an empty text."""
    found: list[tuple[tuple[str, ...], type[BaseModel]]] = [((), model)]
    for path, current in found:  # grows while it is walked, so the least deep come first
        if name in current.model_fields:
            return ".".join((*path, name))
        found += [
            ((*path, key), inner)
            for key, field in current.model_fields.items()
            for inner in alternatives(field.annotation)
            if isinstance(inner, type) and issubclass(inner, BaseModel)
        ]
    return ""


def _explain(error: ValidationError, model: type[BaseModel], marks: Marks, source: str) -> UserError:
    """The first validation problem as one line: where it was written, the key, what is wrong, the nearest valid name."""
    first = error.errors(include_url=False)[0]
    location = [
        step
        for step in first["loc"]
        if not (isinstance(step, str) and ("[" in step or step in ("str", "float", "int")))
    ]
    keys = tuple(str(step) for step in location)
    where = next((marks[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in marks), source)
    if first["type"] == "value_error":  # of a whole section: it was right before the command line changed a part of it
        changed = {mark for path, mark in marks.items() if path[: len(keys)] == keys and mark.startswith("override ")}
        where = changed.pop() if len(changed) == 1 else where
    dotted = ".".join(keys)
    if first["type"] == SECRET and where.startswith("override "):  # it holds the value
        where = f"override '{where[10:].partition('=')[0]}'"
    given = first.get("input")
    if first["type"] == "extra_forbidden":
        hint = nearest(keys[-1], _options(model, location[:-1]))
        if "did you mean" not in hint and (other := dotted_key(keys[-1], model)):
            hint = f"; did you mean {other!r}?"
        return UserError(f"{where}: unknown key {dotted!r}{hint}")
    if first["type"] == "missing":
        stuck = [key for key, value in given.items() if value is None and str(key).startswith(f"{keys[-1]}:")]
        hint = f" ({stuck[0]!r} has no space behind its colon)" if stuck else ""
        return UserError(f"{where}: the key {dotted!r} is required{hint}")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "dict_type"):
        options = _options(model, location)
        message = "expected settings" + (f" ({', '.join(options)})" if options else ": a mapping of names to values")
    shown = "" if isinstance(given, (dict, list)) else f", got {'null' if given is None else repr(given)}"
    shown += f"; write [{given}]" if first["type"] == "list_type" and isinstance(given, str) else ""
    shown += "; write null for nothing" if str(given) in ("none", "None") and given is not None else ""
    return UserError(f"{where}: {dotted + ': ' if dotted else ''}{message[0].lower() + message[1:]}{shown}")


def build(model: type[C], tree: Mapping[str, Any], marks: Marks | None = None, source: str = "config") -> C:
    """Validate a tree into settings; UserError names the key and the line."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, model, marks or {}, source) from None


def _load(model: type[C], path: str | Path, overrides: Iterable[str], base: Mapping[str, Any] | None = None) -> C:
    tree, marks = load_tree(path)
    if "paths" in tree and "run" in tree and "model" not in tree:
        raise UserError(f"{path}: describes a comparison, not one run; use: rlsafe compare {path}")
    for override in overrides:
        apply_override(tree, override, marks)
    return build(model, merge(base or {}, tree), marks, str(path))


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's config, apply `key.path=value` overrides, validate."""
    overrides = list(overrides)
    config = _load(RunConfig, path, overrides)
    check_rate(config, overrides)
    return config


def run_from_tree(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate an already merged tree (a comparison's cell)."""
    return build(RunConfig, tree, source=source)


def load_compare(path: str | Path, overrides: Iterable[str] = (), quick: bool = False) -> CompareConfig:
    """Read a comparison's config. `quick` applies its preset; an override whose first key is a setting of a run is kept in
    `overrides`, to be applied last to every cell; any other one changes the comparison itself.
    UserError names the file and the line, or an override that undoes another one or a value of `grid`.
    """
    tree, marks = load_tree(path)
    if "model" in tree and "run" not in tree:
        raise UserError(f"{path}: describes one run, not a comparison; use: rlsafe train {path}")
    if quick:
        preset = tree.get("quick")
        if not isinstance(preset, dict) or not preset:
            raise UserError(f"{path}: --quick needs a 'quick' preset (overrides of this file), and there is none")
        tree = cast(dict[str, Any], merge(tree, copy.deepcopy(preset)))  # an override of the one is none of the other
        marks |= {keys[1:]: where for keys, where in marks.items() if keys[0] == "quick" and len(keys) > 1}
    for_cells, overrides = [], list(overrides)
    for override in overrides:
        first = override.partition("=")[0].split(".")[0].strip()
        if first == "seed":
            raise UserError(f"override {override!r}: a comparison runs several seeds; use --seeds or seeds=[...]")
        if first == "out":
            raise UserError(f"override {override!r}: each run of a comparison has its own directory; use --out")
        if first in RunConfig.model_fields and first not in CompareConfig.model_fields:
            apply_override({}, override)  # its syntax is checked now, its effect in each cell
            for_cells.append(override)
        else:
            apply_override(tree, override, marks)
    check_twice(overrides, for_cells)
    config = build(CompareConfig, tree, marks, str(path))
    config.overrides = [*config.overrides, *for_cells]
    check_grid(config.overrides, config.grid)
    config._marks, config._source = marks, str(path)
    return config


RATE = ["optim", "lr"]


def check_rate(config: RunConfig, overrides: Iterable[str]) -> None:
    """UserError for an override of `optim.lr` where every phase has a learning rate of its own, so that nothing would read it."""
    if (given := rate_given(overrides)) and (own := own_rates(config)):
        raise UserError(f"{given}: each phase has its own rate; expected {', '.join(own)}")


def rate_given(overrides: Iterable[str]) -> str:
    """The beginning of a line about the first override that gives `optim.lr`, alone or in a section; "" when none does."""
    for override in overrides:
        if RATE in (given := set_by(override)):
            return f"override {override!r} has no effect{' in part' if given[1:] else ''}"
    return ""


def own_rates(config: RunConfig) -> list[str]:
    """The settings that hold the learning rates of a run that does not read `optim.lr`, with their values; none of one that does."""
    phases = config.schedule.phases
    if any(phase.lr is None for phase in phases):
        return []
    return [f"schedule.phases.{place}.lr ({phase.lr:g})" for place, phase in enumerate(phases)]


def dump_yaml(config: BaseModel) -> str:
    """The resolved config, every default written out, in the order of the schema."""
    return write_yaml(config.model_dump(mode="json"), allow_unicode=True, width=120)
