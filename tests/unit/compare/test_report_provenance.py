"""The report shows what every run records of its origin, and where runs of one comparison differ in it."""

from __future__ import annotations

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_comparison import CONFIG, make

from rlsafe.compare import draw_report as report
from rlsafe.compare.grid.grid import expand
from rlsafe.compare.report.origins import groups
from rlsafe.compare.verdicts.results import load
from rlsafe.config import load_compare
from rlsafe.engine.record.provenance import files_record

ARMS = {("", "untrained"): {}, ("sft", "none"): {"general": 0.5, "indomain": 0.9}, ("sft", "kl"): {"indomain": 0.9}}
RUN = {
    "python": "3.11.9", "system": "Linux", "processor": "riscv64", "cores": 12, "device": "NVIDIA H100", "devices": 2, "processes": 2,
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
    "seeds": {"run": 5, "evaluate": 3},
    "fingerprints": {"model": {"tiny": "aa11"}, "data": {"bad.jsonl": "bb22"}, "questions": {"q.yaml": ""},
                     "code": {"reward.py": "cc33"}},
    "configs": {"compare.yaml": "dd44"},
    "git": {"reward.py": {"commit": "ee55", "state": "changed"}},
    "arguments": ["compare", "x.yaml", "--seeds", "5"], "command": "", "time": "2026-01-02T03:04:05", "ended": "2026-01-02T04:04:05",
}  # fmt: skip


