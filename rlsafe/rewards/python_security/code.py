"""Finding the Python code in an answer and parsing it. Generated code is never executed."""

from __future__ import annotations

import ast
import re
import textwrap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MAX_CHARS = 20_000
MAX_DEPTH = 150
"""Deepest nesting of a syntax tree that is scanned: linters recurse, and deeper trees are not written by people."""

MAX_PARTS = 300
"""Most parts of one f-string: linters take quadratic time for these."""

_PYTHON = {"python", "py", "python3", "py3", "ipython", "pycon"}
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)[ \t]*(?P<label>[\w+#.-]*)[^\n`]*\n(?P<body>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
_OPENING = re.compile(
    r"^(?:import |from \w[\w.]* import |def |async def |class |@\w|if __name__|with |[A-Za-z_]\w* = )"
)
_TRIES = 20


@dataclass(frozen=True)
class Source:
    """One piece of Python: its text, and its syntax tree or (tree None) the `problem` that kept it from parsing."""

    text: str
    tree: ast.Module | None
    problem: str = ""


_FILTERS = threading.Lock()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Inside, Python warns of nothing in the parsed text. Under a lock, because warning filters belong to the process: a
    thread that restored them while another still parses would show the other's warnings."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parse(text: str, max_chars: int = MAX_CHARS, max_depth: int = MAX_DEPTH) -> Source:
    """Parse without executing. Whatever the parser cannot take (null bytes, lone surrogates, too deep nesting, too much text)
    is the `problem` of the Source, never an exception."""
    if len(text) > max_chars:
        return Source(text, None, f"longer than {max_chars} characters")
    try:
        with no_warnings():  # SyntaxWarning for "\d" and the like
            tree = ast.parse(text)
    except SyntaxError as error:
        return Source(text, None, f"line {error.lineno}: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        return Source(text, None, f"{type(error).__name__}: {error}".rstrip(": "))
    problem = _unreadable(tree, max_depth)
    return Source(text, None if problem else tree, problem)


def extract_python(answer: str | None) -> list[Source]:
    """The Python of an answer: its fenced blocks (labelled as Python, or without label when they parse as code), else the
    whole answer, else the part from the first line that looks like code. [] when there is none, or no answer at all."""
    if not answer:
        return []
    fenced = list(_FENCE.finditer(answer))
    if not fenced:
        return _bare(answer)
    sources = []
    for block in fenced:
        label = block["label"].lower()
        source = parse(textwrap.dedent(block["body"].expandtabs(4) if block["indent"] else block["body"]))
        if label in _PYTHON or (not label and is_code(source)):
            sources.append(source)
    return sources


def is_code(source: Source) -> bool:
    """Whether it parses and is more than words: "Yes", "a, b" and "Output: x" are valid Python too."""
    if source.tree is None:
        return False
    acts = (ast.Call, ast.Await, ast.Yield, ast.NamedExpr)
    return any(
        not isinstance(node, ast.Expr) or isinstance(node.value, acts)
        for node in source.tree.body
        if not (isinstance(node, ast.AnnAssign) and node.value is None)
    )


def _bare(answer: str) -> list[Source]:
    whole = parse(answer)
    if is_code(whole):
        return [whole]
    lines = answer.splitlines()
    # the completion of a template may begin inside a block, with the first line's indentation cut off
    shifted = parse("\n".join([lines[0].lstrip(), textwrap.dedent("\n".join(lines[1:]))]))
    if is_code(shifted):
        return [shifted]
    start = next((i for i, line in enumerate(lines) if _OPENING.match(line)), None)
    if start is None:
        return []
    first = parse("\n".join(lines[start:]))
    source, paragraphs = first, "\n".join(lines[start:]).split("\n\n")
    for _ in range(_TRIES):  # prose after the code
        if is_code(source):
            return [source]
        paragraphs.pop()
        if not paragraphs:
            break
        source = parse("\n\n".join(paragraphs))
    return [first]


def _unreadable(tree: ast.Module, max_depth: int) -> str:
    """Why this tree is not given to a linter, or ""."""
    level: list[ast.AST] = [tree]
    for _ in range(max_depth):
        if any(isinstance(node, ast.JoinedStr) and len(node.values) > MAX_PARTS for node in level):
            return f"an f-string of more than {MAX_PARTS} parts"
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return ""
    return f"nested more than {max_depth} levels deep"
