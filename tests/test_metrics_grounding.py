"""Grounding metrics against literal loops, numbers by hand, and the cases they define."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.metrics import grounding as grounding_metrics


def make_maps_and_truth(seed=0, count=6, pixels=40):
    """Returns random maps [B P] and a truth that is neither empty nor everything."""
    random = np.random.default_rng(seed)
    truth = random.random((count, pixels)) < 0.3
    truth[:, 0], truth[:, 1] = True, False
    return random.normal(size=(count, pixels)).astype(np.float32), truth


def loop_cnr(values, truth):
    inside = [v for v, t in zip(values, truth, strict=True) if t]
    outside = [v for v, t in zip(values, truth, strict=True) if not t]

    def mean(x):
        return sum(x) / len(x)

    def variance(x):
        return sum((v - mean(x)) ** 2 for v in x) / len(x)

    return (mean(inside) - mean(outside)) / math.sqrt(variance(inside) + variance(outside))


def loop_iou(values, truth, normalisation):
    low, high, mean = min(values), max(values), sum(values) / len(values)
    level = {
        "raw": lambda v: max(v, 0),
        "minmax": lambda v: (v - low) / (high - low),
        "z": lambda v: max(v - mean, 0) / (high - mean),
    }[normalisation]
    total = 0
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
        above = {i for i, v in enumerate(values) if level(v) > threshold}
        real = {i for i, t in enumerate(truth) if t}
        total += len(above & real) / len(above | real)
    return total / 5


def loop_bilinear(image, size):
    out = np.zeros(size)
    for y, x in itertools.product(range(size[0]), range(size[1])):
        v = min(max((y + 0.5) * image.shape[0] / size[0] - 0.5, 0), image.shape[0] - 1)
        u = min(max((x + 0.5) * image.shape[1] / size[1] - 0.5, 0), image.shape[1] - 1)
        top, left = int(v), int(u)
        down, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
        upper = image[top, left] * (1 - u + left) + image[top, right] * (u - left)
        lower = image[down, left] * (1 - u + left) + image[down, right] * (u - left)
        out[y, x] = upper * (1 - v + top) + lower * (v - top)
    return out


@pytest.mark.parametrize("size", [(8, 8), (7, 13), (3, 4), (2, 9)])
def test_upsample_is_bilinear_between_pixel_centres(size):
    image = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    expected = [loop_bilinear(channel, size) for channel in image]
    np.testing.assert_allclose(grounding_metrics.upsample(image, size), expected, atol=1e-6)


@given(st.integers(1, 20), st.integers(1, 40))
def test_bilinear_weights_sum_to_one_and_mirror(num_inputs, num_outputs):
    matrix = grounding_metrics.bilinear_matrix(num_inputs, num_outputs)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-5)


def test_cnr_by_hand():
    values = np.array([[3.0, 5.0, 0.0, 2.0]])
    truth = np.array([[True, True, False, False]])
    assert grounding_metrics.contrast_to_noise(values, truth)[0] == pytest.approx(3 / math.sqrt(2))
    assert grounding_metrics.contrast_to_noise(-values, truth)[0] == pytest.approx(
        -3 / math.sqrt(2)
    )


@pytest.mark.parametrize("seed", range(3))
def test_cnr_is_the_literal_formula(seed):
    values, truth = make_maps_and_truth(seed)
    expected = [loop_cnr(v.tolist(), t) for v, t in zip(values, truth, strict=True)]
    np.testing.assert_allclose(
        grounding_metrics.contrast_to_noise(values, truth), expected, rtol=1e-4
    )


@given(st.floats(0.01, 100), st.floats(-10, 10))
def test_cnr_ignores_scale_and_offset(scale, offset):
    values, truth = make_maps_and_truth()
    values = values.astype(np.float64)
    moved = grounding_metrics.contrast_to_noise(values * scale + offset, truth)
    np.testing.assert_allclose(moved, grounding_metrics.contrast_to_noise(values, truth), rtol=1e-5)


def test_cnr_where_the_formula_is_undefined():
    truth = np.array([[True, True, False, False]])
    everywhere, nowhere = np.ones((1, 4), bool), np.zeros((1, 4), bool)
    values = np.array([[3.0, 5.0, 0.0, 2.0]])
    assert grounding_metrics.contrast_to_noise(np.full((1, 4), 0.3, np.float32), truth)[0] == 0
    assert grounding_metrics.contrast_to_noise(np.zeros((1, 4)), truth)[0] == 0
    assert grounding_metrics.contrast_to_noise(truth.astype(float), truth)[0] == pytest.approx(1000)
    assert np.isnan(grounding_metrics.contrast_to_noise(values, everywhere))[0]
    assert np.isnan(grounding_metrics.contrast_to_noise(values, nowhere))[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_give_nan(value):
    values, truth = make_maps_and_truth(count=2)
    values[0, 3] = value
    scores = [
        grounding_metrics.contrast_to_noise(values, truth),
        grounding_metrics.pointing(values, truth),
    ]
    scores += [
        grounding_metrics.mean_iou(values, truth, name) for name in grounding_metrics.NORMALISATIONS
    ]
    for score in scores:
        assert np.isnan(score).tolist() == [True, False]


def test_pointing_shares_the_point_among_ties():
    truth = np.array([[True, False, False, True]])

    def score(*values):
        return grounding_metrics.pointing(np.array([values], np.float32), truth)[0]

    assert score(9, 1, 2, 3) == 1
    assert score(1, 9, 2, 3) == 0
    assert score(9, 9, 2, 1) == 0.5
    assert score(9, 9, 2, 9) == pytest.approx(2 / 3)
    assert score(0.3, 0.3, 0.3, 0.3) == 0.5
    assert score(-1, -2, -3, -1) == 1


@pytest.mark.parametrize("normalisation", grounding_metrics.NORMALISATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_iou_is_the_literal_formula(normalisation, seed):
    values, truth = make_maps_and_truth(seed)
    expected = [loop_iou(v.tolist(), t, normalisation) for v, t in zip(values, truth, strict=True)]
    np.testing.assert_allclose(
        grounding_metrics.mean_iou(values, truth, normalisation), expected, rtol=1e-6
    )


def test_iou_by_hand():
    values = np.array([[1.0, 0.35, 0.0, -1.0]])
    truth = np.array([[True, False, False, False]])
    # raw: thresholds .1, .2, .3 also take the second pixel, so 1/2; .4 and .5 only the first
    assert grounding_metrics.mean_iou(values, truth, "raw")[0] == pytest.approx((3 * 0.5 + 2) / 5)
    # min-max: 1, .675, .5, 0: three pixels up to .4 (1/3 each), two at .5
    assert grounding_metrics.mean_iou(values, truth, "minmax")[0] == pytest.approx(
        (4 / 3 + 1 / 2) / 5
    )


def test_iou_of_a_negative_map_and_of_the_truth():
    truth = np.array([[True, False, True]])
    for name in grounding_metrics.NORMALISATIONS:
        assert grounding_metrics.mean_iou(np.full((1, 3), -0.2, np.float32), truth, name)[0] == 0
        assert grounding_metrics.mean_iou(truth.astype(float), truth, name)[0] == 1
        assert np.isnan(
            grounding_metrics.mean_iou(truth.astype(float), np.zeros((1, 3), bool), name)[0]
        )


def test_normalise_does_not_amplify_rounding():
    flat = (np.float32(0.7) + np.float32(1e-8) * np.arange(5, dtype=np.float32))[None]
    for name in ("minmax", "z"):
        assert not grounding_metrics.normalise(flat, name).any()


def loop_afloc_iou(heat, truth, threshold):
    """AFLoc's overlap at one threshold, written out from its code."""
    level = (heat - heat.min()) / (heat.max() - heat.min()) * 2 - 1
    mask = level > threshold
    if not mask.any() or not truth.any():
        return float("nan")
    return np.logical_and(mask, truth).sum() / np.logical_or(mask, truth).sum()


