"""Importing Python files and modules that a config names. An error inside them becomes one line with file and line number."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from rlsafe.config.errors import UserError, nearest


def import_file(path: str | Path) -> ModuleType:
    """Import a user's Python file under a module name of its own.

    Files of the same name do not clash; an unchanged file is imported once.
    UserError with the file and line of whatever goes wrong inside it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such Python file{nearest(path.name, siblings)}")
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + path.read_bytes()).hexdigest()[:12]
    name = f"rlsafe_user_{digest}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickling look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (KeyboardInterrupt, UserError)):
            raise
        raise UserError(f"{error_place(error, str(path))}: cannot be imported: {describe(error)}") from error
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
