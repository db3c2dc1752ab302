"""Targets, decoding and suppression of boxes, against plain loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from literal_boxes import GRID, SIZE, literal_targets, random_boxes

from plan_jax.heads import anchors as anchor_boxes
from plan_jax.metrics.boxes import box_iou

ASSIGN = {
    published: jax.jit(
        partial(
            anchor_boxes.assign_targets,
            grid=GRID,
            size=SIZE,
            num_classes=3,
            published_background=published,
        )
    )
    for published in (False, True)
}


@pytest.mark.parametrize("published", [False, True])
def test_targets_are_those_of_a_literal_loop(published):
    random = np.random.default_rng(0)
    num_different = 0
    for n in range(20):
        anchors = np.asarray(anchor_boxes.anchors_for_size(SIZE)[n % 3])
        boxes = random_boxes(random, 12)  # 12 boxes in 24 cells: two may share cell and anchor
        boxes[9] = boxes[8] + np.float32(0.25)
        boxes[11] = (90, 60, 102, 68)  # its centre is the image's last corner
        mask, classes = random.random(12) < 0.7, random.integers(0, 3, 12)
        expected = literal_targets(boxes, mask, classes, anchors, 3, published)
        for a, b in zip(ASSIGN[published](boxes, mask, classes, anchors), expected, strict=True):
            np.testing.assert_allclose(np.asarray(a), b, atol=2e-5)
        swapped = literal_targets(boxes, mask, classes, anchors, 3, not published)
        num_different += (expected[1] != swapped[1]).any()
    assert num_different > 5  # the published fault is not rare


def test_of_two_boxes_at_one_anchor_the_last_sets_the_offset_and_both_their_class():
    pair = np.float32([[10, 10, 20, 20], [9, 10, 19, 20]])
    for order in ([0, 1], [1, 0]):
        boxes = np.zeros((12, 4), np.float32)
        boxes[:2] = pair[order]
        anchors = anchor_boxes.anchors_for_size(SIZE)[2]
        targets = ASSIGN[False](boxes, np.arange(12) < 2, np.arange(12) % 2, anchors)
        assert int(targets.assigned.sum()) == 1
        index = tuple(np.argwhere(np.asarray(targets.assigned))[0])
        assert float(targets.offset[index][0]) * 16 == pytest.approx([15, 14][order[1]])
        assert targets.classes[index].tolist() == [1, 1, 0]


def test_decode_boxes_inverts_assign_targets():
    random = np.random.default_rng(1)
    decode = jax.jit(partial(anchor_boxes.decode_boxes, size=SIZE))
    mask, classes = np.arange(12) < 1, np.ones(12, int)
    for anchors in anchor_boxes.anchors_for_size(SIZE):
        boxes = random_boxes(random, 12)
        boxes[0] = np.r_[np.maximum(boxes[0, :2], 0), np.minimum(boxes[0, 2:], SIZE[::-1])]
        targets = ASSIGN[False](boxes, mask, classes, anchors)
        offset = np.clip(targets.offset, 1e-6, 1 - 1e-6)
        objectness = np.where(targets.assigned, 9, -9)[..., None]
        logits = 9 * np.asarray(targets.classes)
        raw = [np.log(offset / (1 - offset)), targets.log_sides, objectness, logits]
        decoded, scores, labels = decode(np.concatenate(raw, -1, dtype=np.float32), anchors)
        index = np.asarray(scores) > 0.5
        assert index.sum() == 1 and np.asarray(labels)[index].tolist() == [1]
        np.testing.assert_allclose(np.asarray(decoded)[index][0], boxes[0], atol=1e-3)


def test_decoded_boxes_are_inside_the_image_for_extreme_outputs():
    raw = jnp.full((2, 2, 3, 6), 200.0)
    anchors = anchor_boxes.anchors_for_size(SIZE)[0]
    boxes, scores, _ = anchor_boxes.decode_boxes(raw, anchors, SIZE)
    assert np.isfinite(boxes).all() and (scores == 1).all()
    assert (boxes[..., 2:] <= jnp.array([96.0, 64.0])).all() and (boxes[..., :2] >= 0).all()


def literal_nms(boxes, scores, classes, max_iou):
    """Non-maximum suppression, box by box, in plain Python."""
    remaining = np.zeros(len(boxes), bool)
    order = sorted(range(len(boxes)), key=lambda n: -scores[n])
    for n in order:
        rivals = [m for m in order if remaining[m] and classes[m] == classes[n]]
        remaining[n] = all(box_iou(boxes[[n]], boxes[[m]])[0, 0] < max_iou for m in rivals)
    return remaining


def test_suppression_is_that_of_a_literal_loop_also_under_vmap():
    random = np.random.default_rng(2)
    boxes = np.stack([random_boxes(random, 30, (12, 12)) for _ in range(8)])
    scores = random.integers(0, 6, (8, 30)).astype(np.float32) / 5  # many ties
    classes = random.integers(0, 2, (8, 30))
    boxes[0, :2] = (40, 40, 42, 42), (40, 40, 42, 41)  # an IoU of exactly 0.5
    classes[0, :2] = 1
    suppress = jax.jit(jax.vmap(anchor_boxes.suppress_non_maxima))
    remaining = np.asarray(suppress(boxes, scores, classes))
    for n in range(8):
        expected = literal_nms(boxes[n], scores[n], classes[n], 0.5)
        np.testing.assert_array_equal(remaining[n], expected)
        assert 2 < expected.sum() < 29
    assert remaining[0, :2].sum() == 1


def test_box_iou_is_the_same_in_numpy_and_jax():
    random = np.random.default_rng(3)
    first, second = random_boxes(random, 9), random_boxes(random, 5)
    second[0] = first[0]
    first[1] = second[1] = (3, 3, 3, 9)  # no area
    ious = jax.jit(box_iou)(jnp.array(first), jnp.array(second))
    assert isinstance(ious, jax.Array) and isinstance(box_iou(first, second), np.ndarray)
    ious = np.asarray(ious)
    exact = box_iou(first.astype(np.float64), second.astype(np.float64))
    np.testing.assert_allclose(ious, exact, atol=1e-6)
    assert ious[0, 0] == 1 and ious[1, 1] == 0


def test_detect_returns_the_best_candidates_of_all_maps_from_the_minimum_score():
    random = np.random.default_rng(4)
    maps = tuple(jnp.array(random.normal(size=(n, n, 3, 7)), jnp.float32) for n in (2, 4, 8))
    anchors = anchor_boxes.anchors_for_size((64, 64))
    logits = np.concatenate([np.asarray(m)[..., 4].ravel() for m in maps])
    scores = np.sort(1 / (1 + np.exp(-logits)))[::-1]
    detect = partial(anchor_boxes.detect, size=(64, 64))
    # No IoU exceeds 1, so nothing is suppressed.
    detect_best = partial(detect, num_candidates=20, min_score=float(scores[9]), max_iou=1.01)
    detections = jax.jit(detect_best)(maps, anchors)
    np.testing.assert_allclose(detections.scores, scores[:20], rtol=1e-6)
    assert int(detections.mask.sum()) == 10 and detections.mask[:10].all()
    # Every IoU is at least 0, so one box of each class remains.
    detect_any = jax.jit(partial(detect, num_candidates=1000, min_score=0.0, max_iou=0.0))
    single = detect_any(maps, anchors)
    assert len(single.scores) == len(scores)
    assert sorted(np.asarray(single.classes)[np.asarray(single.mask)].tolist()) == [0, 1]
    broken = detect_any((maps[0], maps[1].at[0, 0, 0, 4].set(jnp.nan), maps[2]), anchors)
    assert np.isnan(broken.scores[0]) and broken.mask[0]
