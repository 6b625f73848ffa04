"""From the name of a reward in a config to the function: `file.py:function`, `package.module:function`, `provider:spec`
or a registered name. Every error is one line with its place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from rlsafe.config import RewardConfig, UnknownName, UserError, nearest
from rlsafe.config.importing import describe, import_dotted, import_file
from rlsafe.rewards.registry import registered_rewards
from rlsafe.types import Reward, provider_for, providers

CALL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
FORMS = "expected file.py:function, package.module:function, provider:spec or a registered name"


@dataclass(frozen=True)
class LoadedReward:
    """A reward function with its arguments bound. name: for metrics and errors. thinking: it gets think blocks too. where: the
    rows it is asked about, by column. timeout: seconds of one call."""

    name: str
    fn: Reward
    weight: float = 1.0
    is_async: bool = False
    thinking: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 600.0

    @functools.cached_property
    def takes(self) -> tuple[dict[str, bool], bool]:
        """What `fn` can be given by name, see `parameters`."""
        return parameters(self.fn)

    def wants(self, column: str, value: Any) -> bool:
        """Whether `where` lets a row with this value in."""
        return value in _listed(self.where[column])

    def asked(self, row: Mapping[str, Any]) -> bool:
        """Whether `where` lets this row in."""
        return all(self.wants(column, row.get(column)) for column in self.where)

    def misspelt(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether `where` names a value that none of these rows has, while one has what was probably meant."""
        for column, wanted in self.where.items():
            found = [value for row in rows if (value := row.get(column)) is not None]
            if not any(self.wants(column, value) for value in found) and _meant(_listed(wanted), found):
                return True
        return False

    def unmet(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Why `where` lets none of these rows in, with what they hold instead; None when it lets one in."""
        if any(map(self.asked, rows)):
            return None
        for column, wanted in self.where.items():
            found = [value for row in rows if (value := row.get(column)) is not None]
            if not any(self.wants(column, row.get(column)) for row in rows):
                return f"{column}: no row has {wanted!r}{_alike(_listed(wanted), found)}"
        return f"no row has all of {dict(self.where)}"


def _listed(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _alike(wanted: list[Any], found: list[Any]) -> str:
    """A hint to append: the value that was meant, or those that there are."""
    return _meant(wanted, found) or (nearest(str(wanted[0]), map(str, found)) if wanted else "")


def _meant(wanted: list[Any], found: list[Any]) -> str:
    """A hint to append where a value was probably meant: of another type, or spelled nearly so. "" without one."""
    spelled = {str(one) for one in wanted}
    for value in found:
        if str(value) in spelled:  # cells of a CSV are texts, and YAML reads numbers and true where nothing is quoted
            return f"; the rows have {value!r}, which is another type ({type(value).__name__})"
    there = set(map(str, found))
    hints = (nearest(str(one), there) for one in wanted)
    return next((hint for hint in hints if "did you mean" in hint), "")


def load_reward(config: RewardConfig) -> LoadedReward:
    """Resolve `config.fn` and bind `config.args`.

    A class, or a function that takes none of TRL's call arguments, is a factory
    (`trl.rewards:get_soft_overlong_punishment`): it is called with `args`, and what it returns is the reward.
    UserError names the reward and what is wrong with it.
    """
    fn = _resolve(config.fn)
    if not callable(fn):
        raise UserError(f"reward {config.fn!r} is {_article(fn)}, not a function")
    fn = _bind(config.fn, fn, config.args)
    return LoadedReward(
        _name(config.fn), fn, config.weight, is_async(fn), config.thinking, config.where, config.timeout
    )


def is_async(fn: Reward) -> bool:
    """Whether calling `fn` gives a coroutine: async functions, partials of them, objects with an async `__call__`."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


# ---------------------------------------------------------------------------------------------------- finding it


def _resolve(reference: str) -> Any:
    registered = registered_rewards()
    if reference in registered:
        return registered[reference]
    head, _, function = reference.rpartition(":")
    if reference.endswith(".py"):
        raise UserError(f"reward {reference!r} names no function; {_functions_hint(import_file(reference), reference)}")
    if head.endswith(".py"):
        return _attribute(import_file(head), head, function)
    provided = provider_for(reference)
    if provided is not None:
        provider, spec = provided
        return provider.reward(spec)
    if head and function.isidentifier() and all(part.isidentifier() for part in head.split(".")):
        close = nearest(head, [*providers(), *registered]) if "." not in head else ""
        return _attribute(import_dotted(head, f"reward {reference!r}", f"{close}; {FORMS}"), head, function)
    raise UnknownName(f"unknown reward {reference!r}{nearest(reference, [*registered, *providers()])}; {FORMS}")


def _attribute(module: ModuleType, source: str, function: str) -> Any:
    try:
        return getattr(module, function)
    except AttributeError:
        hint = nearest(function, _functions(module)) or "; it defines none"
        raise UserError(f"{source}: no function {function!r}{hint}") from None
    except Exception as error:  # lazy modules import on attribute access
        raise UserError(f"{source}:{function} cannot be imported: {describe(error)}") from error


def _functions(module: ModuleType) -> list[str]:
    own = {n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__}
    return sorted(n for n in own | set(getattr(module, "__all__", ())) if not n.startswith("_"))


def _functions_hint(module: ModuleType, path: str) -> str:
    names = _functions(module)
    return (
        f"write {path}:{names[0]}"
        if len(names) == 1
        else f"write {path}:NAME, NAME one of: {', '.join(names) or '(none)'}"
    )


# ---------------------------------------------------------------------------------------------------- binding arguments


def parameters(fn: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """({parameter that a keyword can fill: whether it is required}, whether there is `**kwargs`)."""
    try:
        signature = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return {}, True
    named = {p.name: p.default is p.empty for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in signature)


def _bind(reference: str, fn: Callable[..., Any], args: dict[str, Any]) -> Reward:
    named, takes_all = parameters(fn)
    for name in args:
        if name in CALL_ARGUMENTS:
            raise UserError(f"reward {reference!r}: args.{name} is filled by the trainer; remove it")
        if name not in named:
            hint = nearest(name, [n for n in named if n not in CALL_ARGUMENTS]) or "; it takes none"
            if not takes_all or "did you mean" in hint:  # **kwargs would accept a misspelt name silently
                raise UserError(f"reward {reference!r}: no argument {name!r}{hint}")
    if inspect.isclass(fn) or not (takes_all or any(name in named for name in CALL_ARGUMENTS)):
        return _made(reference, fn, args, named)
    return functools.partial(fn, **args) if args else fn


def _made(reference: str, factory: Callable[..., Any], args: dict[str, Any], named: dict[str, bool]) -> Reward:
    missing = [name for name, required in named.items() if required and name not in args]
    if missing:
        raise UserError(
            f"reward {reference!r}: takes none of {', '.join(CALL_ARGUMENTS[:3])} and needs {', '.join(missing)}; "
            "give these under args if it makes a reward function, or add the parameter completions"
        )
    try:
        made = factory(**args)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward {reference!r}: making it from its args failed: {describe(error)}") from error
    if not callable(made):
        takes = f"takes none of {', '.join(CALL_ARGUMENTS[:3])}"
        raise UserError(f"reward {reference!r}: {takes} and gives {_article(made)}, not a function")
    return made


def _name(reference: str) -> str:
    """The function's name for files and modules, the reference itself for registered names and providers."""
    plain = reference in registered_rewards() or provider_for(reference) is not None
    return reference if plain else reference.rpartition(":")[2]


def _article(value: Any) -> str:
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
