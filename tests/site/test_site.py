"""The site that `make docs` has built: what it loads, what it renders, what a newcomer finds."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).resolve().parents[2] / "build/site"
PAGES = sorted(SITE.rglob("*.html"))
LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """What a page loads, its images, its headings, and the links of its article."""

    def __init__(self, path):
        super().__init__()
        self.path, self.loaded, self.images, self.headings = path, [], [], []
        self.links, self.in_article, self.language, self._link = [], False, "", None
        self.text = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, name, attributes):
        values = dict(attributes)
        if name in LOADED and values.get(LOADED[name]) and values.get("rel") != "canonical":
            self.loaded.append(values[LOADED[name]])
        if name == "img":
            self.images.append(values.get("alt"))
        if name == "html":
            self.language = values.get("lang")
        if name == "article":
            self.in_article = True
        if self.in_article and re.fullmatch("h[1-6]", name):
            self.headings.append((int(name[1]), values.get("id")))
        if self.in_article and name == "a" and "headerlink" not in values.get("class", ""):
            self._link = [values.get("href", ""), ""]

    def handle_endtag(self, name):
        if name == "article":
            self.in_article = False
        if name == "a" and self._link:
            self.links.append(tuple(self._link))
            self._link = None

    def handle_data(self, text):
        if self.in_article:
            self.text.append(text)
        if self._link:
            self._link[1] += text

    def follow(self, href):
        """Returns the page that a link of this one leads to, and the anchor."""
        parts = urlsplit(href)
        assert not parts.scheme, f"{href} leaves the site"
        target = (self.path.parent / unquote(parts.path)).resolve() if parts.path else self.path
        return (target / "index.html" if target.is_dir() else target), parts.fragment


def test_the_site_is_built():
    names = {str(path.relative_to(SITE)) for path in PAGES}
    assert {"index.html", "tutorial/index.html", "reference/config/index.html"} <= names
    assert len(PAGES) > 100


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(SITE)))
def test_a_page_loads_nothing_from_elsewhere_and_is_complete(path):
    page = Page(path)
    outside = [address for address in page.loaded if re.match(r"(https?:)?//", address)]
    assert not outside
    assert page.language == "en" and all(page.images)
    html = path.read_text("utf-8")
    assert "fonts.g" not in html and 'class="arithmatex"' not in html


def test_styles_and_scripts_load_nothing_from_elsewhere():
    for path in [*SITE.rglob("*.css"), *SITE.rglob("stylesheets/*.css")]:
        assert not re.findall(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//", path.read_text()), path


# The question of a newcomer, the words of the link on the front page, and what the answer has.
QUESTIONS = {
    "how to train on an own folder": ("own folder", "plan-jax --config pairs"),
    "how to ground a phrase": ("Ground a phrase", "plan-jax-predict --checkpoint"),
    "what a number means": ("Glossary", "Contrast-to-noise ratio"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_newcomer_finds_the_answer_in_two_clicks(question):
    words, answer = QUESTIONS[question]
    front = Page(SITE / "index.html")
    (href,) = [href for href, text in front.links if words in text]
    target, _ = front.follow(href)
    assert answer in re.sub(r"\s+", " ", "".join(Page(target).text))


def test_a_number_on_a_page_has_an_entry_in_the_glossary():
    anchors = {anchor for _, anchor in Page(SITE / "glossary/index.html").headings}
    assert anchors >= {"cnr", "pointing", "miou", "null-map", "rk", "word-pixel-map", "rounds"}


def test_equations_are_rendered():
    html = (SITE / "equations/index.html").read_text("utf-8")
    assert html.count("<math ") > 60 and html.count('class="equation"') > 20
    text = "".join(Page(SITE / "equations/index.html").text)
    # LaTeX is in labels only, and no dollar or backslash is left in the text.
    assert not re.findall(r"\$|\\[a-z]+", text)


@pytest.mark.parametrize("name", ["index", "tutorial", "own_data", "glossary", "equations"])
def test_headings_are_in_order(name):
    levels = [
        level for level, _ in Page(SITE / (name if name != "index" else "") / "index.html").headings
    ]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_reference_has_signatures_and_docstrings():
    text = "".join(Page(SITE / "reference/plan_jax.methods.plan/index.html").text)
    for part in ("importance_gates", "Computes the importance of words and of pixels", "hyper"):
        assert part in text


def luminance(colour):
    """Returns the relative luminance of WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_links_have_contrast():
    style = (SITE / "stylesheets/site.css").read_text()
    links = re.findall(r"--md-typeset-a-color: (#\w{6})", style)
    headers = re.findall(r"--md-primary-fg-color: (#\w{6})", style)
    # Pages of the theme are white and about #1e2129; a header has white text.
    pairs = [("#ffffff", links[0]), (links[1], "#1e2129"), *(("#ffffff", x) for x in headers)]
    assert len(pairs) == 4
    for light, dark in pairs:
        assert (luminance(light) + 0.05) / (luminance(dark) + 0.05) >= 4.5, (light, dark)
