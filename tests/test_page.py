"""The page of a run: what it shows, what is escaped, what it may load."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from plan_jax import page
from plan_jax.types import (
    BoxExample,
    Curve,
    MaskExample,
    Metric,
    PhraseExample,
    ReportExample,
    RetrievalExample,
)

HOSTILE = "$\\bad$ </pre><script>alert(1)</script><img src=x onerror=\"f('&')\">"
NULL_MAPS = {"random map": "random", "lung prior": "prior", "mean mask of finding": "mean_finding"}
CATALOGUE = {
    "grounding": {
        "n": Metric("phrases", "Number of phrases.", 0),
        "skipped": Metric("skipped", "Phrases without a usable truth.", 0),
        "cnr_signed": Metric(
            "CNR, signed",
            "Contrast to noise.",
            2,
            {label: f"{null}/cnr_signed" for label, null in NULL_MAPS.items()},
            headline=True,
        ),
        "round{t}/cnr_signed": Metric("CNR", "After a round.", 2),
        "{finding}/cnr_signed": Metric(
            "CNR",
            "Of {finding}.",
            2,
            {label: f"{null}/{{finding}}/cnr_signed" for label, null in NULL_MAPS.items()},
        ),
    },
    "retrieval": {
        "i2t_r5": Metric("R@5", "Recall.", 3, {"chance": "chance/i2t_r5"}, headline=True)
    },
    "detection": {
        "map": Metric("mAP", "Mean precision.", 3, {"usual boxes": "prior/map"}, headline=True)
    },
}
TITLES = {"grounding": "Phrase grounding", "detection": "Detection"}
VOID_TAGS = ("img", "meta")


def radiograph(size=24):
    return np.tile(np.linspace(0, 200, size).astype(np.uint8), (size, 1))[..., None]


def phrase_example(phrase="nodule left", kind="best", num_maps=3):
    truth = np.zeros((24, 24), bool)
    truth[4:9, 14:20] = True
    heat_maps = np.random.default_rng(0).normal(size=(num_maps, 6, 6)).astype(np.float32)
    return PhraseExample(kind, phrase, radiograph(), truth, heat_maps, 1.234, 0.5)


def retrieval_example(text, wrong_text):
    retrieved = ((text, 0.9, True), (wrong_text, 0.1, False))
    return RetrievalExample(radiograph(), text, retrieved, 1.0, 9)


def downstream_examples(name="lungs"):
    mask, x = np.zeros((24, 24), bool), np.linspace(0, 1, 5)
    no_boxes = np.zeros((0, 4))
    return [
        MaskExample(name, radiograph(), mask, mask, 0.5),
        BoxExample(
            radiograph(),
            np.array([[2.0, 2, 10, 10]]),
            np.array([[12.0, 12, 20, 20]]),
            np.array([0.75], np.float32),
        ),
        BoxExample(radiograph(), no_boxes, no_boxes, np.zeros(0)),
        ReportExample(
            radiograph(), f"reference {name}", f"generated {name}", ("right one",), ("missed one",)
        ),
        Curve("roc", name, x, x**0.5),
        Curve("calibration", name, x, x),
    ]


def example_metrics():
    values = {"grounding/n": 50.0, "grounding/skipped": 2.0, "wall_s": 300.0}
    for null, level in {"": 1.5, "random/": 0.0, "prior/": 1.1, "mean_finding/": 2.4}.items():
        values[f"grounding/{null}cnr_signed"] = level
        values[f"grounding/{null}nodule/cnr_signed"] = level
    values |= {f"grounding/round{t}/cnr_signed": 1.2 + t / 10 for t in range(3)}
    values |= {"retrieval/i2t_r5": 0.4, "retrieval/chance/i2t_r5": 0.017}
    values |= {"retrieval/i2t_r5_low": 0.3, "retrieval/i2t_r5_high": 0.5}
    return values | {"params_sha256": "ab" * 32}


class Page(HTMLParser):
    """The tags, attributes and texts of a page in which every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open_tags = [], [], [], []
        self.feed(html)
        assert not self.open_tags

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in VOID_TAGS:
            self.open_tags.append(name)

    def handle_endtag(self, name):
        assert self.open_tags.pop() == name

    def handle_startendtag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes

    def handle_data(self, text):
        self.text.append(text)


def write(tmp_path, **changes):
    arguments = {
        "config": {"method": "plan", "steps": 100, "data": {"name": "phantom"}},
        "metrics": example_metrics(),
        "catalogue": CATALOGUE,
        "titles": TITLES,
        "history": [{"step": i, "loss": 3.0, "val/grounding/cnr_signed": 0.1} for i in range(3)],
        "rows": [
            phrase_example(),
            phrase_example("effusion", "worst"),
            retrieval_example("right report", "wrong report"),
        ],
    }
    path = page.write_page(tmp_path / "run", **arguments | changes)
    return path, path.read_text(encoding="utf-8")


def headings(html):
    return re.findall("<h2>(.*?)</h2>", html)