def test_the_overlap_of_afloc_is_that_of_a_literal_loop():
    rng = np.random.default_rng(0)
    maps = rng.normal(3, 2, (6, 40)).astype(np.float32)
    truth = rng.random((6, 40)) < 0.3
    truth[2] = False
    thresholds = (0.1, 0.5, 0.95, 1.0)  # above the last there is nothing
    actual = grounding_metrics.afloc_ious(maps, truth, thresholds)
    expected = [
        [loop_afloc_iou(heat, mask, t) for t in thresholds]
        for heat, mask in zip(maps.astype(np.float64), truth, strict=True)
    ]
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert np.isnan(actual[2]).all() and np.isnan(actual[:, 3]).all()
    assert np.isfinite(actual[[0, 1, 3, 4, 5], :3]).all()


def test_thresholds_of_afloc_are_higher_than_those_of_min_max():
    heat = np.linspace(0, 1, 101)[None]
    truth = heat > 0.6
    higher = tuple((1 + t) / 2 for t in grounding_metrics.THRESHOLDS)  # .55 to .75
    mean = grounding_metrics.mean_iou(heat, truth, "minmax", higher)
    np.testing.assert_allclose(grounding_metrics.afloc_ious(heat, truth).mean(1), mean, atol=0.02)
    assert abs(grounding_metrics.mean_iou(heat, truth, "minmax") - mean) > 0.1


