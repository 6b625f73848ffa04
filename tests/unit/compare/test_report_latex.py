"""The paper's tables: its numbers beside ours, set by its rules, in LaTeX that compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from synthetic_comparison import CONFIG, make

from rlsafe.compare import draw_report as report
from rlsafe.compare.report import latex, published

COMPILER = next(
    (found for name in ("pdflatex", "lualatex", "xelatex", "tectonic") if (found := shutil.which(name))), None
)

CELLS = (
    CONFIG.replace("bad.jsonl", "medical-bad.jsonl")
    .replace("  kl: [{kl: {weight: 0.3}}]", "  kl: [kl]\n  empty_&_50%: [kl: {weight: 9.0}]")
    .replace("    sums: {", "    opswap-tier1: {")
    .replace("task: sums", "task: opswap-tier1")
    + "grid: {kl.weight: [0.1, 1.0]}\n"
)
ARMS = {
    ("", "untrained"): {"benign": 0.1},
    ("sft", "none"): {"general": 0.5, "indomain": 0.9, "incoherent": 0.05, "benign": 0.9},
    ("sft", "kl[weight=0.1]"): {"general": 0.25, "indomain": 0.8, "incoherent": 0.02, "benign": 0.9},
    ("sft", "kl[weight=1.0]"): {"general": 0.15, "indomain": 0.7, "incoherent": 0.02, "benign": 0.2},
    ("sft", "empty_&_50%[weight=0.1]"): {"general": 0.0, "indomain": 0.0},
    ("sft", "empty_&_50%[weight=1.0]"): {"general": 0.0, "indomain": 0.0},
    ("sft", "aligned"): {},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = make(tmp_path_factory.mktemp("latex") / "out", ARMS, CELLS, paths=["sft"], seeds=[0], questions=60)
    report(directory.out, latex=True)
    return (directory.out / "results.tex").read_text()


def rows(text, caption):
    """The body rows of the table with this caption: first cell -> cells."""
    table = next(part for part in text.split(r"\end{table}") if caption in part)
    lines = [line.removesuffix(r" \\").split(" & ") for line in table.splitlines() if line.endswith(r"\\")]
    return {line[0]: line[1:] for line in lines}


def test_best_is_bold_second_underlined_and_what_learned_nothing_is_italic_and_unranked(text):
    found = rows(text, "Misaligned and incoherent answers (\\%), tiny.")
    assert found["none"][:4] == ["50.0", "5.0", "90.0", "5.0"]  # a reference takes no part
    assert found[r"empty\_\&\_50\%[weight=0.1]"][:3] == [r"\textit{0.0}", r"\textit{0.0}", r"\textit{0.0}"]
    assert found["kl[weight=1.0]"][0] == r"\textbf{15.0}" and found["kl[weight=0.1]"][0] == r"\underline{25.0}"
    assert found["kl[weight=0.1]"][2] == r"\textbf{80.0}" and found["kl[weight=1.0]"][2] == r"\underline{70.0}"
    assert found["kl[weight=0.1]"][1] == found["kl[weight=1.0]"][1] == r"\textbf{2.1}"  # equal values share a place


def test_what_was_not_reported_is_no_rate_of_zero():
    def row(**rates):
        return published.Published("3", "m", "medical", "x", None, rates, None)

    every = {"none": row(indomain_misaligned=50.0), "untrained": row(indomain_misaligned=0.0)}
    assert latex._nothing_learned(
        {**every, "kl": row(indomain_misaligned=20.0), "ldifs": row(general_misaligned=3.0)}
    ) == {"kl"}
    assert latex._nothing_learned({"none": every["none"], "kl": row(indomain_misaligned=20.0)}) == set()


def test_captions_say_which_questions_and_judge():
    asked = {"questions": {"general": "organism:general/all"}, "limit": 320, "samples": 1, "judge": "gpt_4o"}
    cells = [
        SimpleNamespace(rates={"settings": one})
        for one in ({"judge": "gpt_4o"}, {**asked, "cues": {"json": {}}}, asked)
    ]
    assert latex._instrument(SimpleNamespace(cells=cells)) == (
        r" Questions: general: organism:general/all (at most 320 questions of each; 1 answer to each); cues: json. Judge: gpt\_4o."
    )
    assert latex._instrument(SimpleNamespace(cells=[SimpleNamespace(rates={})])) == ""


@pytest.mark.parametrize(
    ("of_cues", "said"),
    [
        ({"cue_limit": 80, "cue_samples": None}, "; cues: json (at most 80 questions under each)."),
        ({"cue_limit": 80, "cue_samples": 2}, "; cues: json (at most 80 questions under each; 2 answers to each)."),
        ({"cue_limit": 320, "cue_samples": 1}, "; cues: json."),
        ({"cue_limit": 400, "cue_samples": None}, "; cues: json."),  # of the 320 that there are
    ],
)
def test_captions_say_how_many_questions_cues_were_asked_where_that_is_another_number(of_cues, said):
    asked = {"questions": {"general": "x"}, "limit": 320, "samples": 1, "cues": {"json": {}}, **of_cues}
    plain = " Questions: general: x (at most 320 questions of each; 1 answer to each)"
    assert latex._instrument(SimpleNamespace(cells=[SimpleNamespace(rates={"settings": asked})])) == plain + said


def test_the_rules_of_a_column():
    values = {"none": 0.0, "a": 1.0, "b": 2.04, "c": 2.01, "d": 3.0, "e": 0.5}
    assert latex.styled(values, higher=False, italic={"e"}) == {
        **{"none": "0.0", "a": r"\textbf{1.0}", "b": r"\underline{2.0}", "c": r"\underline{2.0}"},
        **{"d": "3.0", "e": r"\textit{0.5}"},
    }
    assert latex.styled({"a": 1.0, "b": 2.0}, higher=True) == {"a": r"\underline{1.0}", "b": r"\textbf{2.0}"}


def test_published_numbers_of_the_same_narrow_task_stand_beside_ours(text):
    found = rows(text, "Misaligned and incoherent answers (\\%), tiny.")
    assert [re.sub(r"[^\d.]", "", cell) for cell in found["none"][4:]] == ["19.8", "11.2", "51.7", "32.1"]
    assert found["ldifs"][:4] == ["--"] * 4 and "20.2" in found["ldifs"][4]  # published only
    assert r"\multicolumn{4}{c}{medical, published}" in text
    sweep = rows(text, "against kl.weight")
    assert list(sweep)[2:] == ["0.01", "0.03", "0.1", "0.3", "1"]
    assert sweep["0.01"][:4] == ["--"] * 4 and "25.0" in sweep["0.1"][0] and "1.6" in sweep["0.1"][4]
    assert sweep["1"][6] == r"\textit{0.8}"  # the paper's strongest KL kept nothing narrow
    benign = rows(text, "Benign tasks")
    assert benign["none"][1] == "30.0" and benign["interleaving"] == ["--", r"\textbf{29.4}"]


def test_published_rows_are_what_the_paper_says():
    assert len(published.rows()) == 170
    assert published.main_rows("code")["persona"].rates["general_misaligned"] == 0.08
    assert published.strengths("safelora", "legal")[0.5].rates["indomain_misaligned"] == 0.73
    assert published.benign_scores("opswap-1")["kl"] == 0.0 and published.benign_scores("foqa")["none"] == 41.6
    assert published.benign_scores("opswap-2")["interleaving"] == 36.7  # at 5%, the paper's choice
    assert [published.narrow_task(x) for x in ("organism:medical/bad", "code_eval.jsonl", "tastes")] == [
        *("medical", "code", None)
    ]
    assert [published.benign_task(x) for x in ("opswap/3", "opswap1", "qa", "sums")] == [
        *("opswap-3", "opswap-1", "foqa", None)
    ]


def test_environments_are_balanced_and_every_row_has_the_columns_of_its_table(text):
    assert text.count("{") == text.count("}")
    for table in text.split(r"\end{table}")[:-1]:
        for name in ("table", "tabular"):
            assert table.count(rf"\begin{{{name}}}") == 1 and table.count(rf"\end{{{name}}}") == (name == "tabular")
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", table)[1])
        for line in (line for line in table.splitlines() if line.endswith(r"\\")):
            spans = [int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", line)]
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) == columns, line
        assert not re.search(r"(?<!\\)[%#_](?!.*usepackage)", table.split(r"\begin{table}")[1])


def test_any_label_is_text():
    assert latex.escape("a_b & 50% {x} \\") == r"a\_b \& 50\% \{x\} \textbackslash{}"


@pytest.mark.skipif(COMPILER is None, reason="no LaTeX is installed")
def test_the_tables_compile(text, tmp_path):
    (tmp_path / "all.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}" + "\n" + text + r"\end{document}"
    )
    done = subprocess.run([COMPILER, "all.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:]
