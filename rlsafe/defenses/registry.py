"""Building defenses from config entries: finding the class, and checking the settings against its signature."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from rlsafe.config import UnknownName, UserError, nearest
from rlsafe.config.importing import import_dotted, import_file
from rlsafe.defenses.base import Defense, When

_REGISTRY: dict[str, type[Defense]] = {}
_BUILT_IN = {
    "gradient-projection": "rlsafe.defenses.gradient_projection",
    "ablation": "rlsafe.defenses.ablation",
    "kl": "rlsafe.defenses.kl",
    "early-stop": "rlsafe.defenses.early_stop",
    "feature-block": "rlsafe.defenses.feature_block",
    "inoculation": "rlsafe.defenses.inoculation",
    "inoculation-adapter": "rlsafe.defenses.inoculation_adapter",
    "interleaving": "rlsafe.defenses.interleaving",
    "interleaving+": "rlsafe.defenses.interleaving_plus",
    "interleaving++": "rlsafe.defenses.interleaving_plus_plus",
    "interleaving-onpolicy": "rlsafe.defenses.onpolicy",
    "ldifs": "rlsafe.defenses.ldifs",
    "monitor": "rlsafe.defenses.monitor",
    "persona": "rlsafe.defenses.persona",
    "safelora": "rlsafe.defenses.safelora",
    "screening": "rlsafe.defenses.monitor",
}
D = TypeVar("D", bound=type[Defense])


def defense(name: str):
    """Class decorator: make a Defense available to configs under `name`. UserError when the name is taken."""

    def register(cls: D) -> D:
        if not (isinstance(cls, type) and issubclass(cls, Defense)):
            raise UserError(f"@rlsafe.defense({name!r}): {cls!r} is not a subclass of rlsafe.Defense")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def names() -> list[str]:
    """Every defense name a config may use (files and modules aside)."""
    return sorted({*_BUILT_IN, *_REGISTRY})


def load_module(source: str) -> ModuleType:
    """Import `file.py` or a dotted module."""
    return import_file(source) if source.endswith(".py") else import_dotted(source, f"plug-in {source!r}")


def find(name: str) -> type[Defense]:
    """The class behind a registered name, `file.py:Class` or `package.module:Class`.

    UserError with the nearest name for an unknown one.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
        return _REGISTRY[name]
    if ":" in name:
        source, _, attribute = name.rpartition(":")
        module = load_module(source)
        cls = getattr(module, attribute, None)
        if isinstance(cls, type) and issubclass(cls, Defense):
            cls.name = cls.name or attribute
            return cls
        found = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Defense) and value is not Defense
        ]
        raise UserError(f"defense {name!r}: {source} has no Defense class {attribute!r}{nearest(attribute, found)}")
    hint = nearest(name, names())
    own = "" if "did you mean" in hint else "; one of your own needs plugins=[FILE.py], too"
    raise UnknownName(f"unknown defense {name!r}{hint}{own}")


def fields(cls: type[Defense]) -> dict[str, Any]:
    """{setting: (annotation, default)} of a class. An `__init__` that takes `**others` has those of its base class too."""
    found: dict[str, Any] = {}
    for owner in cls.__mro__[:-1]:
        if "__init__" not in vars(owner):
            continue
        init = vars(owner)["__init__"]
        hints = get_type_hints(init, include_extras=True)
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, (hints.get(p.name, Any), ... if p.default is p.empty else p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


@lru_cache(maxsize=256)
def _model(cls: type[Defense]) -> type[BaseModel]:
    """What checks a class's settings. Kept, since a grid builds the same defenses for each of its cells."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=False)
    return create_model("Settings", __config__=config, **fields(cls))


def _settings(cls: type[Defense], given: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Check `given` against the keyword arguments of `cls.__init__`; returns every setting with its default filled in."""
    known = fields(cls)
    try:
        checked = _model(cls).model_validate(dict(given))  # type: ignore[arg-type]  # mypy reads the __hash__ of instances
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise UserError(f"defense {label!r}: unknown setting {key!r}{nearest(key, known)}") from None
        if first["type"] == "missing":
            raise UserError(f"defense {label!r}: the setting {key!r} is required") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"defense {label!r}: {key}: {message[0].lower() + message[1:]}, got {first.get('input')!r}"
        ) from None
    return {name: getattr(checked, name) for name in known}


WHEN = ("from_step", "phases")  # settings of every defense


def _when(label: str, given: Mapping[str, Any]) -> When:
    """UserError for values that are no step, or no list of phases."""
    first, phases = given.get("from_step", 0), given.get("phases")
    numbers = phases if isinstance(phases, list) else [] if phases is None else [None]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (first, *numbers)) or phases == []:
        wrong = "from_step" if isinstance(first, bool) or not isinstance(first, int) or first < 0 else "phases"
        expected = "a step, 0 or more" if wrong == "from_step" else "a list of phases of the schedule, 0 for the first"
        raise UserError(f"defense {label!r}: {wrong}: expected {expected}, got {given[wrong]!r}")
    return When(first, None if phases is None else tuple(phases))


def parse(entry: str | Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """One config entry -> [(name, settings)]: `kl`, `kl&interleaving`, `{kl: {weight: 0.3}}` or `{name: kl, weight: 0.3}`.

    UserError for any other form.
    """
    if isinstance(entry, str):
        return [(name.strip(), {}) for name in entry.split("&") if name.strip() != "none"]
    if "name" in entry:
        return [(str(entry["name"]), {key: value for key, value in entry.items() if key != "name"})]
    parsed = []
    for name, settings in entry.items():
        if settings is not None and not isinstance(settings, Mapping):
            raise UserError(
                f"defense {name!r}: its settings must be a mapping such as {{weight: 0.1}}, got {settings!r}"
            )
        parsed.append((str(name), dict(settings or {})))
    return parsed


def build(
    entries: Iterable[str | Mapping[str, Any]], plugins: Iterable[str] = ()
) -> tuple[list[Defense], list[dict[str, Any]]]:
    """Defenses in the config's order, and the same entries with every setting written out."""
    for plugin in plugins:
        load_module(plugin)
    defenses: list[Defense] = []
    resolved: list[dict[str, Any]] = []
    for entry in entries:
        for name, given in parse(entry):
            cls = find(name)
            when = {key: given[key] for key in WHEN if key in given and key not in fields(cls)}
            settings = _settings(cls, {key: value for key, value in given.items() if key not in when}, name)
            made = cls(**settings)
            made.when = _when(name, when)
            if sum(type(other) is cls for other in defenses):
                made.name = f"{cls.name}-{1 + sum(type(other) is cls for other in defenses)}"  # type: ignore[misc]
            defenses.append(made)
            resolved.append({name: settings | when})
    return defenses, resolved
