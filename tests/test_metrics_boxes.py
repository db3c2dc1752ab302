"""Metrics of boxes: pycocotools, literal loops and values computed by hand."""

import numpy as np
import pytest

from plan_jax.metrics import boxes as box_metrics

COCO = tuple(np.arange(0.5, 0.96, 0.05).round(2))
NO_BOXES = np.zeros((0, 4))


def detected_boxes(*rows):
    """Detections of one image from rows (x0, y0, x1, y1, score) or (.., score, class)."""
    table = np.array([(*row, 0)[:6] for row in rows], float).reshape(-1, 6)
    return box_metrics.DetectedBoxes(table[:, :4], table[:, 4], table[:, 5].astype(int))


def true_boxes(*rows):
    """True boxes of one image from rows (x0, y0, x1, y1) or (.., class)."""
    table = np.array([(*row, 0)[:5] for row in rows], float).reshape(-1, 5)
    return box_metrics.TrueBoxes(table[:, :4], table[:, 4].astype(int))


def random_set(seed, images=40, classes=1, ties=False):
    """Images with 0..4 true boxes and 0..8 detected ones, of which some are near the truth."""
    random = np.random.default_rng(seed)
    detected, truth = [], []
    for _ in range(images):
        corner = random.uniform(0, 60, (random.integers(0, 5), 2))
        boxes = np.concatenate([corner, corner + random.uniform(5, 40, corner.shape)], 1)
        class_ids = random.integers(0, classes, len(boxes))
        close = boxes + random.normal(0, 3, boxes.shape)
        close[:, 2:] = np.maximum(close[:, 2:], close[:, :2])  # some without area
        close = close[random.random(len(close)) < 0.8]
        corner = random.uniform(0, 60, (random.integers(0, 4), 2))
        spurious = np.concatenate([corner, corner + random.uniform(5, 40, corner.shape)], 1)
        close = np.concatenate([close, spurious, close[:1] + 0.5])
        scores = random.random(len(close))
        scores = scores.round(1) if ties else scores
        detected.append(
            box_metrics.DetectedBoxes(close, scores, random.integers(0, classes, len(close)))
        )
        truth.append(box_metrics.TrueBoxes(boxes, class_ids))
    detected[0], truth[1] = (
        detected_boxes(),
        true_boxes(),
    )  # an image where nothing is detected, a healthy one
    detected[2], truth[2] = detected_boxes(), true_boxes()
    return detected, truth


@pytest.mark.parametrize(("classes", "ties"), [(1, False), (1, True), (3, False)])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed, classes, ties):
    detected, truth = random_set(seed, classes=classes, ties=ties)
    ap, ap50, ap75 = box_metrics.coco_map(detected, truth)
    assert box_metrics.map_strict(detected, truth, (0.5,)) == pytest.approx(ap50, abs=1e-6)
    assert box_metrics.map_strict(detected, truth, (0.75,)) == pytest.approx(ap75, abs=1e-6)
    assert box_metrics.map_strict(detected, truth, COCO) == pytest.approx(ap, abs=1e-6)
    assert 0 < ap75 < ap50 < 0.98


def test_pycocotools_prints_nothing_and_keeps_all_of_many_boxes(capsys):
    good = [(10, 10, 20, 20, 0.1)]
    many = detected_boxes(
        *[(30 + n / 10, 30, 40, 40, 0.9) for n in range(99)], (0, 0, 5, 5, 0.8), *good
    )
    values = box_metrics.coco_map([many], [true_boxes(good[0][:4])])
    assert capsys.readouterr().out == ""
    assert values == pytest.approx((1 / 101,) * 3)  # the 101st detection, which COCO would cut off
    assert box_metrics.map_strict([many], [true_boxes(good[0][:4])]) == pytest.approx(1 / 101)


def literal_iou(a, b):
    """Counts points of a fine raster in both boxes and in either."""
    y, x = np.mgrid[0:10:0.25, 0:10:0.25] + 0.125
    inside = [(x >= c[0]) & (x < c[2]) & (y >= c[1]) & (y < c[3]) for c in (a, b)]
    return (inside[0] & inside[1]).sum() / max(1, (inside[0] | inside[1]).sum())


def test_box_iou_is_that_of_counted_points():
    random = np.random.default_rng(0)
    sets = [np.sort(random.integers(0, 40, (7, 2, 2)) / 4, 1).reshape(7, 4) for _ in range(2)]
    sets[1][0] = sets[0][0]
    sets[0][1] = sets[1][1] = (3, 3, 3, 8)  # no area: no overlap, not even with itself
    expected = [[literal_iou(a, b) for b in sets[1]] for a in sets[0]]
    np.testing.assert_allclose(box_metrics.box_iou(*sets), expected, atol=1e-12)
    assert box_metrics.box_iou(NO_BOXES, sets[0]).shape == (0, 7)
    assert box_metrics.box_iou(sets[0] - 100, sets[1] - 100) == pytest.approx(
        box_metrics.box_iou(*sets)
    )


