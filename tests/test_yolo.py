"""YOLOv3's head and loss: sums over cells by plain loops, shapes and numbers of parameters."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from literal_boxes import GRID, SIZE, literal_targets, random_boxes

from plan_jax.heads import anchors as anchor_boxes
from plan_jax.heads import pyramid, yolo


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