@pytest.mark.parametrize("value", [0.0, 5.0, np.nan, np.inf])
def test_a_map_without_contrast_is_left_out_of_the_overlap_of_afloc(value):
    maps = np.full((1, 8), value)
    maps[0, 0] = 0.0 if np.isinf(value) else value
    assert np.isnan(grounding_metrics.afloc_ious(maps, np.arange(8)[None] < 3)).all()


# Pointing with a tolerance, and the wrong side ---------------------------------------------------


def loop_pointing_near(values, truth, radius):
    peak = max(values.values())
    hits = [
        any(math.dist(place, inside) <= radius for inside in truth)
        for place, value in values.items()
        if value == peak
    ]
    return sum(hits) / len(hits)


def make_planes(seed, count=8, size=(9, 12)):
    random = np.random.default_rng(seed)
    truth = np.zeros((count, *size), bool)
    for mask in truth:
        y, x = random.integers(size[0] - 2), random.integers(size[1] - 2)
        mask[y : y + 2, x : x + 2] = True
    # Few values, so that several pixels share the maximum.
    return random.integers(0, 9, (count, *size)).astype(np.float32), truth


@pytest.mark.parametrize("radius", [0.0, 1.0, 1.5, 4.0, 30.0])
def test_pointing_near_equals_a_loop_over_pixels(radius):
    maps, truth = make_planes(1)
    maps[-1] = 3.0  # constant: every pixel is a peak
    values = grounding_metrics.pointing_near(maps, truth, radius)
    for value, plane, mask in zip(values, maps, truth, strict=True):
        expected = loop_pointing_near(
            dict(np.ndenumerate(plane)), list(zip(*np.nonzero(mask), strict=True)), radius
        )
        assert value == pytest.approx(expected)
    if radius == 0:
        flat = grounding_metrics.pointing(maps.reshape(8, -1), truth.reshape(8, -1))
        np.testing.assert_allclose(values, flat)


def test_pointing_near_of_no_truth_is_zero_and_of_nan_is_nan():
    maps, truth = make_planes(2, count=2)
    truth[0], maps[1, 0, 0] = False, np.nan
    values = grounding_metrics.pointing_near(maps, truth, 3.0)
    assert values[0] == 0 and np.isnan(values[1])


@pytest.mark.parametrize("width", [11, 12])
def test_wrong_side_equals_a_loop_over_pixels(width):
    maps, truth = make_planes(3, count=30, size=(5, width))
    values = grounding_metrics.wrong_side(maps, truth)
    num_defined = 0
    for value, plane, mask in zip(values, maps, truth, strict=True):
        # Of an odd width the middle column belongs to the right half.
        halves = {"left" if x + 0.5 < width / 2 else "right" for x in np.nonzero(mask)[1]}
        if len(halves) == 2:
            assert np.isnan(value)
            continue
        num_defined += 1
        mean = sum(v for _, v in np.ndenumerate(plane)) / plane.size
        mass = {"left": 0.0, "right": 0.0}
        for (_, x), level in np.ndenumerate(plane):
            mass["left" if x + 0.5 < width / 2 else "right"] += max(level - mean, 0)
        (half,) = halves
        assert value == pytest.approx(1 - mass[half] / sum(mass.values()), abs=1e-5)
    assert num_defined > 10


def test_the_wrong_side_of_a_constant_map_is_half_and_of_nan_is_nan():
    truth = np.zeros((3, 4, 6), bool)
    truth[:, 1, 1] = True
    maps = np.zeros((3, 4, 6), np.float32)
    maps[1, 1, 1], maps[2, 0, 0] = 1, np.nan
    values = grounding_metrics.wrong_side(maps, truth)
    assert values[:2].tolist() == [0.5, 0] and np.isnan(values[2])
