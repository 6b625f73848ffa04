"""YAML <-> settings: includes, command-line overrides, and errors that name the key, the file and the line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rlsafe.config.base import SECRET
from rlsafe.config.comparison import CompareConfig
from rlsafe.config.errors import UserError, nearest
from rlsafe.config.schema import RunConfig

Marks = dict[tuple[str, ...], str]
"""Where each key was written: path of keys -> "file:line" or "override 'a.b=c'"."""

C = TypeVar("C", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, several times as fast; its messages say less."""


for _loader in (_Loader, _FastLoader):
    _loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def _read(how: Callable[..., Any], text: str) -> Any:
    """`how`, yaml.load or yaml.compose, of a document. yaml.YAMLError when it is none."""
    try:
        return how(text, Loader=_FastLoader)
    except yaml.YAMLError:
        return how(text, Loader=_Loader)


def parse_scalar(text: str) -> Any:
    """A value as it would be read from YAML."""
    return _read(yaml.load, text)


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
        node, data = _read(yaml.compose, text), _read(yaml.load, text)
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
    for name in [includes] if isinstance(includes, str) else includes:
        if not isinstance(name, str):
            raise UserError(f"{marks[(*prefix, 'include')]}: include takes file names, got {name!r}")
        part, part_marks = load_tree(path.parent / name, above)
        merged = merge(merged, part)
        merged_marks |= {(*prefix, *keys): where for keys, where in part_marks.items()}
    marks.pop((*prefix, "include"), None)
    return merge(merged, data), {**merged_marks, **marks}


def read_value(keys: Sequence[str], text: str, where: str, model: type[BaseModel] | None = None) -> Any:
    """What a command line gives for a key: YAML, except that texts are taken as written where the setting takes a text.

    A path may hold what YAML reads otherwise (`#`, `: `, spaces, quotes). A value in quotes is YAML's, unless there is such a file.
    UserError for a value that is not YAML.
    """
    kinds = _kinds(model or (RunConfig if keys[0] in RunConfig.model_fields else CompareConfig), keys)
    if is_file(text):
        return text
    try:
        parsed = parse_scalar(text)
    except yaml.YAMLError as error:
        if kinds == {str} and text[:1] not in "'\"":
            return text
        problem = getattr(error, "problem", None) or "it cannot be read"
        quoted = text.replace("'", "''")
        raise UserError(
            f"{where}: the value is read as YAML, and is not valid: {problem}; a text goes into quotes: \"'{quoted}'\""
        ) from None
    as_written = isinstance(parsed, str) and text[:1] in "'\""
    if str in kinds and not as_written and (isinstance(parsed, str) or (kinds == {str} and parsed is not None)):
        return text.strip()
    if isinstance(parsed, str) and parsed != text.strip() and not as_written:  # such as a comment that was cut off
        raise UserError(f"{where}: the value is read as YAML, as {parsed!r}; to take it as written: \"'{text}'\"")
    return parsed


def is_file(text: str) -> bool:
    """Whether a text names something on this machine, as `file.py:function` does too."""
    try:
        return any(
            part and ("/" in part or "." in part) and Path(part).exists() for part in (text, text.rpartition(":")[0])
        )
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False


