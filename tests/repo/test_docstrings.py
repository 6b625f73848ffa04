"""Public functions say the shapes of their tensors, and the errors that they raise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

Function = ast.FunctionDef | ast.AsyncFunctionDef
PACKAGE = ROOT / "rlsafe"
SHAPE = re.compile(
    r"\[(?:\.\.\., )?[A-Zn][A-Za-z_0-9]*(?:[, ][^\]]*)?\]|\bscalar|\b(?:any|same|their|its|own) shape", re.IGNORECASE
)
RAISES = re.compile(r"raise (?:UserError|RunError|UnknownName|CannotRun)\b")
ERRORS = re.compile(r"Error|\b[Rr]aises\b|Unreachable|CannotRun")
HOLDERS = re.compile(r"\bTensors?\b")


def public_functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """(dotted name, node) of the functions and methods of a module whose names, and whose classes', have no underscore."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def handles_tensors(node: Function) -> bool:
    """Whether the annotations of a function name a tensor."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    annotations = [node.returns, *(argument.annotation for argument in arguments if argument)]
    return any(HOLDERS.search(ast.unparse(annotation)) for annotation in annotations if annotation)


def without_shape(source: str) -> list[str]:
    """The functions of a module's source that handle tensors and do not give a shape such as `[B, T]`, or `scalar`."""
    return [
        name
        for name, node in public_functions(ast.parse(source))
        if handles_tensors(node) and not SHAPE.search(ast.get_docstring(node) or "")
    ]


def test_public_functions_of_tensors_give_their_shapes():
    silent = {
        f"{path.relative_to(PACKAGE)}: {name}" for path in modules() for name in without_shape(path.read_text("utf-8"))
    }
    assert not silent, "\n".join(sorted(silent))


def without_errors(source: str) -> list[str]:
    """The functions of a module's source that raise UserError or RunError themselves and mention no error."""
    return [
        name
        for name, node in public_functions(ast.parse(source))
        if RAISES.search(ast.unparse(node)) and not ERRORS.search(ast.get_docstring(node) or "")
    ]


def test_public_functions_that_raise_say_so():
    silent = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in modules()
        if "cli" not in path.parts  # a command's docstring is its --help
        for name in without_errors(path.read_text("utf-8"))
    }
    assert not silent, "\n".join(sorted(silent))


def test_a_function_that_does_not_name_its_error_is_found():
    source = 'def f():\n    """Nothing."""\n    raise UserError("x")\ndef g():\n    """UserError always."""\n    raise UserError("x")'
    assert without_errors(source) == ["f"]


def test_a_function_without_shapes_is_found():
    source = 'def f(x: Tensor): "no shape"\ndef g(x: Tensor): "[B, T] in nats"\ndef h(x: int): "no tensor"\ndef _i(x: Tensor): ...'
    assert without_shape(source) == ["f"]
