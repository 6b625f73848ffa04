"""Every link, anchor and picture of README and docs leads somewhere; a link that names a function leads to the file that has it."""

from __future__ import annotations

import re
from pathlib import Path

from pages import PAGES, anchors, links, slug
from places import ROOT


def broken(page: Path, content: str) -> list[str]:
    """What is wrong with the links of one page."""
    wrong = []
    for text, target in links(content):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif ROOT not in [file, *file.parents]:
            wrong.append(f"{target}: outside of the repository")
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            wrong.append(f"{target}: no such heading")
        elif file.suffix == ".py" and (named := re.fullmatch(r"`(\w+)`", text)):
            if not re.search(rf"^\s*(?:def|class|async def) {named[1]}\b", file.read_text("utf-8"), re.M):
                wrong.append(f"{target}: does not define {named[1]}")
    return [f"{page.relative_to(ROOT)}: {line}" for line in wrong]


def test_every_link_leads_somewhere():
    texts = {page: page.read_text("utf-8") for page in PAGES}
    assert [line for page, text in texts.items() for line in broken(page, text)] == []
    assert sum(1 for text in texts.values() for _ in links(text)) > 80


def test_every_page_can_be_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = [
            (page.parent / target.split("#")[0]).resolve()
            for _, target in links(page.read_text("utf-8"))
            if ":" not in target
        ]
        waiting += [target for target in targets if target.suffix == ".md" and target.is_file()]
    assert {page.relative_to(ROOT).as_posix() for page in PAGES if page not in seen} == set()


def test_headings_of_a_page_differ():
    twice = {
        page.name: [a for a in anchors(page) if anchors(page).count(a) > 1]
        for page in PAGES
        if page.name != "CHANGELOG.md"
    }
    assert {name: found for name, found in twice.items() if found} == {}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 12_000


def test_a_broken_link_is_found():
    text = "[a](none.md) [b](usage.md#nowhere) [`nobody`](../rlsafe/types.py) [c](evaluation.md#the-five-criteria) `[d](code.md)`"
    found = [line.split(": ")[-1] for line in broken(ROOT / "docs" / "usage.md", text)]
    assert found == ["no such file", "no such heading", "does not define nobody"]
    assert slug("What it does *not* show: `kl` & more") == "what-it-does-not-show-kl--more"
