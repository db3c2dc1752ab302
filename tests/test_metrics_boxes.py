"""The metrics of boxes, against pycocotools, literal loops and numbers worked out by hand."""

import numpy as np
import pytest

from plan_jax.metrics import boxes as bm

COCO = tuple(np.arange(0.5, 0.96, 0.05).round(2))
NONE = np.zeros((0, 4))


def found_of(*rows):
    """Detections of one image from rows (x0, y0, x1, y1, score) or (.., score, class)."""
    table = np.array([(*row, 0)[:6] for row in rows], float).reshape(-1, 6)
    return bm.Found(table[:, :4], table[:, 4], table[:, 5].astype(int))


def truth_of(*rows):
    """True boxes of one image from rows (x0, y0, x1, y1) or (.., class)."""
    table = np.array([(*row, 0)[:5] for row in rows], float).reshape(-1, 5)
    return bm.Truth(table[:, :4], table[:, 4].astype(int))


def random_set(seed, images=40, classes=1, ties=False):
    """Images with 0..4 true boxes and 0..8 found ones, of which some are near the truth."""
    random = np.random.default_rng(seed)
    found, truth = [], []
    for _ in range(images):
        corner = random.uniform(0, 60, (random.integers(0, 5), 2))
        boxes = np.concatenate([corner, corner + random.uniform(5, 40, corner.shape)], 1)
        kinds = random.integers(0, classes, len(boxes))
        near = boxes + random.normal(0, 3, boxes.shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2])  # some without area
        near = near[random.random(len(near)) < 0.8]
        corner = random.uniform(0, 60, (random.integers(0, 4), 2))
        wrong = np.concatenate([corner, corner + random.uniform(5, 40, corner.shape)], 1)
        near = np.concatenate([near, wrong, near[:1] + 0.5])
        scores = random.random(len(near))
        scores = scores.round(1) if ties else scores
        found.append(bm.Found(near, scores, random.integers(0, classes, len(near))))
        truth.append(bm.Truth(boxes, kinds))
    found[0], truth[1] = found_of(), truth_of()  # an image where nothing is found, a healthy one
    found[2], truth[2] = found_of(), truth_of()
    return found, truth


