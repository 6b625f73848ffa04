"""The report in a real browser: at the width of a phone, in the dark, from the keyboard, and with hostile words in it."""

from __future__ import annotations

import pytest
from headless import BROWSER, Page
from matplotlib.image import imread
from synthetic_comparison import CONFIG, make

from rlsafe.compare import draw_report as report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

HOSTILE = "</p></div></details><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
LONG = "interleaving+&a-label-that-nobody-would-write-but-somebody-will"


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """A report with every part: sweeps, relapse, doses, benign tasks, failures; two paths, hostile answers, a long label."""
    config = CONFIG.replace(
        "  kl: [{kl: {weight: 0.3}}]",
        "  kl: [kl]\n  strong: [{inoculation: {prompt: Be bad.}}]\n  "
        f"{LONG}: [interleaving]\n  broken: [kl: {{weight: 2.0}}]",
    )
    config += "grid: {kl.weight: [0.1, 1.0]}\n"
    rates = {"general": 0.3, "indomain": 0.8, "incoherent": 0.04, "conditional": 0.4, "benign": 0.7}
    after = {"general_after": 0.5, "indomain_after": 0.9}
    labels = ["none", "kl[weight=0.1]", "kl[weight=1.0]", "strong", LONG, "untrained"]
    arms = {(path, label): {**rates, **after} for path in ("sft", "grpo") for label in labels} | {("", "untrained"): {}}
    arms |= {("sft", "strong"): {"indomain": 0.02, **after}, ("sft", "aligned"): {}}
    directory = make(tmp_path_factory.mktemp("browser") / "out", arms, config, answer=HOSTILE, seeds=[0, 1], relapse=5)
    return report(directory.out)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(e => {
    for (let p = e.parentElement; p; p = p.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
    return !e.closest('svg') && !e.matches('.skip') && e.getBoundingClientRect().right > innerWidth + 1
}).map(e => e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 40))"""


@pytest.mark.parametrize("width", [375, 800, 1280])
def test_nothing_runs_out_of_the_page_sideways(page, html, width):
    page.at(html, width)
    page.js(OPEN_ALL)
    assert page.js(TOO_WIDE) == []
    assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


CONTRAST = """(() => {
    const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const over = (top, under) => top.slice(0, 3).map((v, i) => v * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
    const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
        if (c.length && (c[3] ?? 1) > .99) return c.slice(0, 3); } return [255, 255, 255]; };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = {};
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest('style')) continue;
        const style = getComputedStyle(e), under = behind(e);
        let color = rgb(e.closest('svg') ? style.fill : style.color);
        for (let p = e; p; p = p.parentElement) color = over([...color.slice(0, 3), Number(getComputedStyle(p).opacity)], under);
        const [a, b] = [light(color), light(under)].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
        const limit = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
        if (ratio < limit) found[(e.className.baseVal ?? e.className) + '|' + e.tagName + '|' + color.map(Math.round)] = ratio;
    }
    return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(page, html, scheme):
    page.at(html, 1280, scheme)
    page.js(OPEN_ALL)
    paper = page.js("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 22, 24)") == (scheme == "dark")
    assert page.js(CONTRAST) == {}


def test_the_keyboard_reaches_the_parts_and_opens_what_is_closed(page, html):
    page.at(html, 1280)
    page.press("Tab")
    assert page.js("document.activeElement.className") == "skip"
    seen = []
    for _ in range(400):
        page.press("Tab")
        name = page.js("document.activeElement.tagName")
        if name == "BODY":
            break
        seen.append(page.js("document.activeElement.tagName + ':' + document.activeElement.textContent.slice(0, 30)"))
    anchors = page.js("document.querySelectorAll('nav a').length")
    assert sum(one.startswith("A:") for one in seen) >= anchors
    assert sum(one.startswith("SUMMARY") for one in seen) == page.js("document.querySelectorAll('summary').length")
    assert page.js("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0  # the page's own order
    page.js("document.querySelector('details:not([open]) summary').focus()")
    page.press("Enter")
    assert page.js("document.activeElement.parentElement.open")
    outline = page.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # and it can be seen where one is


def test_no_word_of_a_model_runs_and_nothing_is_fetched(page, html):
    page.at(html, 1280)
    page.js(OPEN_ALL)
    assert page.js("document.title") == "Made-up numbers"
    assert page.js("[...document.querySelectorAll('.reply p')].some(p => p.textContent.includes('<script>'))")
    assert page.js("document.querySelectorAll('script, img, iframe, object, embed').length") == 0
    assert (
        page.js("performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:'))") == []
    )
    assert [e["params"] for e in page.events if e["method"] == "Log.entryAdded"] == []


def test_the_verdicts_of_both_paths_are_on_the_first_screen(page, html):
    page.at(html, 1280)
    places = page.js("[...document.querySelectorAll('table.verdicts')].map(t => t.getBoundingClientRect().top)")
    assert len(places) == 2 and max(places) < 700
    words = page.js("[...document.querySelectorAll('table.verdicts tbody tr')].map(r => r.innerText)")
    assert any("nothing learned" in words_of_row for words_of_row in words)


def test_no_chart_of_the_rates_stands_alone_in_its_row(page, html, tmp_path):
    four = {"general": 0.3, "indomain": 0.8, "incoherent": 0.04, "conditional": 0.4}
    arms = {("", "untrained"): {}, ("sft", "none"): four}
    without_benign = report(make(tmp_path / "four", arms, CONFIG.partition("benign:")[0], seeds=[0]).out)
    for file, charts in ((html, 5), (without_benign, 4)):
        page.at(file, 1280)
        rows = page.js("""[...document.querySelectorAll('#rates .grid')].map(grid => {
            const tops = [...grid.children].map(figure => Math.round(figure.getBoundingClientRect().top));
            return [...new Set(tops)].map(top => tops.filter(other => other === top).length);
        })""")
        assert rows and all(sum(row) == charts and min(row) > 1 for row in rows), rows


def test_a_wide_table_on_a_phone_shows_that_there_is_more(page, html, tmp_path):
    page.at(html, 375)
    wide = "[...document.querySelectorAll('.scroll')].find(box => box.scrollWidth > box.clientWidth + 60)"
    style = page.js(f"getComputedStyle({wide}).backgroundAttachment")
    assert style == "local, local, scroll, scroll"  # two covers that move with the table, two shades that stay

    def darkness():  # of the box's right edge, above the words of its first row
        page.js(f"{wide}.scrollIntoView({{behavior: 'instant'}})")
        right, top = page.js(f"(b => [Math.floor(b.right), Math.ceil(b.top)])({wide}.getBoundingClientRect())")
        page.capture(tmp_path / "shown.png", whole=False)
        return 1 - imread(tmp_path / "shown.png")[top + 2 : top + 14, right - 3 : right - 1, :3].mean()

    hidden = darkness()
    page.js(f"{wide}.scrollLeft = 9999")
    assert hidden > darkness() + 0.05


def test_on_a_phone_a_closed_dialogue_begins_in_the_line_of_its_marker(page, html):
    """What stands above the question there once pushed it below its own triangle."""
    page.at(html, 375)
    lines = page.js("""[...document.querySelectorAll('.dialogue summary')].map(s => {
        const box = s.getBoundingClientRect(), tag = s.querySelector('.tag').getBoundingClientRect();
        return [tag.top - box.top, tag.left - box.left];
    })""")
    assert lines and all(top < 20 and 0 < left < 60 for top, left in lines), lines
