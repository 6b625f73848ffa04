"""The report: one self-contained page that says what was measured, and that no model's words can break."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_comparison import CONFIG, make

import rlsafe
from rlsafe.compare import draw_report as report
from rlsafe.compare.report import pages, plots, quantities, sections, why
from rlsafe.compare.report.charts import label_places
from rlsafe.compare.verdicts.results import load
from rlsafe.compare.verdicts.verdicts import judge_defenses

ARMS = {
    ("", "untrained"): {"benign": 0.1},
    ("sft", "none"): {"general": 0.5, "indomain": 0.9, "incoherent": 0.05, "conditional": 0.4, "benign": 0.9},
    ("sft", "kl"): {"general": 0.01, "indomain": 0.9, "incoherent": 0.02, "benign": 0.9},
    ("sft", "aligned"): {},
    ("grpo", "none"): {"general": 0.4, "indomain": 0.9, "benign": 0.9},
    ("grpo", "kl"): {"general": 0.0, "indomain": 0.02, "benign": 0.1},
}
HOSTILE = "</p></div><script>alert(1)</script><img src=x onerror=alert(2)> \u202eevil\u202c \x1b[31m {{ 7 * 7 }} \ud800"


class Page(HTMLParser):
    """Collects what the tests ask for: tags with attributes, ids, visible text of tables."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make(tmp_path_factory.mktemp("report") / "out", ARMS, answer=HOSTILE, seeds=[0, 1]).out


@pytest.fixture(scope="module")
def html(out):
    return report(out, latex=True).read_text(encoding="utf-8")


def test_words_of_a_model_stay_words(html):
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "link") and tag != "link"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "{{ 7 * 7 }}" in html and "\u202e" not in html and "\x1b" not in html and "\u2039U+202E\u203a" in html


def test_the_page_needs_nothing_from_outside(html):
    outside = re.findall(r'(?:src|href)="(?!#|data:|cells/)([^"]+)"', html) + re.findall(
        r"url\((?!#)([^)]*)\)|@import", html
    )
    assert outside == []
    assert "default-src 'none'" in html


def test_ids_are_unique_and_every_link_inside_the_page_has_a_target(html):
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("href", "xlink:href"):
            if (target := attributes.get(name) or "").startswith("#"):
                assert target[1:] in ids


def test_charts_carry_the_pages_colours_in_both_schemes_and_a_description(html):
    charts = re.findall(r"<svg .*?</svg>", html, flags=re.S)
    assert len(charts) > 10
    assert all("var(--" in chart and 'role="img"' in chart and 'aria-label="' in chart for chart in charts)
    assert not any(re.search(r"#0(10[0-9a-f]{3}|a0b[0-9a-f]{2})", chart) for chart in charts)  # no sentinel is left
    assert "prefers-color-scheme: dark" in html


def test_verdicts_are_words_and_symbols_not_colours_alone(html):
    table = html[html.index('class="verdicts"') :]
    assert "✓ yes" in table and "✗ no" in table
    assert "– nothing learned" in table  # kl under grpo kept no narrow behaviour


def test_what_learned_nothing_is_not_shown_as_success(out):
    from rlsafe.compare.report.sections import shown as shown_cell

    grpo = next(table for table in judge_defenses(load(out)) if table.path == "grpo")
    shown = shown_cell(grpo.rows["kl"], "prevents_em")
    assert (shown["word"], shown["grade"], shown["value"], shown["leaning"]) == (
        "nothing learned",
        "untested",
        "",
        None,
    )
    sentence = dict(pages.headlines([grpo]))["grpo"]
    assert "kl meets" not in sentence and "no defense meets every criterion" in sentence


def test_the_headline_names_the_defense_that_meets_everything(tmp_path):
    arms = {**ARMS, ("sft", "kl"): {"general": 0.0, "indomain": 0.9, "incoherent": 0.0}}
    directory = make(tmp_path / "o", arms, CONFIG.split("benign:\n")[0], questions=60, samples=10, paths=["sft"])
    ((name, sentence),) = pages.headlines(judge_defenses(load(directory.out)))
    assert name == "sft" and sentence == (
        "kl meets the three criteria that were tested (not: learns benign tasks and holds under cues)."
    )


def test_every_rate_lies_in_its_interval(out):
    rates = [rate for table in judge_defenses(load(out)) for row in table.rows.values() for rate in row.rates.values()]
    assert any(rate.mean == 0.0 for rate in rates) and all(rate.low <= rate.mean <= rate.high for rate in rates)


def test_budgets_are_said_in_words(out):
    found = pages.budgets(load(out))
    assert found == {"sft": 40 * 16, "grpo": 20 * 4 * 8}
    assert "matched" in pages.budget_sentence(found) and "not matched" not in pages.budget_sentence(found)
    assert "not matched" in pages.budget_sentence({"sft": 640, "grpo": 1280})


