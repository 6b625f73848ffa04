"""Settings of the command line: `key.path=value`, the value as YAML or, for paths and other texts, as written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel

from rlsafe.config.base import alternatives
from rlsafe.config.comparison import CompareConfig
from rlsafe.config.errors import UserError
from rlsafe.config.schema import RunConfig

Marks = dict[tuple[str, ...], str]
"""Where each key was written: path of keys -> "file:line" or "override 'a.b=c'"."""
NULLS = ("", "~", "null", "Null", "NULL")
"""How YAML writes that there is no value."""


class _Keys:
    """Keys are texts: YAML 1.1 reads a bare `on` as true, and `on` is a setting of several defenses."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class _Loader(_Keys, yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""


class _FastLoader(_Keys, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, several times as fast; its messages say less."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Puts into quotes the texts that the loaders would read as numbers."""


for _reads in (_Loader, _FastLoader, _Dumper):
    _reads.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def read_yaml(how: Callable[..., Any], text: str) -> Any:
    """`how`, yaml.load or yaml.compose, of a document. yaml.YAMLError when it is none, and for an anchor inside itself.

    What an anchor names is a copy wherever it is used: settings are changed in place, and one place must not change another.
    """
    try:
        try:
            found = how(text, Loader=_FastLoader)
        except yaml.YAMLError:
            found = how(text, Loader=_Loader)
        return _apart(found)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None


def _apart(part: Any, above: tuple[int, ...] = ()) -> Any:
    """A copy in which no mapping or list stands at two places. (copy.deepcopy keeps them shared.)"""
    if not isinstance(part, dict | list):
        return part
    if id(part) in above:
        raise yaml.MarkedYAMLError(problem="an anchor is used inside what it names")
    inner = (*above, id(part))
    if isinstance(part, dict):
        return {key: _apart(one, inner) for key, one in part.items()}
    return [_apart(one, inner) for one in part]


def write_yaml(tree: Any, **how: Any) -> str:
    """YAML that `read_yaml` reads as the same tree, keys in their order. how: as of yaml.dump."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, **how))


def parse_scalar(text: str) -> Any:
    """A value as it would be read from YAML."""
    return read_yaml(yaml.load, text)


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
    if parsed is None and kinds == {str} and text.strip() not in NULLS:  # an anchor, a tag, a comment
        return text.strip()
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
            found = {get_origin(one) or one for one in alternatives(annotation)}
            return found - {type(None)}
        inner = [a for a in types_within(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        current = inner[0] if inner else None
    return set()


def apply_override(tree: dict[str, Any], override: str, marks: Marks | None = None) -> None:
    """Apply one `key.path=value` (the value is YAML) to a tree, in place. Numbers in the path index lists.

    UserError for a wrong path or value.
    """
    dotted, equals, value = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r}: expected key.path=value, such as optim.lr=1e-4")
    if "[" in dotted:
        plain = dotted.strip().replace("[", ".").replace("]", "")
        raise UserError(f"override {override!r}: places in a list are written as keys: {plain}={value}")
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
            if here.get(key) is None:
                here[key] = {}
            here = here[key]
    if marks is not None:
        path = tuple(keys)
        for known in [known for known in marks if known[: len(path)] == path]:
            del marks[known]
        for depth in range(1, len(path) + 1):  # sections that no file has are marked as written by this override
            if depth == len(path) or path[:depth] not in marks:
                marks[path[:depth]] = f"override {override!r}"


def set_by(override: str) -> list[list[str]]:
    """The keys of each setting that `key.path=value` gives: several, where its value is a section. UserError as `apply_override`."""
    value: Any = {}
    apply_override(value, override)
    keys = override.partition("=")[0].strip().split(".")
    for key in keys:
        value = value[key]
    found = [(keys, value)]
    for path, given in found:  # grows while it is walked
        if isinstance(given, Mapping):
            found += [([*path, str(key)], inner) for key, inner in given.items()]
    return [path for path, given in found if not (isinstance(given, Mapping) and given)]


def types_within(annotation: Any) -> Iterable[Any]:
    """A type and all that it is made of."""
    yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from types_within(argument)
