"""Pictures of the page: what is painted, tinted and outlined, and where."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.page import figures
from plan_jax.types import BoxExample, MaskExample, PhraseExample


def radiograph(size=24):
    """A grey wedge."""
    return np.tile(np.linspace(0, 200, size).astype(np.uint8), (size, 1))[..., None]


def phrase_example():
    truth = np.zeros((24, 24), bool)
    truth[4:9, 14:20] = True
    heat_maps = np.random.default_rng(0).normal(size=(3, 6, 6)).astype(np.float32)
    return PhraseExample("best", "nodule left", radiograph(), truth, heat_maps, 1.234, 0.5)


def uniform_image(side=32):
    return np.full((side, side, 1), 100, np.uint8)


def square_mask(start, side=32, size=8):
    mask = np.zeros((side, side), bool)
    mask[start : start + size, start : start + size] = True
    return mask


def test_heat_is_painted_where_it_is_strong_and_nowhere_else():
    image = np.full((24, 24, 1), 90, np.uint8)
    heat = np.zeros((6, 6), np.float32)
    heat[1, 4] = 1
    picture = figures.overlay_heat_map(image, heat, side=48)
    assert picture.shape == (48, 48, 3)
    coloured = (picture != 90).any(-1)
    assert coloured[12, 36] and not coloured[:, :24].any() and not coloured[24:].any()
    red, green, blue = picture[12, 36].astype(int)
    assert red > blue and red > 150


@pytest.mark.parametrize("heat", [np.zeros((6, 6)), np.full((6, 6), 0.7), np.full((6, 6), np.nan)])
def test_a_constant_map_paints_nothing(heat):
    plain = figures.radiograph(radiograph())
    np.testing.assert_array_equal(figures.overlay_heat_map(radiograph(), heat), plain)


def test_heat_is_resized_as_the_metrics_do():
    heat = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    resized = np.asarray(Image.fromarray(heat).resize((24, 24), Image.Resampling.BILINEAR))
    expected = grounding_metrics.upsample(heat[None], (24, 24))[0]
    np.testing.assert_allclose(resized, expected, atol=1e-6)


def test_all_rounds_of_a_phrase_share_one_scale():
    weak = np.zeros((6, 6), np.float32)
    weak[2, 2] = 0.2
    example = dataclasses.replace(phrase_example(), heat_maps=np.stack([weak, 5 * weak]))
    pictures = figures.phrase_pictures(example)
    plain, _, first, last = pictures
    limits = figures.heat_limits(example.heat_maps)
    expected = figures.overlay_heat_map(radiograph(), weak, example.truth, limits=limits)
    np.testing.assert_array_equal(first, expected)

    def painted(picture):
        return np.abs(picture.astype(int) - plain).sum()

    assert painted(first) < painted(last)
    low, high = limits
    assert example.heat_maps.mean() < low < high == 1
    assert figures.phrase_captions(example) == ["radiograph", "truth", "round 0", "round 1"]
    width = 4 * first.shape[1] + 3 * figures.GAP
    assert figures.concatenate(pictures).shape == (first.shape[0], width, 3)


def test_the_outline_goes_around_the_truth_and_not_over_it():
    truth = np.zeros((24, 24), bool)
    truth[4:9, 14:20] = True
    picture = figures.radiograph(radiograph(), truth, side=96)
    plain = figures.radiograph(radiograph(), side=96)
    changed = (picture != plain).any(-1)
    enlarged = np.kron(truth, np.ones((4, 4), bool))
    assert changed.any() and not (changed & enlarged).any()
    assert (picture[changed] == figures.TRUTH_COLOUR).all()
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max()) == (14, 37) and (columns.min(), columns.max()) == (54, 81)


def test_the_predicted_mask_is_tinted_and_the_truth_outlined():
    example = MaskExample("lungs", uniform_image(), square_mask(4), square_mask(12), 0.5)
    picture = figures.mask_picture(example, side=128)
    plain = figures.radiograph(example.image, side=128)
    changed = (picture != plain).any(-1)
    assert picture.shape == (128, 128, 3)
    assert changed[4 * 14, 4 * 14] and not changed[4 * 6, 4 * 6] and not changed[4 * 28, 4 * 28]
    assert (picture == np.uint8(figures.TRUTH_COLOUR)).all(-1).any()


def test_boxes_are_drawn_at_their_coordinates():
    truth, predicted = np.array([[2.0, 2, 10, 10]]), np.array([[20.0, 20, 30, 30]])
    example = BoxExample(uniform_image(), truth, predicted, np.array([0.75], np.float32))
    picture = figures.box_picture(example, side=128)
    true_pixels = (picture == np.uint8(figures.TRUTH_COLOUR)).all(-1)
    predicted_pixels = (picture == np.uint8(figures.PREDICTION_COLOUR)).all(-1)
    assert true_pixels[8:40, 8:40].any() and not true_pixels[44:].any()
    assert predicted_pixels[80:120, 80:120].any() and not predicted_pixels[:76].any()


def test_faint_boxes_are_not_drawn():
    example = BoxExample(
        uniform_image(), np.zeros((0, 4)), np.array([[4.0, 4, 20, 20]]), np.array([0.1])
    )
    picture = figures.box_picture(example, side=128)
    assert not (picture == np.uint8(figures.PREDICTION_COLOUR)).all(-1).any()


def test_an_image_without_boxes_is_drawn():
    example = BoxExample(uniform_image(), np.zeros((0, 4)), np.zeros((0, 4)), np.zeros(0))
    assert figures.box_picture(example, side=64).shape == (64, 64, 3)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_backend_of_a_notebook_is_not_needed(backend):
    script = (
        "from plan_jax.page import charts, figures; import os;"
        "figures.css_colour_bar();"
        "_, png = charts.render_figure((2, 2), lambda figure: figure.add_subplot());"
        "print(png[1:4], os.environ['MPLBACKEND'])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MPLBACKEND": backend},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert (process.stdout, process.stderr) == (f"b'PNG' {backend}\n", "")
