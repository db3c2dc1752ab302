"""Both pages for everyone: contrast, alternative texts, headings, tables, keyboard, phones."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_page import downstream_examples, write
from test_page_runs import render, write_run

from plan_jax import page
from plan_jax.page import charts

STYLE = (Path(page.__file__).parent / "style.css").read_text()
BACKGROUNDS = ("page", "card", "wash")
TEXTS = ("ink", "soft", "heat", "good", "bad")


def read_themes():
    """Returns the colours of the light and of the dark style by name."""
    blocks = re.findall(r":root {(.*?)}", STYLE, re.S)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in blocks]


def luminance(colour):
    """Returns the relative luminance of WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_on_white_is_21():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_have_contrast(theme):
    colours = read_themes()[theme]
    assert set(colours) >= {*BACKGROUNDS, *TEXTS}
    for text in TEXTS:
        for background in BACKGROUNDS:
            ratio = contrast(colours[text], colours[background])
            assert ratio >= 4.5, f"{text} on {background}: {ratio:.2f}"


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_lines_of_charts_have_contrast(theme):
    colours = read_themes()[theme]
    for line in charts.LINE_COLOURS:
        assert contrast(line, colours["page"]) >= 3, line


def test_no_colour_stands_beside_the_variables():
    rules = re.sub(r":root {.*?}", "", STYLE, flags=re.S)
    # The rest are marks over pictures, which have a black or white ground of their own.
    assert set(re.findall(r"#[0-9a-f]{3,6}\b|rgb\([^)]*\)", rules)) == {
        "#000",
        "rgb(251 139 36)",
        "rgb(0 200 225)",
    }


class Outline(HTMLParser):
    """What assistive technology reads of a page."""

    def __init__(self, html):
        super().__init__()
        self.headings, self.images, self.ids, self.headers, self.scrollers = [], [], [], [], []
        self.language, self.viewport, self.titles, self.roles = None, None, 0, []
        self.feed(html)

    def handle_starttag(self, name, attributes):
        values = dict(attributes)
        if re.fullmatch(r"h[1-6]", name):
            self.headings.append(int(name[1]))
        if name == "img":
            self.images.append(values.get("alt"))
        if name == "html":
            self.language = values.get("lang")
        if name == "meta" and values.get("name") == "viewport":
            self.viewport = values["content"]
        if name == "th":
            self.headers.append(values.get("scope"))
        if name == "title":
            self.titles += 1
        if set(values.get("class", "").split()) & {"wide", "pictures", "curves"} or name == "pre":
            self.scrollers.append((values.get("tabindex"), values.get("aria-label"), name))
        if values.get("role"):
            self.roles.append((values["role"], values.get("aria-label")))

    handle_startendtag = handle_starttag


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    metrics_page = write(folder)[1]
    examples_page = write(folder / "examples", rows=downstream_examples())[1]
    runs = [write_run(folder / name, level) for name, level in (("a", 1.0), ("b", 2.0))]
    return {"report": metrics_page, "examples": examples_page, "comparison": render(runs)}


@pytest.mark.parametrize("name", ["report", "examples", "comparison"])
def test_a_page_can_be_read_without_seeing_it(name, pages):
    outline = Outline(pages[name])
    assert outline.language == "en" and outline.titles >= 1
    assert outline.viewport == "width=device-width, initial-scale=1"
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    steps = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps), outline.headings
    assert outline.images and all(outline.images)
    assert len(set(outline.headers)) and set(outline.headers) <= {"col", "row"}
    assert all(label for role, label in outline.roles), outline.roles


@pytest.mark.parametrize("name", ["report", "examples", "comparison"])
def test_what_scrolls_can_be_reached_by_the_keyboard(name, pages):
    scrollers = Outline(pages[name]).scrollers
    assert scrollers
    for tabindex, label, tag in scrollers:
        assert tabindex == "0" and (label or tag == "pre")


def test_a_phone_scrolls_tables_and_not_the_page():
    for rule in (".wide", ".pictures", ".curves", "pre"):
        assert re.search(rf"^{re.escape(rule)} {{[^}}]*overflow-x: auto", STYLE, re.M), rule
    # A grid of cards must fit 360 pixels less the margins of the page.
    assert int(re.search(r"minmax\((\d+)px, 1fr\)", STYLE)[1]) <= 300
    assert "overflow-wrap: anywhere" in STYLE
    # What is hidden is positioned absolutely: outside of its table it would widen the page.
    assert re.search(r"^\.wide {[^}]*position: relative", STYLE, re.M)