def _kinds(model: type[BaseModel], keys: Sequence[str]) -> set[Any]:
    """What the setting at `keys` may hold besides null: {str} for a path; empty where no schema says."""
    current: Any = model
    for depth, key in enumerate(keys):
        if key.isdigit():
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or key not in current.model_fields:
            return set()
        annotation = current.model_fields[key].annotation
        if depth == len(keys) - 1:
            found = {get_origin(one) or one for one in _alternatives(annotation)}
            return found - {type(None)}
        inner = [a for a in _annotations(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        current = inner[0] if inner else None
    return set()


def _alternatives(annotation: Any) -> Iterable[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _alternatives(one)
    elif get_origin(annotation) is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    else:
        yield annotation


def apply_override(tree: dict[str, Any], override: str, marks: Marks | None = None) -> None:
    """Apply one `key.path=value` (the value is YAML) to a tree, in place. Numbers in the path index lists.

    UserError for a wrong path or value.
    """
    dotted, equals, value = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r}: expected key.path=value")
    parsed = read_value(keys, value, f"override {override!r}")
    here: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                raise UserError(
                    f"override {override!r}: {'.'.join(keys[:depth])} is a list of {len(here)}; {key!r} is no index of it"
                )
            if last:
                here[int(key)] = parsed
            else:
                here = here[int(key)]
            continue
        if not isinstance(here, dict):
            raise UserError(f"override {override!r}: {'.'.join(keys[:depth])} is {here!r} and holds no {key!r}")
        if last:
            here[key] = parsed
        else:
            if not isinstance(here.get(key), (dict, list)):
                here[key] = {}
            here = here[key]
    if marks is not None:
        path = tuple(keys)
        for known in [known for known in marks if known[: len(path)] == path]:
            del marks[known]
        for depth in range(1, len(path) + 1):  # sections that no file has are marked as written by this override
            if depth == len(path) or path[:depth] not in marks:
                marks[path[:depth]] = f"override {override!r}"


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
            for a in _annotations(current.model_fields[step].annotation)
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        current = found[0] if found else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _annotations(annotation: Any) -> Iterable[Any]:
    yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _annotations(argument)


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
    if first["type"] == "extra_forbidden":
        return UserError(f"{where}: unknown key {dotted!r}{nearest(keys[-1], _options(model, location[:-1]))}")
    if first["type"] == "missing":
        return UserError(f"{where}: the key {dotted!r} is required")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("model_type", "dict_type"):
        options = _options(model, location)
        message = "expected settings" + (f" ({', '.join(options)})" if options else ": a mapping of names to values")
    given = first.get("input")
    shown = "" if isinstance(given, (dict, list)) else f", got {given!r}"
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
    return _load(RunConfig, path, overrides)


def run_from_tree(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Validate an already merged tree (a comparison's cell)."""
    return build(RunConfig, tree, source=source)


def load_compare(path: str | Path, overrides: Iterable[str] = (), quick: bool = False) -> CompareConfig:
    """Read a comparison's config. `quick` applies its preset; an override whose first key is a setting of a run is kept in
    `overrides`, to be applied last to every cell; any other one changes the comparison itself.
    UserError names the file and the line.
    """
    tree, marks = load_tree(path)
    if "model" in tree and "run" not in tree:
        raise UserError(f"{path}: describes one run, not a comparison; use: rlsafe train {path}")
    if quick:
        preset = tree.get("quick")
        if not isinstance(preset, dict) or not preset:
            raise UserError(f"{path}: --quick needs a 'quick' preset (overrides of this file), and there is none")
        tree = cast(dict[str, Any], merge(tree, preset))
        marks |= {keys[1:]: where for keys, where in marks.items() if keys[0] == "quick" and len(keys) > 1}
    for_cells = []
    for override in overrides:
        first = override.partition("=")[0].split(".")[0].strip()
        if first == "seed":
            raise UserError(f"override {override!r}: a comparison runs several seeds; use --seeds or seeds=[...]")
        if first in RunConfig.model_fields and first not in CompareConfig.model_fields:
            apply_override({}, override)  # its syntax is checked now, its effect in each cell
            for_cells.append(override)
        else:
            apply_override(tree, override, marks)
    config = build(CompareConfig, tree, marks, str(path))
    config.overrides = [*config.overrides, *for_cells]
    config._marks, config._source = marks, str(path)
    return config


def dump_yaml(config: BaseModel) -> str:
    """The resolved config, every default written out, in the order of the schema."""
    dumper, tree = getattr(yaml, "CSafeDumper", yaml.SafeDumper), config.model_dump(mode="json")
    return str(yaml.dump(tree, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120))