@pytest.mark.parametrize(("classes", "ties"), [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed, classes, ties):
    found, truth = random_set(seed, classes=classes, ties=ties)
    whole, half, strict = bm.coco_map(found, truth)
    assert bm.map_strict(found, truth, (0.5,)) == pytest.approx(half, abs=1e-6)
    assert bm.map_strict(found, truth, (0.75,)) == pytest.approx(strict, abs=1e-6)
    assert bm.map_strict(found, truth, COCO) == pytest.approx(whole, abs=1e-6)
    assert 0 < strict < half < 0.98


def test_pycocotools_prints_nothing_and_keeps_all_of_many_boxes(capsys):
    good = [(10, 10, 20, 20, 0.1)]
    many = found_of(*[(30 + n / 10, 30, 40, 40, 0.9) for n in range(99)], (0, 0, 5, 5, 0.8), *good)
    values = bm.coco_map([many], [truth_of(good[0][:4])])
    assert capsys.readouterr().out == ""
    assert values == pytest.approx((1 / 101,) * 3)  # the 101st detection, which COCO would cut off
    assert bm.map_strict([many], [truth_of(good[0][:4])]) == pytest.approx(1 / 101)


def literal_iou(a, b):
    """Count points of a fine raster in both boxes and in either."""
    y, x = np.mgrid[0:10:0.25, 0:10:0.25] + 0.125
    inside = [(x >= c[0]) & (x < c[2]) & (y >= c[1]) & (y < c[3]) for c in (a, b)]
    return (inside[0] & inside[1]).sum() / max(1, (inside[0] | inside[1]).sum())


def test_iou_is_that_of_counted_points():
    random = np.random.default_rng(0)
    sets = [np.sort(random.integers(0, 40, (7, 2, 2)) / 4, 1).reshape(7, 4) for _ in range(2)]
    sets[1][0] = sets[0][0]
    sets[0][1] = sets[1][1] = (3, 3, 3, 8)  # no area: no overlap, not even with itself
    right = [[literal_iou(a, b) for b in sets[1]] for a in sets[0]]
    np.testing.assert_allclose(bm.iou(*sets), right, atol=1e-12)
    assert bm.iou(NONE, sets[0]).shape == (0, 7)
    assert bm.iou(sets[0] - 100, sets[1] - 100) == pytest.approx(bm.iou(*sets))


def test_each_truth_is_taken_once_and_by_the_better_score():
    overlap = np.array([[0.7, 0.6], [0.9, 0.55], [0.9, 0.3], [0.5, 0.5]])
    assert bm.take_greedily(overlap, 0.5).tolist() == [True, True, False, False]
    assert bm.take_greedily(overlap, 0.6).tolist() == [True, False, False, False]
    assert bm.take_greedily(overlap, 0.75).tolist() == [False, True, False, False]
    assert bm.take_greedily(np.array([[0.5]]), 0.5).tolist() == [True]
    tie = np.array([[0.6, 0.6], [0.7, 0.0]])
    assert bm.take_greedily(tie, 0.5).tolist() == [True, True]  # the first takes the last of equals
    assert bm.take_greedily(np.zeros((3, 0)), 0.5).tolist() == [False] * 3


def literal_precision(hit, positives):
    """Precision at 101 levels of recall by a loop over cut-offs."""
    total = 0.0
    for n in range(101):
        best = 0.0
        for cut in range(1, len(hit) + 1):
            if sum(hit[:cut]) / positives >= np.linspace(0, 1, 101)[n]:  # as COCO rounds
                best = max(best, sum(hit[:cut]) / cut)
        total += best
    return total / 101


def test_average_precision_is_that_of_a_literal_loop():
    random = np.random.default_rng(1)
    for _ in range(20):
        hit = random.random(random.integers(1, 12)) < 0.6
        positives = int(hit.sum() + random.integers(1, 4))
        value = bm.average_precision(hit, positives)
        assert value == pytest.approx(literal_precision(hit.tolist(), positives))


def test_what_is_not_there_is_nan_and_what_is_not_found_is_zero():
    nothing, something = found_of(), found_of((0, 0, 4, 4, 0.9))
    box = truth_of((0, 0, 4, 4))
    assert np.isnan(bm.map_strict([something], [truth_of()]))
    assert all(np.isnan(x) for x in bm.coco_map([something], [truth_of()]))
    assert np.isnan(bm.map_strict([], []))
    assert np.isnan(bm.average_precision(np.zeros(3, bool), 0))
    assert bm.map_strict([nothing], [box]) == 0
    assert bm.coco_map([nothing], [box]) == (0, 0, 0)
    assert bm.map_strict([something], [box]) == 1
    other = truth_of((0, 0, 4, 4, 1))  # only of a class that is not found
    assert bm.map_strict([something], [other]) == 0
    table = bm.precision_table(bm.match([something], [other], (0.5,)))
    assert np.isnan(table[0, 0]) and table[1, 0] == 0
    broken = found_of((0, 0, 4, 4, np.nan))
    both = [broken, something], [box, box]
    assert np.isnan([bm.map_strict(*both), bm.map_mgca(*both), *bm.coco_map(*both)]).all()
    with pytest.raises(ValueError, match="zip"):
        bm.match([something], [box, box])


def test_mgca_counts_neither_missed_nor_healthy_images():
    right, box = (0, 0, 10, 10, 0.9), truth_of((0, 0, 10, 10))
    found = [
        found_of(right, (50, 50, 60, 60, 0.3)),  # found; the second box is not sure enough
        found_of((0, 0, 10, 10, 0.4)),  # missed: nothing is sure enough
        found_of((20, 20, 30, 30, 0.95)),  # healthy, and something is found
        found_of((0, 0, 10, 10, 0.5), (30, 30, 40, 40, 0.6)),  # the wrong one is surer
    ]
    truth = [box, box, truth_of(), box]
    # Order of the rest: 0.9 right, 0.6 wrong, 0.5 right, of two boxes.
    assert bm.map_mgca(found, truth) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # Of all: 0.95 wrong, 0.9 right, 0.6 wrong, 0.5 right, 0.4 right, 0.3 wrong, of three boxes.
    assert bm.map_strict(found, truth) == pytest.approx(3 / 5)
    assert bm.map_mgca(found, truth, floor=0.3) == pytest.approx((34 + 67 * 3 / 4) / 101)
    assert bm.map_mgca(found[1:3], truth[1:3]) == 0.0
    assert bm.map_mgca([], []) == 0.0


def test_equal_scores_keep_the_order_of_images():
    box, wrong = truth_of((0, 0, 9, 9)), found_of((20, 20, 29, 29, 0.5))
    right = found_of((0, 0, 9, 9, 0.5))
    assert bm.map_strict([right, wrong], [box, truth_of()]) == 1
    assert bm.map_strict([wrong, right], [truth_of(), box]) == 0.5


def test_weights_stand_for_images_drawn_several_times():
    found, truth = random_set(5, images=25, classes=2)
    matches, random = bm.match(found, truth), np.random.default_rng(0)
    for _ in range(5):
        drawn = random.integers(25, size=25)
        again = bm.match([found[n] for n in drawn], [truth[n] for n in drawn])
        times = np.bincount(drawn, minlength=25).astype(float)
        np.testing.assert_allclose(
            bm.precision_table(matches, times), bm.precision_table(again), atol=1e-12
        )
        assert bm.mean_precision(matches, times) == pytest.approx(bm.mean_precision(again))