def test_a_true_box_is_matched_once_and_by_the_better_score():
    ious = np.array([[0.7, 0.6], [0.9, 0.55], [0.9, 0.3], [0.5, 0.5]])
    assert box_metrics.match_greedily(ious, 0.5).tolist() == [True, True, False, False]
    assert box_metrics.match_greedily(ious, 0.6).tolist() == [True, False, False, False]
    assert box_metrics.match_greedily(ious, 0.75).tolist() == [False, True, False, False]
    assert box_metrics.match_greedily(np.array([[0.5]]), 0.5).tolist() == [True]
    tie = np.array([[0.6, 0.6], [0.7, 0.0]])
    assert box_metrics.match_greedily(tie, 0.5).tolist() == [
        True,
        True,
    ]  # the first detection takes the last of equals
    assert box_metrics.match_greedily(np.zeros((3, 0)), 0.5).tolist() == [False] * 3


def literal_precision(hits, positives):
    """Precision at 101 levels of recall by a loop over cut-offs."""
    total = 0.0
    for n in range(101):
        best = 0.0
        for cut in range(1, len(hits) + 1):
            if sum(hits[:cut]) / positives >= np.linspace(0, 1, 101)[n]:  # as COCO rounds
                best = max(best, sum(hits[:cut]) / cut)
        total += best
    return total / 101


def test_interpolated_precision_is_that_of_a_literal_loop():
    random = np.random.default_rng(1)
    for _ in range(20):
        hits = random.random(random.integers(1, 12)) < 0.6
        positives = int(hits.sum() + random.integers(1, 4))
        value = box_metrics.interpolated_precision(hits, positives)
        assert value == pytest.approx(literal_precision(hits.tolist(), positives))


def test_a_class_without_truth_is_nan_and_one_without_detections_zero():
    empty, single = detected_boxes(), detected_boxes((0, 0, 4, 4, 0.9))
    box = true_boxes((0, 0, 4, 4))
    assert np.isnan(box_metrics.map_strict([single], [true_boxes()]))
    assert all(np.isnan(x) for x in box_metrics.coco_map([single], [true_boxes()]))
    assert np.isnan(box_metrics.map_strict([], []))
    assert np.isnan(box_metrics.interpolated_precision(np.zeros(3, bool), 0))
    assert box_metrics.map_strict([empty], [box]) == 0
    assert box_metrics.coco_map([empty], [box]) == (0, 0, 0)
    assert box_metrics.map_strict([single], [box]) == 1
    target = true_boxes((0, 0, 4, 4, 1))  # only of a class that is not detected
    assert box_metrics.map_strict([single], [target]) == 0
    table = box_metrics.average_precision_table(
        box_metrics.match_detections([single], [target], (0.5,))
    )
    assert np.isnan(table[0, 0]) and table[1, 0] == 0
    broken = detected_boxes((0, 0, 4, 4, np.nan))
    pair = [broken, single], [box, box]
    assert np.isnan(
        [box_metrics.map_strict(*pair), box_metrics.map_mgca(*pair), *box_metrics.coco_map(*pair)]
    ).all()
    with pytest.raises(ValueError, match="zip"):
        box_metrics.match_detections([single], [box, box])


def test_map_mgca_ignores_missed_and_healthy_images():
    right, box = (0, 0, 10, 10, 0.9), true_boxes((0, 0, 10, 10))
    detected = [
        detected_boxes(right, (50, 50, 60, 60, 0.3)),  # detected; the second box is not sure enough
        detected_boxes((0, 0, 10, 10, 0.4)),  # missed: nothing is sure enough
        detected_boxes((20, 20, 30, 30, 0.95)),  # healthy, and something is detected
        detected_boxes((0, 0, 10, 10, 0.5), (30, 30, 40, 40, 0.6)),  # the wrong one is surer
    ]
    truth = [box, box, true_boxes(), box]
    # Order of the rest: 0.9 right, 0.6 wrong, 0.5 right, of two boxes.
    assert box_metrics.map_mgca(detected, truth) == pytest.approx((51 + 50 * 2 / 3) / 101)
    # Of all: 0.95 wrong, 0.9 right, 0.6 wrong, 0.5 right, 0.4 right, 0.3 wrong, of three boxes.
    assert box_metrics.map_strict(detected, truth) == pytest.approx(3 / 5)
    assert box_metrics.map_mgca(detected, truth, min_score=0.3) == pytest.approx(
        (34 + 67 * 3 / 4) / 101
    )
    assert box_metrics.map_mgca(detected[1:3], truth[1:3]) == 0.0
    assert box_metrics.map_mgca([], []) == 0.0


def test_equal_scores_keep_the_order_of_images():
    box, spurious = true_boxes((0, 0, 9, 9)), detected_boxes((20, 20, 29, 29, 0.5))
    right = detected_boxes((0, 0, 9, 9, 0.5))
    assert box_metrics.map_strict([right, spurious], [box, true_boxes()]) == 1
    assert box_metrics.map_strict([spurious, right], [true_boxes(), box]) == 0.5


def test_image_counts_equal_repeated_images():
    detected, truth = random_set(5, images=25, classes=2)
    matches, random = box_metrics.match_detections(detected, truth), np.random.default_rng(0)
    for _ in range(5):
        sample = random.integers(25, size=25)
        resampled = box_metrics.match_detections(
            [detected[n] for n in sample], [truth[n] for n in sample]
        )
        image_counts = np.bincount(sample, minlength=25).astype(float)
        np.testing.assert_allclose(
            box_metrics.average_precision_table(matches, image_counts),
            box_metrics.average_precision_table(resampled),
            atol=1e-12,
        )
        assert box_metrics.mean_average_precision(matches, image_counts) == pytest.approx(
            box_metrics.mean_average_precision(resampled)
        )
