"""Every public function that takes or gives tensors says their shape."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "rlsafe"
SHAPE = re.compile(
    r"\[(?:\.\.\., )?[A-Zn][A-Za-z_0-9]*(?:[, ][^\]]*)?\]|\bscalar|\b(?:any|same|their|its|own) shape", re.IGNORECASE
)
HOLDERS = re.compile(r"\bTensors?\b")


def public_functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(dotted name, node) of the functions and methods of a module whose names, and whose classes', have no underscore."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node


def handles_tensors(node: ast.FunctionDef) -> bool:
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
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in without_shape(path.read_text("utf-8"))
    }
    assert not silent, "\n".join(sorted(silent))


def test_a_function_without_shapes_is_found():
    source = 'def f(x: Tensor): "no shape"\ndef g(x: Tensor): "[B, T] in nats"\ndef h(x: int): "no tensor"\ndef _i(x: Tensor): ...'
    assert without_shape(source) == ["f"]
