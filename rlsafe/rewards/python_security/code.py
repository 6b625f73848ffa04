"""Python in an answer: find it and parse it. Parsing is all that ever happens to it; nothing generated is executed."""

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
"""Levels of nesting of a syntax tree. Linters recurse; a chain of 5,000 additions is no program that anyone reviews."""

MAX_PARTS = 300
"""Parts of one f-string: what linters do to these takes quadratic time."""

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
    """One piece of Python: its text, and its tree or (tree None) why it does not parse."""

    text: str
    tree: ast.Module | None
    problem: str = ""


_FILTERS = threading.Lock()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Warnings about the text that is looked at are ignored. One thread at a time: the filters belong to the process, and
    one that puts them back while another still parses would show that one's warnings, or raise them."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parse(text: str, max_chars: int = MAX_CHARS, max_depth: int = MAX_DEPTH) -> Source:
    """Parse without executing. Whatever the text does to the parser (null bytes, lone surrogates, nesting that exhausts the
    stack, too large) is a `problem` of the text, never an exception."""
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
    """Whether it parses and does something: "Yes", "a, b" and "Output: x" parse too."""
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
    # a completion of a template may begin in the middle of a block: its first line lost its indentation
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
    """Why no linter should be sent over this tree, or ""."""
    level: list[ast.AST] = [tree]
    for _ in range(max_depth):
        if any(isinstance(node, ast.JoinedStr) and len(node.values) > MAX_PARTS for node in level):
            return f"an f-string of more than {MAX_PARTS} parts"
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return ""
    return f"nested more than {max_depth} levels deep"