class Tables(HTMLParser):
    """{summary: rows of cells} of the details of the last section; `open` and the tags inside of them."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.found: dict[str, list[list[str]]] = {}
        self.tags: set[str] = set()
        self.opened: list[str] = []
        self._at, self._summary = "", ""
        self.feed(html[html.index('<section id="configuration">') :])

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self._at = tag if tag in ("summary", "th", "td") else self._at
        self._summary = "" if tag == "summary" else self._summary
        if tag == "details" and "open" in dict(attrs):
            self.opened.append(tag)
        rows = self.found.setdefault(self._summary, [])
        if tag == "tr":
            rows.append([])
        elif tag in ("th", "td") and rows:
            rows[-1].append("")

    def handle_endtag(self, tag):
        self._at = "" if tag == self._at else self._at

    def handle_data(self, data):
        if self._at == "summary":
            self._summary += data
        elif self._at and self.found[self._summary]:
            self.found[self._summary][-1][-1] += data


def tables(directory, *records: dict) -> Tables:
    for id, record in zip(("sft--kl--seed0", "sft--none--seed0", "untrained"), records, strict=True):
        (directory.cell(id) / "run.json").write_text(json.dumps(record))
    return Tables(report(directory.out).read_text(encoding="utf-8"))


@pytest.fixture
def directory(tmp_path):
    return make(tmp_path / "out", ARMS, seeds=[0])


def test_every_recorded_fact_is_shown_once_and_folded_away(directory):
    shown = tables(directory, RUN, RUN, RUN)
    everything = {cell for rows in shown.found.values() for row in rows for cell in row}
    for expected in (
        *("3.11.9", "Linux", "riscv64", "12", "NVIDIA H100", "2", "2.13.0", "0.21.2", "5", "3", "aa11", "bb22", "cc33"),
        *("not on this machine", "changed at ee55", "compare x.yaml --seeds 5", "2026-01-02T03:04:05"),
    ):
        assert expected in everything, expected
    assert [row for row in shown.found["Versions"] if row and row[0] == "torch"] == [["torch", "2.13.0", "all runs"]]
    assert not shown.opened and not [title for title in shown.found if "not the same" in title]


def test_runs_that_differ_are_named_beside_their_values(directory):
    other = {
        **RUN, "versions": {"torch": "2.14.0"}, "seeds": {"run": 6, "evaluate": 3}, "device": "cpu",
        "fingerprints": {**RUN["fingerprints"], "data": {"bad.jsonl": "ff66", "good.jsonl": "0077"}},
    }  # fmt: skip
    shown = tables(directory, RUN, other, RUN)
    rows = {title: {(row[0], *row[1:]) for row in rows if row} for title, rows in shown.found.items()}
    versions = rows["Versions: not the same in all runs"]
    assert ("torch (differs)", "2.14.0", "sft / none / seed 0") in versions
    assert ("torch (differs)", "2.13.0", "untrained, sft / kl / seed 0") in versions
    assert ("peft (differs)", "not recorded", "sft / none / seed 0") in versions
    assert ("device (differs)", "cpu", "sft / none / seed 0") in rows["Machine: not the same in all runs"]
    data = rows["Fingerprints: data: not the same in all runs"]
    assert ("bad.jsonl (differs)", "ff66", "sft / none / seed 0") in data
    assert ("good.jsonl", "0077", "sft / none / seed 0") in data, "other data of another arm are no disagreement"
    assert ("run", "6", "sft / none / seed 0") in rows["Seeds"], "seeds differ by design"
    assert "Fingerprints: models" in rows


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("models:\n  A: {model: {name: tiny}}\n  B: {model: {name: small}}\n", ["A", "B"]),
        ("grid: {batch.sft_rows: [8, 16]}\n", ["tiny[batch.sft_rows=8]", "tiny[batch.sft_rows=16]"]),
    ],
)
def test_runs_of_several_models_are_told_apart(tmp_path, more, names):
    text = CONFIG.split("aligned:")[0]
    directory = make(tmp_path / "out", ARMS, text + more, paths=["sft"], defenses=["none"], seeds=[0])
    config = load_compare(tmp_path / "out.yaml")
    # later another defense is selected; the first one's runs stay in the plan, with labels too
    directory.write_plan(config, expand(config, ["kl"], ["sft"], [0]), "again")
    for cell in directory.plan()["cells"]:
        if (file := directory.cell(cell) / "cell.json").is_file():
            of = names.index(json.loads(file.read_text())["model"])
            (directory.cell(cell) / "run.json").write_text(json.dumps(RUN | {"device": f"GPU-{of}"}))
    for old in (False, True):  # a plan of an older version has labels without models
        if old:
            plan = json.loads((directory.out / "comparison.json").read_text())
            plan["labels"] = {id: label.partition(" / ")[2] for id, label in plan["labels"].items()}
            (directory.out / "comparison.json").write_text(json.dumps(plan))
        [device] = [fact for group in groups(load(directory.out)) for fact in group.facts if fact.name == "device"]
        assert device.differs and [value for value, _ in device.values] == ["GPU-0", "GPU-1"]
        if not old:
            wanted = [f"{name} / untrained, {name} / sft / none / seed 0" for name in names]
            assert [sorted(runs.split(", ")) for _, runs in device.values] == [
                sorted(one.split(", ")) for one in wanted
            ]


def test_the_configs_of_the_comparison_and_their_state_in_git_are_recorded(directory, tmp_path):
    plan = json.loads((directory.out / "comparison.json").read_text())
    assert [len(value) for value in plan["configs"].values()] == [64] and list(plan["configs"]) == ["out.yaml"]
    shown = tables(directory, RUN, RUN, RUN)
    [(title, rows)] = [item for item in shown.found.items() if item[0].startswith("Configs and code")]
    assert ["out.yaml", plan["configs"]["out.yaml"], "all runs"] in rows


def test_git_says_whether_a_file_is_as_committed(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    files = [tmp_path / name for name in ("clean.yaml", "changed.yaml", "new.yaml")]
    for file in files:
        file.write_text("a: 1\n")
    git("init", "-q")
    git("add", "clean.yaml", "changed.yaml")
    git("commit", "-q", "-m", "x")
    files[1].write_text("a: 2\n")
    found = files_record(files)
    assert [state["state"] for state in found["git"].values()] == ["clean", "changed", "untracked"]
    assert all(re.fullmatch("[0-9a-f]{40}", state["commit"]) for state in found["git"].values())


def test_names_from_outside_stay_words(directory):
    hostile = "</code><script>alert(1)</script>\u202e{{ 7 * 7 }}"
    record = {**RUN, "device": hostile, "fingerprints": {"data": {hostile: hostile}}, "arguments": [hostile]}
    shown = tables(directory, record, record, record)
    assert "script" not in shown.tags
    html = Path(directory.out / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in html and "\u202e" not in html and "{{ 7 * 7 }}" in html


def test_runs_without_a_record_are_said_to_have_none(directory):
    html = report(directory.out).read_text(encoding="utf-8")
    assert "Versions" not in Tables(html).found