def test_the_page_needs_nothing_else(tmp_path):
    path, html = write(tmp_path)
    parsed = Page(html)
    assert path.name == "report.html" and not list(path.parent.rglob("*.part"))
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/", "#"))
    policies = [value for name, value in parsed.attributes if name == "content"]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policies
    assert not re.search(r"https?://|@import", html)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", html))
    assert parsed.tags.count("details") == 2
    names = sorted(file.name for file in (path.parent / "figures").iterdir())
    assert names == ["curves.png", "phrase_00_best.png", "phrase_01_worst.png"]


@pytest.mark.parametrize(
    "text",
    [
        "plan",
        "1.50",
        "lung prior",
        "1.10",
        "mean mask of finding",
        "2.40",
        "0.017",
        "0.30 to 0.50",
        "By round",
        "round 2",
        "phrases",
        "50",
        "5.0 min",
        "chance",
        "Better than lung prior (1.10), not better than mean mask of finding (2.40)",
        "colour from",
        "own report at rank 1 of 9",
        "✓ right",
        "✗ wrong",
        "pointing: 0.50 hit",
        "abababababababab",
    ],
)
def test_the_page_shows_values_beside_their_baselines(text, shared_page):
    assert text in shared_page


@pytest.fixture(scope="module")
def shared_page(tmp_path_factory):
    parsed = Page(write(tmp_path_factory.mktemp("page"))[1])
    return re.sub(r"\s+", " ", " ".join(parsed.text))


def test_hostile_text_stays_text(tmp_path):
    _, html = write(
        tmp_path,
        config={"method": HOSTILE, "data": {"name": HOSTILE}, HOSTILE: [HOSTILE]},
        metrics=example_metrics() | {HOSTILE: 1.0, "grounding/<script>/cnr_signed": 1.0},
        catalogue=CATALOGUE | {HOSTILE: {HOSTILE: Metric(HOSTILE, HOSTILE)}},
        titles=TITLES | {"grounding": HOSTILE},
        history=[{"step": i, HOSTILE: 1.0, f"loss{HOSTILE}": 1.0} for i in range(3)],
        rows=[
            phrase_example(HOSTILE, HOSTILE),
            retrieval_example(HOSTILE, HOSTILE),
            *downstream_examples(HOSTILE),
        ],
    )
    parsed = Page(html)
    assert "<script" not in html and "script" not in parsed.tags
    assert not any(name == "onerror" for name, _ in parsed.attributes)
    texts = [text.strip() for text in parsed.text]
    # In the title, the header, a phrase, a report, the name of a task and a finding.
    assert texts.count(HOSTILE) >= 6 and "<script>" in texts


def test_a_run_with_nothing_to_show_still_has_a_page(tmp_path):
    _, html = write(tmp_path, metrics={}, history=[], rows=[])
    assert headings(html) == ["Config and all metrics"]
    _, html = write(tmp_path, metrics={"grounding/cnr_signed": float("nan")}, rows=[])
    assert "nan" in html


def test_pictures_of_an_earlier_evaluation_are_removed(tmp_path):
    write(tmp_path)
    path, _ = write(tmp_path, rows=[phrase_example("nodule right", "random")])
    names = [file.name for file in (path.parent / "figures").glob("phrase_*")]
    assert names == ["phrase_00_random.png"]


def test_config_and_metrics_are_complete_in_the_page(tmp_path):
    config, metrics = [t for t in Page(write(tmp_path)[1]).text if t.startswith("{")]
    assert json.loads(config)["data"] == {"name": "phantom"}
    assert json.loads(metrics) == example_metrics()


def test_every_type_of_example_has_a_section(tmp_path):
    metrics = example_metrics() | {"detection/map": 0.3, "detection/seconds": 12.0}
    _, html = write(tmp_path, metrics=metrics, rows=downstream_examples())
    assert headings(html) == [
        "Summary",
        "Metrics by task",
        "ROC and calibration curves",
        "Segmentation masks",
        "Detected boxes",
        "Generated reports",
        "Training curves",
        "Config and all metrics",
    ]
    assert "missed one" in html and "Detection 12 s" in html and "Dice 0.50" in html
    assert "1 true, best score 0.75" in html and "0 true, best score none" in html


def test_a_model_without_rounds_has_one_heat_map(tmp_path):
    _, html = write(tmp_path, rows=[phrase_example(num_maps=1)])
    assert "<figcaption>heat map</figcaption>" in html and "round 0" not in html.lower()


def test_a_comparison_is_one_table_with_links():
    html = page.render_comparison(
        "Methods", HOSTILE, ["variant", "CNR"], [["plan", "1.5 ± 0.1"]], ["plan-0/report.html"]
    )
    parsed = Page(html)
    assert "script" not in parsed.tags and HOSTILE in parsed.text
    assert ("href", "plan-0/report.html") in parsed.attributes
    assert [text for text in parsed.text if text.strip()][-5:] == [
        "variant",
        "CNR",
        "plan",
        "1.5 ± 0.1",
        "plan-0/report.html",
    ]
