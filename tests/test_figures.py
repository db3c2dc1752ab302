"""Pictures and the page: what is painted, what is escaped, what a page may ask for."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from plan_jax import page
from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.page import figures
from plan_jax.page.elements import Html, number, strip, tag
from plan_jax.page.figures import Panel
from plan_jax.page.tables import nulls_of, verdict
from plan_jax.types import PhraseExample, RetrievalExample

HOSTILE = "$\\bad$ </pre><script>alert(1)</script><img src=x onerror=\"f('&')\">"


def radiograph(size=24):
    """A grey wedge."""
    return np.tile(np.linspace(0, 200, size).astype(np.uint8), (size, 1))[..., None]


def phrase_row(phrase="nodule left", kind="best", rounds=3):
    truth = np.zeros((24, 24), bool)
    truth[4:9, 14:20] = True
    heats = np.random.default_rng(0).normal(size=(rounds, 6, 6)).astype(np.float32)
    return PhraseExample(kind, phrase, radiograph(), truth, heats, 1.234, 0.5)


def retrieved_row(own, other):
    return RetrievalExample(radiograph(), own, ((own, 0.9, True), (other, 0.1, False)), 1.0, 9)


def all_metrics():
    values = {"grounding/n": 50.0, "grounding/skipped": 2.0, "wall_s": 300.0}
    for prefix in ("", "bare/"):
        for null, level in {"": 1.5, "random/": 0.0, "prior/": 1.1, "mean_finding/": 2.4}.items():
            for key in ("cnr_signed", "pointing", "miou_z"):
                values[f"grounding/{prefix}{null}{key}"] = level
                values[f"grounding/{prefix}{null}nodule/{key}"] = level
        for t in range(3):
            values[f"grounding/{prefix}round{t}/cnr_signed"] = 1.2 + t / 10
    values |= {f"retrieval/{p}i2t_r{k}": 0.4 for p in ("", "local/") for k in (1, 5, 10)}
    values |= {"retrieval/chance/i2t_r5": 0.017, "retrieval/i2t_r5_low": 0.3, "retrieval/n": 300.0}
    values |= {"retrieval/i2t_r5_high": 0.5, "params_sha256": "ab" * 32}
    return values | {"zero_shot/auroc_macro": 0.7, "zero_shot/chance/auroc_macro": 0.5}


class Page(HTMLParser):
    """Reads a page and notes its tags, attributes and text, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in ("img", "meta"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_startendtag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes

    def handle_data(self, text):
        self.text.append(text)


def write(tmp_path, **changes):
    given = {
        "config": {"method": "plan", "steps": 100, "data": {"name": "phantom"}},
        "metrics": all_metrics(),
        "history": [{"step": i, "loss": 3.0, "val/grounding/cnr_signed": 0.1} for i in range(3)],
        "rows": [phrase_row(), phrase_row("effusion", "worst"), retrieved_row("own", "b")],
    }
    path = page.write(tmp_path / "run", **given | changes)
    return path, path.read_text(encoding="utf-8")


def test_heat_is_painted_where_it_is_strong_and_nowhere_else():
    image = np.full((24, 24, 1), 90, np.uint8)
    heat = np.zeros((6, 6), np.float32)
    heat[1, 4] = 1
    picture = figures.heat_over(image, heat, side=48)
    assert picture.shape == (48, 48, 3)
    coloured = (picture != 90).any(-1)
    assert coloured[12, 36] and not coloured[:, :24].any() and not coloured[24:].any()
    red, green, blue = picture[12, 36].astype(int)
    assert red > blue and red > 150


@pytest.mark.parametrize("heat", [np.zeros((6, 6)), np.full((6, 6), 0.7), np.full((6, 6), np.nan)])
def test_a_map_that_says_nothing_paints_nothing(heat):
    plain = figures.radiograph(radiograph())
    np.testing.assert_array_equal(figures.heat_over(radiograph(), heat), plain)


def test_heat_is_resized_as_the_metrics_do():
    heat = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    here = np.asarray(Image.fromarray(heat).resize((24, 24), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(here, grounding_metrics.upsample(heat[None], (24, 24))[0], atol=1e-6)


def test_one_scale_for_all_rounds_of_a_row():
    weak = np.zeros((6, 6), np.float32)
    weak[2, 2] = 0.2
    row = dataclasses.replace(phrase_row(), heat_maps=np.stack([weak, 5 * weak]))
    plain, _, first, last = figures.row_parts(row)
    bare = figures.heat_over(radiograph(), weak, row.truth, scale=figures.heat_scale(row.heat_maps))
    np.testing.assert_array_equal(first, bare)
    inked = lambda picture: np.abs(picture.astype(int) - plain).sum()  # noqa: E731
    assert inked(first) < inked(last)
    low, high = figures.heat_scale(row.heat_maps)
    assert row.heat_maps.mean() < low < high == 1
    width = 4 * first.shape[1] + 3 * 6
    assert figures.row_picture(row).shape == (first.shape[0], width, 3)


def test_the_outline_goes_around_the_truth_and_not_over_it():
    truth = np.zeros((24, 24), bool)
    truth[4:9, 14:20] = True
    picture = figures.radiograph(radiograph(), truth, side=96)
    plain = figures.radiograph(radiograph(), side=96)
    changed = (picture != plain).any(-1)
    large = np.kron(truth, np.ones((4, 4), bool))
    assert changed.any() and not (changed & large).any()
    assert (picture[changed] == figures.OUTLINE).all()
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max()) == (14, 37) and (columns.min(), columns.max()) == (54, 81)


def test_curves_are_one_figure_in_two_forms():
    history = [{"step": i, "loss": 1.0 / (i + 1), "other": 2.0} for i in range(40)]
    history.append({"step": 41, "loss": 0.01})
    panels = [Panel("Loss", {HOSTILE: "loss"}, {"chance": 0.5}), Panel("o", {"o": "other"})]
    svg, png = figures.curves(history, panels)
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert svg.startswith("<svg") and "http" not in svg and "currentColor" in svg
    assert "<script" not in svg and figures.INK not in svg
    assert figures.curves(history, panels)[0] == svg


def test_the_page_needs_nothing_else(tmp_path):
    path, text = write(tmp_path)
    page = Page(text)
    assert path.name == "report.html" and not list(path.parent.glob("*.part"))
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/", "#"))
    assert not re.search(r"https?://|@import", text)
    assert all(u.startswith("#") for u in re.findall(r"url\((.*?)\)", text))
    assert page.tags.count("details") == 2
    names = sorted(p.name for p in (path.parent / "figures").iterdir())
    assert names == ["curves.png", "phrase_00_best_nodule_left.png", "phrase_01_worst_effusion.png"]


def test_the_page_shows_values_beside_their_baselines(tmp_path):
    said = " ".join(Page(write(tmp_path)[1]).text)
    for text in (
        "PLAN",
        "1.50",
        "lung prior",
        "1.10",
        "mean mask of finding",
        "2.40",
        "0.017",
        "0.30 to 0.50",
        "round 2",
        "50 phrases, 2 skipped",
        "5.0 min",
        "chance",
        "Not above the mean mask".lower(),
        "colour from",
        "found at rank 1 of 9",
        "✓ right",
        "✗ wrong",
        "abababababababab",
    ):
        assert text in said, text


def test_hostile_text_stays_text(tmp_path):
    _, text = write(
        tmp_path,
        config={"method": HOSTILE, "data": {"name": HOSTILE}, HOSTILE: [HOSTILE]},
        metrics=all_metrics() | {HOSTILE: 1.0, f"grounding/{HOSTILE}/cnr_signed": 1.0},
        history=[{"step": i, HOSTILE: 1.0, f"loss{HOSTILE}": 1.0} for i in range(3)],
        rows=[phrase_row(HOSTILE, HOSTILE), retrieved_row(HOSTILE, HOSTILE)],
    )
    page = Page(text)
    assert "script" not in page.tags and not any(n == "onerror" for n, _ in page.attributes)
    assert HOSTILE in "".join(page.text)


def test_a_run_with_nothing_to_show_still_has_a_page(tmp_path):
    _, text = write(tmp_path, metrics={}, history=[], rows=[])
    assert set(re.findall("<h2>(.*?)</h2>", text)) == {"Everything"}
    _, text = write(tmp_path, metrics={"grounding/cnr_signed": float("nan")}, rows=[phrase_row()])
    assert "nan" in text


def test_old_pictures_of_a_run_do_not_stay(tmp_path):
    write(tmp_path)
    path, _ = write(tmp_path, rows=[phrase_row("other", "random")])
    names = [p.name for p in (path.parent / "figures").glob("phrase_*")]
    assert names == ["phrase_00_random_other.png"]


def test_config_and_metrics_are_whole_in_the_page(tmp_path):
    folded = [t for t in Page(write(tmp_path)[1]).text if t.startswith("{")]
    assert json.loads(folded[0])["data"] == {"name": "phantom"}
    assert json.loads(folded[1]) == all_metrics()


def test_small_parts():
    assert tag("a", "<", Html("<b>"), None, class_='"x"') == '<a class="&quot;x&quot;">&lt;<b></a>'
    assert [number(x) for x in (0.5, -0.01, 0.0, float("nan"), "x", True, 1234.5)] == [
        "0.50",
        "-0.010",
        "0.00",
        "nan",
        "–",
        "–",
        "1234",
    ]
    assert strip(float("nan"), {"a": 1.0}) == strip(1.0, {}) == ""
    assert strip(2.0, {"a": 1.0, "b": float("nan")}).count("<circle") == 2
    values = {"grounding/bare/prior/pointing": 0.1, "grounding/prior/pointing": 0.2}
    assert nulls_of("grounding/bare/pointing", values) == {"lung prior": 0.1}
    said = verdict(1.5, {"lung prior": 1.1, "random map": 0.0, "mean mask of finding": 2.4})
    assert said == "Above the lung prior (1.10), not above the mean mask of finding (2.40)"
