"""Importing Python that the user named in a config: files and dotted modules.

What goes wrong inside is one line with its place. A file becomes a submodule of this one whose name spells the file's path: any
process that unpickles one of its functions finds the file again (process pools of a reward), and files of the same name do not
clash, nor hide a library's module (`code.py`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from rlsafe.config.errors import UserError, nearest

__path__ = [f"files of {__name__}"]  # makes this module a package, so that files can be its submodules


class _Files(importlib.abc.PathEntryFinder):
    """Finds user files by the path in their module name; asked for this package's submodules only."""

    def __init__(self, entry: str):
        if entry not in __path__:
            raise ImportError

    def find_spec(self, name: str, target: object = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}.file_"):
            return None
        file = Path(bytes.fromhex(name.rpartition("_")[2]).decode())
        _make_importable(file.parent)
        return importlib.util.spec_from_file_location(name, file)


sys.path_hooks.append(_Files)


def _make_importable(folder: Path) -> None:
    """Modules beside a file can be imported by it; at the end of the path, so that they hide nothing."""
    if (place := str(folder)) not in sys.path:
        sys.path.append(place)


@contextmanager
def same_folder() -> Iterator[None]:
    """The user's code may change the working directory; behind it, it is what it was: a run's relative paths hang on it."""
    before = None
    with suppress(OSError):  # it may have been removed meanwhile
        before = os.getcwd()
    try:
        yield
    finally:
        if before is not None:
            os.chdir(before)


def import_file(path: str | Path) -> ModuleType:
    """Import a user's Python file under a module name of its own; its folder is importable.

    An unchanged file is imported once.
    UserError with the file and line of whatever goes wrong inside it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such Python file{nearest(path.name, siblings)}")
    if path.suffix != ".py":
        raise UserError(f"{path}: not a Python file (its name must end in .py)")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    name = f"{__name__}.file_{digest}_{str(path.resolve()).encode().hex()}"
    if name in sys.modules:
        return sys.modules[name]
    _make_importable(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickling look their module up
    try:
        with same_folder():
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (KeyboardInterrupt, UserError)):
            raise
        place = error_place(error, spec.origin or "").replace(spec.origin or "", str(path))
        raise UserError(f"{place}: cannot be imported: {describe(error)}") from error
    return module


def import_dotted(name: str, what: str, hint: str = "") -> ModuleType:
    """Import `package.module`. UserError, beginning with `what`, when it fails; with `hint` at the end when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(f"{what}: no module {error.name!r}{hint}") from None
        raise UserError(f"{what}: {name} cannot be imported: {describe(error)}") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {name} cannot be imported: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """`ValueError: what it says`, in one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def error_place(error: BaseException, path: str) -> str:
    """`file:line` of the deepest frame of `error` inside `path`, or `path` alone."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}:{lines[-1]}" if lines else path