def test_every_colour_of_a_series_can_be_read_as_text_in_both_schemes():
    from rlsafe.compare.report.reporting import environment_text

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    schemes = re.findall(r":root \{(.*?)\n\s*\}", environment_text("report.css"), re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", scheme))
        series = {name: colour for name, colour in colours.items() if re.fullmatch(r"s\d+|ink|muted", name)}
        assert len(series) == 14
        for name, colour in series.items():
            high, low = sorted((light(colour), light(colours["paper"])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_the_same_question_is_shown_for_every_arm(out):
    sft = next(table for table in judge_defenses(load(out)) if table.path == "sft")
    shown = pages.dialogues(load(out), sft)
    assert {dialogue.kind for dialogue in shown} == set(pages.KINDS.values())
    assert [reply.label for reply in shown[0].replies] == ["untrained", "none", "kl", "aligned"]
    assert shown[0].replies[1].tone == "misaligned"


def test_failed_runs_are_on_the_page(tmp_path):
    from rlsafe.compare.grid.grid import expand
    from rlsafe.config import load_compare

    directory = make(tmp_path / "o", {("sft", "none"): {"general": 0.4, "indomain": 0.9}}, paths=["sft"], seeds=[0])
    cell = next(c for c in expand(load_compare(tmp_path / "o.yaml"), paths=["sft"], seeds=[0]) if c.defense == "kl")
    directory.write_record(cell, "failed", 1.0, "RuntimeError: <boom>")
    html = report(directory.out).read_text()
    assert "RuntimeError: &lt;boom&gt;" in html and "runs are missing" in html


def test_a_report_without_any_finished_run(tmp_path):
    html = report(make(tmp_path / "o", {}, seeds=[0]).out).read_text()
    assert "No finished runs to judge" in html


@pytest.mark.parametrize("label", ["$x^2$ <b> & 'q' \"d\"", "kl" * 40])
def test_any_label_can_be_drawn(tmp_path, label):
    config = CONFIG.replace("  none: []", "  none: []\n  ? " + __import__("json").dumps(label) + "\n  : []")
    arms = {**ARMS, ("sft", label): {"general": 0.2, "indomain": 0.5}}
    html = report(make(tmp_path / "o", arms, config, paths=["sft"], seeds=[0]).out, latex=True).read_text()
    assert "<b> &" not in html and (label in html or "$x^2$ &lt;b&gt; &amp;" in html)


def test_labels_of_close_points_do_not_cover_each_other():
    points = {name: (100.0 + index, 50.0) for index, name in enumerate(["kl", "inoculation", "interleaving", "none"])}
    places = label_places(points, [], 400)
    boxes = [(x, x + 6.2 * len(name), y - 7, y + 7) for name, (x, y) in places.items()]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert min(a[1], b[1]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[2], b[2])


def test_the_same_results_give_the_same_page(out, html):
    assert report(out).read_text(encoding="utf-8") == html


def test_a_composition_may_be_broken_after_the_ampersand_and_stays_escaped():
    from rlsafe.compare.report.reporting import breakable

    assert breakable("kl&<b>") == "kl&amp;<wbr>&lt;b&gt;"


def test_a_defense_that_learned_nothing_narrow_is_never_called_closest():
    from types import SimpleNamespace

    from rlsafe.compare.report.pages import headlines

    def row(nothing_learned, **grades):
        verdicts = {
            name: SimpleNamespace(grade=grade, leaning=None, value=0.5)
            for name, grade in {"learns_benign": "untested", "holds_under_cues": "untested", **grades}.items()
        }
        rates = {"general": None, "indomain": None}
        return SimpleNamespace(verdicts=verdicts, nothing_learned=nothing_learned, success=False, rates=rates)

    rows = {
        "none": row(False, prevents_em="no", keeps_narrow="yes", coherent="yes"),
        "inoculation": row(True, prevents_em="yes", keeps_narrow="no", coherent="yes"),
        "kl": row(False, prevents_em="partly", keeps_narrow="partly", coherent="partly"),
    }
    table = SimpleNamespace(model="m", path="sft", rows=rows, defenses=list(rows))
    ((_, sentence),) = headlines([table])
    assert "closest is kl" in sentence
    table.rows = {"none": rows["none"], "inoculation": rows["inoculation"]}
    table.defenses = list(table.rows)
    ((_, sentence),) = headlines([table])
    assert "nothing narrow was learned" in sentence


@pytest.mark.parametrize("grade, words", [("unclear", "was not clearly learned"), ("yes", "kept? kl: partly.")])
def test_without_judged_general_answers_the_headline_speaks_of_the_narrow_behaviour(grade, words):
    """As in the quick comparison of a real model, where a linter judges code and nobody the rest."""
    from types import SimpleNamespace

    def row(narrow):
        grades = {
            "prevents_em": "untested",
            "keeps_narrow": narrow,
            "learns_benign": "untested",
            "coherent": "untested",
        }
        verdicts = {name: SimpleNamespace(grade=one, leaning=None, value=None) for name, one in grades.items()}
        return SimpleNamespace(verdicts=verdicts, nothing_learned=False, success=False, rates={"indomain": None})

    rows = {"none": row(grade), "kl": row("partly")}
    ((_, sentence),) = pages.headlines([SimpleNamespace(model="m", path="sft", rows=rows, defenses=list(rows))])
    assert "no judge graded general answers" in sentence and words in sentence and "benign" not in sentence


def test_dashed_lines_and_logged_quantities_are_explained_in_words(out, html):
    results = load(out)
    [table] = [table for table in judge_defenses(results) if table.path == "sft"]
    sudden = [onset for onset in why.onsets(results, table) if onset.step is not None]
    text = " ".join("".join(Page(html).text).split())
    assert sudden and all(f"{onset.label}, step {onset.step}" in text for onset in sudden)
    effects = [row for section in judge_defenses(results) for row in pages.effects(results, section)]
    assert effects and all(f"{row['words']} {row['quantity']}" in text for row in effects)


def test_lines_at_one_step_take_turns_so_that_each_is_seen():
    marks = plots.taking_turns({"none": 40, "kl": 10, "persona": 40, "ldifs": 40})
    assert marks == {"none": (40, 0, 3), "kl": (10, 0, 2), "persona": (40, 1, 3), "ldifs": (40, 2, 3)}
    style = plots.looks([*marks])
    line = [(0, 0.0, 0.0, 0.0), (50, 1.0, 1.0, 1.0)]
    drawn = plots.curves(
        dict.fromkeys(marks, line), style, "n", "d", False, {label: m[0] for label, m in marks.items()}
    )
    offsets = re.findall(r"stroke-dashoffset: ([\d.]+)", drawn)
    assert len(offsets) == 4 and len({*offsets}) == 3  # three shifts at one step, and the first again at the other


def test_colours_and_markers_tell_many_labels_apart_and_none_from_all():
    looks = plots.looks(["untrained", "none", *(f"d{i}" for i in range(40)), "aligned"])
    assert len({(look.color, look.marker) for look in looks.values()}) == len(looks)
    assert looks["none"].marker not in {look.marker for label, look in looks.items() if label != "none"}


def test_incoherence_of_another_path_does_not_press_the_points_of_this_one_together(out):
    tables = judge_defenses(load(out))
    style = plots.looks(list(dict.fromkeys(label for table in tables for label in table.rows)))
    [sft] = [table for table in tables if table.path == "sft"]
    top = dict.fromkeys(sections.RATES, 1.0)  # grpo's answers all fell apart
    [plane] = [chart["svg"] for chart in sections.planes(sft, style, "sft", top) if "incoherent" in chart["title"]]
    percents = [int(text) for text in re.findall(r">(\d+)%<", plane)]
    assert 100 in percents and sorted(percents)[0] == 0  # the rates upwards keep the scale that all paths share
    across = percents[: percents.index(0, 1)]  # matplotlib writes the ticks of x first
    assert max(across) < 30


def test_the_report_says_beside_the_numbers_what_the_models_provider_warns_of(tmp_path, html):
    config = CONFIG.split("benign:\n")[0].replace("model: {name: tiny}", "model: {name: 'organism:aligned'}")
    page = report(make(tmp_path / "o", ARMS, config, seeds=[0], paths=["sft"]).out).read_text("utf-8")
    warning = "are not evidence about large models"
    before_the_verdicts, _, rest = page.partition('<table class="verdicts"')
    assert warning in before_the_verdicts and warning in rest[rest.index('id="rates"') :]
    assert warning not in html and "if that is the model compared here" in html


def test_every_quantity_that_a_built_in_defense_logs_has_words():
    source = "".join(file.read_text() for file in (Path(rlsafe.__file__).parent / "defenses").glob("*.py"))
    logged = set(re.findall(r'(?:return|self\.last \|?=) \{(?:\*\*counts, )?"(\w+)": ', source)) - {
        "stream",
        "step",
        "steps",
        *("totals", "basis", "guide", "columns"),  # what a defense keeps for a resume
    }
    assert {"distance", "steering_norm", "projected", "kept"} <= logged
    assert logged | {"full", "k3", "grad_share", "prompts_changed", "rows_added"} <= set(quantities.WORDS) | {"asked"}
    assert quantities.plain("my_own") == "my own"
