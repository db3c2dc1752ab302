"""The formulas against literal loops, hand-computed numbers, and the edges they define."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.metrics import classification as classification_metrics
from plan_jax.metrics import grounding as grounding_metrics
from plan_jax.metrics import intervals
from plan_jax.metrics import retrieval as retrieval_metrics


def maps_and_truth(seed=0, number=6, pixels=40):
    """Random maps [B P] with a truth that is neither empty nor everything."""
    random = np.random.default_rng(seed)
    truth = random.random((number, pixels)) < 0.3
    truth[:, 0], truth[:, 1] = True, False
    return random.normal(size=(number, pixels)).astype(np.float32), truth


def slow_cnr(values, truth):
    inside = [v for v, t in zip(values, truth, strict=True) if t]
    outside = [v for v, t in zip(values, truth, strict=True) if not t]

    def mean(x):
        return sum(x) / len(x)

    def variance(x):
        return sum((v - mean(x)) ** 2 for v in x) / len(x)

    return (mean(inside) - mean(outside)) / math.sqrt(variance(inside) + variance(outside))


def slow_iou(values, truth, how):
    low, high, mean = min(values), max(values), sum(values) / len(values)
    level = {
        "raw": lambda v: max(v, 0),
        "minmax": lambda v: (v - low) / (high - low),
        "z": lambda v: max(v - mean, 0) / (high - mean),
    }[how]
    total = 0
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
        above = {i for i, v in enumerate(values) if level(v) > threshold}
        real = {i for i, t in enumerate(truth) if t}
        total += len(above & real) / len(above | real)
    return total / 5


def slow_bilinear(image, size):
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
    expected = [slow_bilinear(one, size) for one in image]
    np.testing.assert_allclose(grounding_metrics.upsample(image, size), expected, atol=1e-6)


@given(st.integers(1, 20), st.integers(1, 40))
def test_interpolation_keeps_constants_and_mirrors(inside, outside):
    matrix = grounding_metrics.bilinear_matrix(inside, outside)
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
    values, truth = maps_and_truth(seed)
    expected = [slow_cnr(v.tolist(), t) for v, t in zip(values, truth, strict=True)]
    np.testing.assert_allclose(
        grounding_metrics.contrast_to_noise(values, truth), expected, rtol=1e-4
    )


@given(st.floats(0.01, 100), st.floats(-10, 10))
def test_cnr_ignores_scale_and_offset(scale, offset):
    values, truth = maps_and_truth()
    values = values.astype(np.float64)
    moved = grounding_metrics.contrast_to_noise(values * scale + offset, truth)
    np.testing.assert_allclose(moved, grounding_metrics.contrast_to_noise(values, truth), rtol=1e-5)


def test_cnr_where_the_formula_says_nothing():
    truth = np.array([[True, True, False, False]])
    everywhere, nowhere = np.ones((1, 4), bool), np.zeros((1, 4), bool)
    values = np.array([[3.0, 5.0, 0.0, 2.0]])
    assert grounding_metrics.contrast_to_noise(np.full((1, 4), 0.3, np.float32), truth)[0] == 0
    assert grounding_metrics.contrast_to_noise(np.zeros((1, 4)), truth)[0] == 0
    assert grounding_metrics.contrast_to_noise(truth.astype(float), truth)[0] == pytest.approx(1000)
    assert np.isnan(grounding_metrics.contrast_to_noise(values, everywhere))[0]
    assert np.isnan(grounding_metrics.contrast_to_noise(values, nowhere))[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad):
    values, truth = maps_and_truth(number=2)
    values[0, 3] = bad
    scores = [
        grounding_metrics.contrast_to_noise(values, truth),
        grounding_metrics.pointing(values, truth),
    ]
    scores += [
        grounding_metrics.mean_iou(values, truth, how) for how in grounding_metrics.NORMALISATIONS
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


@pytest.mark.parametrize("how", grounding_metrics.NORMALISATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_iou_is_the_literal_formula(how, seed):
    values, truth = maps_and_truth(seed)
    expected = [slow_iou(v.tolist(), t, how) for v, t in zip(values, truth, strict=True)]
    np.testing.assert_allclose(grounding_metrics.mean_iou(values, truth, how), expected, rtol=1e-6)


def test_iou_by_hand():
    values = np.array([[1.0, 0.35, 0.0, -1.0]])
    truth = np.array([[True, False, False, False]])
    # raw: thresholds .1, .2, .3 also take the second pixel, so 1/2; .4 and .5 only the first
    assert grounding_metrics.mean_iou(values, truth, "raw")[0] == pytest.approx((3 * 0.5 + 2) / 5)
    # min-max: 1, .675, .5, 0: three pixels up to .4 (1/3 each), two at .5
    assert grounding_metrics.mean_iou(values, truth, "minmax")[0] == pytest.approx(
        (4 / 3 + 1 / 2) / 5
    )


def test_iou_of_silence_and_of_the_truth():
    truth = np.array([[True, False, True]])
    for how in grounding_metrics.NORMALISATIONS:
        assert grounding_metrics.mean_iou(np.full((1, 3), -0.2, np.float32), truth, how)[0] == 0
        assert grounding_metrics.mean_iou(truth.astype(float), truth, how)[0] == 1
        assert np.isnan(
            grounding_metrics.mean_iou(truth.astype(float), np.zeros((1, 3), bool), how)[0]
        )


def test_normalise_does_not_blow_up_rounding():
    flat = (np.float32(0.7) + np.float32(1e-8) * np.arange(5, dtype=np.float32))[None]
    for how in ("minmax", "z"):
        assert not grounding_metrics.normalise(flat, how).any()


def test_ranks_and_recall_by_hand():
    scores = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.5, 0.5, 0.5], [0.0, 0.0, np.nan]])
    hits = np.array([[0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 0]], bool)
    ranks = retrieval_metrics.hit_ranks(scores, hits)
    np.testing.assert_array_equal(ranks, [3, 2, 3, np.nan])
    assert retrieval_metrics.recall_at(ranks[:3], 1) == 0
    assert retrieval_metrics.recall_at(ranks[:3], 2) == pytest.approx(1 / 3)
    assert retrieval_metrics.recall_at(ranks[:3], 3) == 1
    assert math.isnan(retrieval_metrics.recall_at(ranks, 3))
    assert retrieval_metrics.hit_ranks(scores[:1], np.zeros((1, 3), bool))[0] == np.inf


def test_ranks_are_those_of_a_sorted_list():
    random = np.random.default_rng(3)
    scores, hits = random.normal(size=(20, 15)), random.random((20, 15)) < 0.2
    hits[:, 4] = True
    for row, hit, rank in zip(scores, hits, retrieval_metrics.hit_ranks(scores, hits), strict=True):
        order = sorted(range(15), key=lambda j, row=row: -row[j])
        wrong_before = next(n for n, j in enumerate(order) if hit[j])
        assert rank == wrong_before + 1


def test_chance_is_what_random_orders_reach():
    label = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    hits = label[:, None] == label[None]
    random = np.random.default_rng(0)
    ranks = np.concatenate(
        [retrieval_metrics.hit_ranks(random.random(hits.shape), hits) for _ in range(800)]
    )
    for k in (1, 3, 5, 12, 50):
        assert retrieval_metrics.chance_recall(hits, k) == pytest.approx(
            (ranks <= k).mean(), abs=0.015
        )
    assert retrieval_metrics.chance_median_rank(hits) == np.median(ranks)
    by_hand = (3 * (1 - 9 * 8 / (12 * 11)) + 2 * (1 - 10 * 9 / (12 * 11)) + 7 * 2 / 12) / 12
    assert retrieval_metrics.chance_recall(hits, 2) == pytest.approx(by_hand)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(items):
    scores = np.array([float(s) for s, _ in items])
    labels = np.array([label for _, label in items])
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[labels] for b in scores[~labels]
    ]
    area = classification_metrics.auroc(scores, labels)
    assert area == pytest.approx(np.mean(pairs)) if pairs else math.isnan(area)


def test_auroc_with_nan_is_nan():
    assert math.isnan(
        classification_metrics.auroc(np.array([np.nan, 1.0]), np.array([True, False]))
    )


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    inside = 0
    for seed in range(100):
        low, high = intervals.bootstrap(random.normal(2, 1, 60), n=200, seed=seed)
        inside += low < 2 < high
    assert 85 <= inside <= 100


def test_bootstrap_resamples_whole_rows_and_repeats():
    rows = np.stack([np.arange(20.0), np.arange(20.0)], 1)

    def apart(some):
        return float(abs(some[:, 0] - some[:, 1]).max())

    assert intervals.bootstrap(rows, apart, n=50) == (0, 0)
    assert intervals.bootstrap(rows, n=50, seed=3) == intervals.bootstrap(rows, n=50, seed=3)
    assert np.isnan(intervals.bootstrap(np.zeros(0))).all()


def test_precision_is_that_of_a_literal_loop_and_ties_count_against_the_model():
    random = np.random.default_rng(0)
    for k in (1, 3, 7, 20):
        scores = random.integers(0, 4, (12, 9)).astype(np.float32)
        hits = random.random((12, 9)) < 0.4
        shares = []
        for row, right in zip(scores.tolist(), hits.tolist(), strict=True):
            order = sorted(range(9), key=lambda j, row=row, right=right: (-row[j], right[j]))
            shares.append(sum(right[j] for j in order[:k]) / len(order[:k]))
        assert retrieval_metrics.precision_at(scores, hits, k) == pytest.approx(np.mean(shares))
    assert np.isnan(retrieval_metrics.precision_at(np.float32([[1, np.nan]]), hits[:1, :2], 1))
