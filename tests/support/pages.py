"""README, docs and the other pages as tests read them: links, anchors, commands and snippets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)", re.S | re.M)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def prose(text: str) -> str:
    """A page without its fenced and indented code."""
    text = FENCE.sub("", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def slug(heading: str) -> str:
    """The anchor that GitHub and mkdocs' slugify (gfm) give a heading."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", lambda found: found[1] or "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> list[str]:
    """Every anchor of a page, in order."""
    return [slug(found) for found in re.findall(r"^#{1,6} (.+?)\s*$", FENCE.sub("", page.read_text("utf-8")), re.M)]


def links(text: str) -> Iterator[tuple[str, str]]:
    """(text, target) of each link and picture of a page's text; not of what stands in code."""
    text = prose(text)
    for span in reversed([*re.finditer(r"`[^`\n]*`", text)]):
        if "](" in span[0]:
            text = text[: span.start()] + text[span.end() :]
    for found in LINK.finditer(text):
        yield found[2], found[3]


@dataclass(frozen=True)
class Snippet:
    """A block of code: where it stands, its language ("" = indented, a command line), and its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(page: Path) -> Iterator[Snippet]:
    """Fenced blocks, and runs of indented lines outside of lists."""
    text = page.read_text("utf-8")
    for found in FENCE.finditer(text):
        yield Snippet(page, text.count("\n", 0, found.start()) + 2, found["language"], found["text"])
    blank = FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    block: list[str] = []
    for number, line in enumerate([*blank.splitlines(), "end"], start=1):
        if line.startswith("    "):
            block.append(line[4:])
        elif block:
            yield Snippet(page, number - len(block), "", "\n".join(block) + "\n")
            block = []


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """(place, command line) of each shell command of a page; continued lines are joined, comments at a line's end go."""
    for snippet in snippets(page):
        if snippet.language not in ("", "bash", "sh", "console"):
            continue
        joined = re.sub(r"\s*\\\n\s*", " ", snippet.text)
        for line in joined.splitlines():
            command = re.sub(r"(^|\s{2,}|\s)#\s.*$", "", line).strip()
            if re.match(
                r"(rlsafe\s|bash|accelerate|export|vllm|git|\.venv/bin/|scripts/|tensorboard|inspect|VLLM_\w+=)",
                command,
            ):
                yield snippet.place, command
