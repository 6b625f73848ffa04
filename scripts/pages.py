#!/usr/bin/env python3
"""Puts README, CONTRIBUTING, CHANGELOG and docs/ into build/pages as one site; links to code become links to a repository, or names."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "pages"
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")
NAMES = {"README.md": "index.md"}


def place(file: Path) -> Path | None:
    """Where a file of the repository is in the site, if it is a page or a picture."""
    inside = file.relative_to(ROOT)
    if inside.parts[0] == "docs":
        return Path(*inside.parts[1:])
    return Path(NAMES.get(inside.name, inside.name)) if inside.suffix == ".md" and len(inside.parts) == 1 else None


def page(file: Path, repository: str) -> str:
    """A page's text with links that hold in the site."""

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if not target or ":" in target:
            return found[0]
        there = (file.parent / target).resolve()
        if (to := place(there)) is not None:
            here = place(file)
            assert here is not None
            return f"[{text}]({os.path.relpath(to, here.parent)}{anchor})"
        return f"[{text}]({repository}/{there.relative_to(ROOT)})" if repository else text

    text = LINK.sub(link, file.read_text("utf-8"))
    return text.replace("](docs/images/", "](images/") if file.parent == ROOT else text


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    repository = os.environ.get("RLSAFE_REPOSITORY", "").rstrip("/")
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for file in [*files, *sorted((ROOT / "docs").rglob("*"))]:
        to = OUT / place(file) if file.is_file() else None
        if to is None:
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            to.write_text(page(file, repository), "utf-8")
        else:
            shutil.copyfile(file, to)


if __name__ == "__main__":
    main()
