"""Targets, decoding and suppression of boxes, the loss and the maps of the head, against loops."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.heads import anchors as anchor_boxes
from plan_jax.heads import pyramid, yolo
from plan_jax.metrics.boxes import box_iou

SIZE = (64, 96)  # rows, columns: not square, so that swapped axes show
GRID = (4, 6)
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


def random_boxes(random, count, size=SIZE):
    """Boxes of 2 to 40 pixels anywhere in an image."""
    centre = random.uniform((0, 0), size[::-1], (count, 2))
    half = random.uniform(1, 20, (count, 2))
    return np.concatenate([centre - half, centre + half], 1).astype(np.float32)


def literal_targets(boxes, mask, classes, anchors, num_classes, published):
    """The assignment, box by box, in plain Python."""
    rows, columns = GRID
    step_x, step_y = SIZE[1] / columns, SIZE[0] / rows
    shape = (*GRID, len(anchors))
    assigned, background = np.zeros(shape, bool), np.ones(shape, bool)
    offset, log_sides = np.zeros((*shape, 2)), np.zeros((*shape, 2))
    one_hot = np.zeros((*shape, num_classes))
    for (x0, y0, x1, y1), is_real, k in zip(boxes.astype(float), mask, classes, strict=True):
        if not is_real:
            continue
        gx, gy, gw, gh = (
            (x0 + x1) / 2 / step_x,
            (y0 + y1) / 2 / step_y,
            (x1 - x0) / step_x,
            (y1 - y0) / step_y,
        )
        i, j = min(int(gx), columns - 1), min(int(gy), rows - 1)
        scores = []
        for aw, ah in np.asarray(anchors, float) / (step_x, step_y):
            inter = (min(gw, aw) + 1) * (min(gh, ah) + 1)
            scores.append(inter / ((gw + 1) * (gh + 1) + (aw + 1) * (ah + 1) - inter))
        best = int(np.argmax(scores))
        for a, score in enumerate(scores):
            if score > 0.5 or (a == best and not published):
                background[j, i, a] = False
        assigned[j, i, best] = True
        offset[j, i, best] = gx - i, gy - j
        aw, ah = np.asarray(anchors, float)[best] / (step_x, step_y)
        log_sides[j, i, best] = math.log(gw / aw), math.log(gh / ah)
        one_hot[j, i, best, k] = 1
    return assigned, background, offset, log_sides, one_hot


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


def literal_loss(outputs, boxes, mask, classes, average, published):
    """The loss as sums over cells of plain binary cross-entropies."""

    def cross_entropy(p, t):
        return -(t * np.log(p) + (1 - t) * np.log(1 - p))

    total = 0.0
    for raw, anchors in zip(outputs, anchor_boxes.anchors_for_size(SIZE), strict=True):
        raw = np.asarray(raw, float)
        sigmoid, num_classes = 1 / (1 + np.exp(-raw)), raw.shape[-1] - 5
        terms = np.zeros(5)  # offsets, sides, objects, classes; background
        num_anchors, num_assigned, num_background = raw[..., 0].size, 0, 0
        for image in range(len(raw)):
            truth = boxes[image], mask[image], classes[image], np.asarray(anchors)
            targets = literal_targets(*truth, num_classes, published)
            assigned, background, offset, log_sides, one_hot = targets
            for index in map(tuple, np.argwhere(assigned)):
                p, r = sigmoid[(image, *index)], raw[(image, *index)]
                terms[0] += sum(cross_entropy(p[n], offset[index][n]) for n in range(2))
                terms[1] += sum((r[2 + n] - log_sides[index][n]) ** 2 for n in range(2))
                terms[2] += cross_entropy(p[4], 1)
                class_terms = [
                    cross_entropy(p[5 + n], one_hot[index][n]) for n in range(num_classes)
                ]
                terms[3] += np.mean(class_terms)
                num_assigned += 1
            terms[4] += cross_entropy(sigmoid[image, ..., 4][background], 0).sum()
            num_background += background.sum()
        cells = average == "cells"
        terms[:4] /= num_anchors if cells else max(num_assigned, 1)
        terms[4] /= num_anchors if cells else num_background
        total += terms @ (2.5, 2.5, 1, 1, 0.5)
    return total


@pytest.mark.parametrize(("average", "published"), [("cells", True), ("objects", False)])
def test_the_loss_is_that_of_a_literal_sum(average, published):
    random = np.random.default_rng(5)
    boxes = np.stack([random_boxes(random, 5) for _ in range(3)])
    mask, classes = random.random((3, 5)) < 0.6, random.integers(0, 2, (3, 5))
    mask[2] = False  # an image without boxes
    outputs = [jnp.array(random.normal(size=(3, *GRID, 3, 7)), jnp.float32) for _ in range(3)]
    options = {"average": average, "published_background": published}
    loss = jax.jit(partial(yolo.yolo_loss, size=SIZE, **options))
    value = loss(outputs, boxes, mask, classes)
    expected = literal_loss(outputs, boxes, mask, classes, average, published)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_padding_changes_neither_loss_nor_gradient_and_extremes_stay_finite():
    random = np.random.default_rng(6)
    outputs = [jnp.array(random.normal(size=(2, *GRID, 3, 6)) * 40, jnp.float32)] * 3
    loss = jax.jit(jax.value_and_grad(partial(yolo.yolo_loss, size=SIZE)))
    boxes, classes = np.stack([random_boxes(random, 5) for _ in range(2)]), np.zeros((2, 5), int)
    mask = np.arange(5) < [[2], [1]]
    value, gradient = loss(outputs, boxes, mask, classes)
    zeroed = loss(outputs, np.where(mask[..., None], boxes, np.float32(0)), mask, classes)
    chex.assert_tree_all_finite((value, gradient))
    chex.assert_trees_all_equal((value, gradient), zeroed)
    healthy_value, healthy_gradient = loss(outputs, boxes, np.zeros_like(mask), classes)
    assert 0 < float(healthy_value) < float(value)
    assert not np.asarray(healthy_gradient[0][..., :4]).any()
    assert np.asarray(healthy_gradient[0][..., 4]).any()


@pytest.mark.parametrize(
    ("stages", "grids"),
    [
        ([(112, 4), (56, 5), (28, 6), (14, 7), (7, 8)], (7, 14, 28)),
        ([(24, 4), (24, 5), (12, 6)], (6, 12, 24)),
        ([(25, 4), (13, 5)], (7, 13, 25)),
        ([(7, 6)], (4, 7, 14)),
    ],
)
def test_the_head_returns_three_maps_for_every_tower(stages, grids):
    maps = pyramid.last_three_sizes([jnp.zeros((2, n, n, c)) for n, c in stages])
    head = yolo.Yolo(classes=2, widths=(16, 8, 4))

    def run(key):
        variables = head.init(key, maps)
        outputs, _ = head.apply(variables, maps, None, True, mutable=["batch_stats"])
        return variables["params"], outputs

    params, outputs = jax.eval_shape(run, jax.random.key(0))
    assert [x.shape for x in outputs] == [(2, n, n, 3, 7) for n in grids]
    widths = [params[f"block_{n}_4"]["conv"]["kernel"].shape[-1] for n in range(3)]
    assert widths == [16, 8, 4]
    assert ("pyramid" in params) == (len(maps) < 3)


def test_the_published_head_has_the_parameters_of_its_layers():
    maps = [jnp.zeros((1, n, n, c)) for n, c in ((28, 512), (14, 1024), (7, 2048))]
    shapes = jax.eval_shape(lambda: yolo.Yolo(classes=1).init(jax.random.key(0), maps))
    expected, input_widths = 0, (2048, 1024 + 256, 512 + 128)
    for input_width, width in zip(input_widths, (512, 256, 128), strict=True):
        kernels = input_width * width + 3 * 9 * width * 2 * width + 2 * 2 * width * width
        expected += kernels + 2 * (3 * width + 3 * 2 * width) + 2 * width * 18 + 18
        expected += (width * width // 2 + width) * (width > 128)  # the block before upsampling
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["params"])) == expected


def test_a_single_map_becomes_finer_by_a_transposed_convolution_and_coarser_by_the_maximum():
    x = jnp.array(np.random.default_rng(7).normal(size=(2, 3, 3, 4)), jnp.float32)
    module = pyramid.Pyramid()
    variables = module.init(jax.random.key(0), [x])
    finer, unchanged, coarser = module.apply(variables, [x])
    kernel = variables["params"]["above"]["kernel"].reshape(4, 2, 2, 2)
    kernel = kernel.transpose(1, 2, 0, 3)[::-1, ::-1]
    expected = jax.lax.conv_transpose(x, kernel, (2, 2), "VALID")
    np.testing.assert_allclose(finer, expected, atol=1e-5)
    assert unchanged is x and coarser.shape == (2, 2, 2, 4)
    np.testing.assert_array_equal(coarser[:, 0, 0], x[:, :2, :2].max((1, 2)))
    np.testing.assert_array_equal(coarser[:, 1, 1], x[:, 2, 2])


def test_training_updates_the_running_statistics_and_evaluation_does_not():
    x = jnp.array(np.random.default_rng(8).normal(size=(8, 4, 4, 3)) + 2, jnp.float32)
    block = pyramid.ConvNorm(5, 3, slope=yolo.SLOPE)
    variables = block.init(jax.random.key(0), x)
    outputs, unchanged = block.apply(variables, x, False, mutable=["batch_stats"])
    assert (unchanged["batch_stats"]["norm"]["mean"] == 0).all() and (outputs < 0).any()
    outputs, updated = block.apply(variables, x, True, mutable=["batch_stats"])
    normalised = np.where(outputs > 0, outputs, outputs / yolo.SLOPE)
    np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, atol=1e-3)
    raw = jax.lax.conv(
        x.transpose(0, 3, 1, 2),
        jnp.transpose(variables["params"]["conv"]["kernel"], (3, 2, 0, 1)),
        (1, 1),
        "SAME",
    )
    expected = 0.1 * np.asarray(raw).mean((0, 2, 3))
    mean = updated["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)
