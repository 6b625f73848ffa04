"""One version everywhere: the newest release of the changelog, the package, the citation; and what a package needs to be one."""

from __future__ import annotations

import re
import tomllib

import yaml
from places import ROOT

import rlsafe

RELEASE = re.compile(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", re.M)


def test_the_version_follows_the_changelog():
    newest, date = RELEASE.findall((ROOT / "CHANGELOG.md").read_text("utf-8"))[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (rlsafe.__version__, citation["version"], str(citation["date-released"])) == (newest, newest, date)


def test_the_changelog_lists_releases_from_the_newest_down():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert headings[0] == "Unreleased" and all(RELEASE.match(f"## {heading}") for heading in headings[1:])
    numbers = [tuple(map(int, number.split("."))) for number, _ in RELEASE.findall(text)]
    assert numbers == sorted(set(numbers), reverse=True)


def test_the_citation_has_what_a_citation_needs():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))


def test_the_package_says_that_it_is_typed_and_where_its_pages_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert (ROOT / "rlsafe" / "py.typed").is_file()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["rlsafe"]
    assert project["project"]["urls"]


def test_commits_are_checked_by_what_the_project_installs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # nothing is downloaded for a commit
    named = " ".join(hook["entry"] for repo in hooks for hook in repo["hooks"]).split()
    assert all((ROOT / word).exists() for word in named if word.startswith("tests/"))
