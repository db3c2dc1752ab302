"""Targets, decoding and suppression of boxes, the loss and the maps under it, against loops."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.heads import anchors as anchor_boxes
from plan_jax.heads import pyramid, yolo
from plan_jax.metrics.boxes import iou

SIZE = (64, 96)  # rows, columns: not square, so that nothing can be the wrong way round
GRID = (4, 6)
ASSIGN = {
    published: jax.jit(
        partial(anchor_boxes.assign, grid=GRID, size=SIZE, count=3, published=published)
    )
    for published in (False, True)
}


def some_boxes(random, number, size=SIZE):
    """Boxes of 2 to 40 pixels anywhere in an image."""
    centre = random.uniform((0, 0), size[::-1], (number, 2))
    half = random.uniform(1, 20, (number, 2))
    return np.concatenate([centre - half, centre + half], 1).astype(np.float32)


def literal_targets(found, real, kinds, anchors, count, published):
    """The assignment, box by box, in plain Python."""
    rows, columns = GRID
    step_x, step_y = SIZE[1] / columns, SIZE[0] / rows
    shape = (*GRID, len(anchors))
    have, empty = np.zeros(shape, bool), np.ones(shape, bool)
    place, size = np.zeros((*shape, 2)), np.zeros((*shape, 2))
    names = np.zeros((*shape, count))
    for (x0, y0, x1, y1), there, kind in zip(found.astype(float), real, kinds, strict=True):
        if not there:
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
                empty[j, i, a] = False
        have[j, i, best] = True
        place[j, i, best] = gx - i, gy - j
        aw, ah = np.asarray(anchors, float)[best] / (step_x, step_y)
        size[j, i, best] = math.log(gw / aw), math.log(gh / ah)
        names[j, i, best, kind] = 1
    return have, empty, place, size, names


@pytest.mark.parametrize("published", [False, True])
def test_targets_are_those_of_a_literal_loop(published):
    random = np.random.default_rng(0)
    differ = 0
    for n in range(20):
        anchors = np.asarray(anchor_boxes.anchors_at(SIZE)[n % 3])
        found = some_boxes(random, 12)  # 12 boxes in 24 cells: some share cell and anchor
        found[9] = found[8] + np.float32(0.25)
        found[11] = (90, 60, 102, 68)  # its centre is the image's last corner
        real, kinds = random.random(12) < 0.7, random.integers(0, 3, 12)
        right = literal_targets(found, real, kinds, anchors, 3, published)
        for a, b in zip(ASSIGN[published](found, real, kinds, anchors), right, strict=True):
            np.testing.assert_allclose(np.asarray(a), b, atol=2e-5)
        other = literal_targets(found, real, kinds, anchors, 3, not published)
        differ += (right[1] != other[1]).any()
    assert differ > 5  # the published fault is no rare case


def test_of_two_boxes_at_one_anchor_the_last_gives_the_place_and_both_their_class():
    pair = np.float32([[10, 10, 20, 20], [9, 10, 19, 20]])
    for order in ([0, 1], [1, 0]):
        some = np.zeros((12, 4), np.float32)
        some[:2] = pair[order]
        anchors = anchor_boxes.anchors_at(SIZE)[2]
        goal = ASSIGN[False](some, np.arange(12) < 2, np.arange(12) % 2, anchors)
        assert int(goal.assigned.sum()) == 1
        at = tuple(np.argwhere(np.asarray(goal.assigned))[0])
        assert float(goal.place[at][0]) * 16 == pytest.approx([15, 14][order[1]])
        assert goal.classes[at].tolist() == [1, 1, 0]


def test_decode_gives_back_what_was_encoded():
    random = np.random.default_rng(1)
    decode = jax.jit(partial(anchor_boxes.decode, size=SIZE))
    real, kinds = np.arange(12) < 1, np.ones(12, int)
    for anchors in anchor_boxes.anchors_at(SIZE):
        some = some_boxes(random, 12)
        some[0, :2], some[0, 2:] = np.maximum(some[0, :2], 0), np.minimum(some[0, 2:], SIZE[::-1])
        goal = ASSIGN[False](some, real, kinds, anchors)
        share = np.clip(goal.place, 1e-6, 1 - 1e-6)
        sure = np.where(goal.assigned, 9, -9)[..., None]
        raw = [np.log(share / (1 - share)), goal.size, sure, 9 * np.asarray(goal.classes)]
        found, score, kind = decode(np.concatenate(raw, -1, dtype=np.float32), anchors)
        at = np.asarray(score) > 0.5
        assert at.sum() == 1 and np.asarray(kind)[at].tolist() == [1]
        np.testing.assert_allclose(np.asarray(found)[at][0], some[0], atol=1e-3)


def test_decoded_boxes_stay_in_the_image_however_wild_the_numbers():
    raw = jnp.full((2, 2, 3, 6), 200.0)
    found, score, _ = anchor_boxes.decode(raw, anchor_boxes.anchors_at(SIZE)[0], SIZE)
    assert np.isfinite(found).all() and (score == 1).all()
    assert (found[..., 2:] <= jnp.array([96.0, 64.0])).all() and (found[..., :2] >= 0).all()


def literal_nms(found, scores, kinds, limit):
    keep, order = np.zeros(len(found), bool), sorted(range(len(found)), key=lambda n: -scores[n])
    for n in order:
        rivals = [m for m in order if keep[m] and kinds[m] == kinds[n]]
        keep[n] = all(iou(found[[n]], found[[m]])[0, 0] < limit for m in rivals)
    return keep


def test_suppression_is_that_of_a_literal_loop_also_under_vmap():
    random = np.random.default_rng(2)
    found = np.stack([some_boxes(random, 30, (12, 12)) for _ in range(8)])
    scores = random.integers(0, 6, (8, 30)).astype(np.float32) / 5  # many ties
    kinds = random.integers(0, 2, (8, 30))
    found[0, :2] = (40, 40, 42, 42), (40, 40, 42, 41)  # an IoU of just 0.5
    kinds[0, :2] = 1
    keep = np.asarray(jax.jit(jax.vmap(anchor_boxes.nms))(found, scores, kinds))
    for n in range(8):
        right = literal_nms(found[n], scores[n], kinds[n], 0.5)
        np.testing.assert_array_equal(keep[n], right)
        assert 2 < right.sum() < 29
    assert keep[0, :2].sum() == 1


def test_overlap_is_that_of_the_metrics_and_none_without_area():
    random = np.random.default_rng(3)
    a, b = some_boxes(random, 9), some_boxes(random, 5)
    b[0] = a[0]
    a[1] = b[1] = (3, 3, 3, 9)
    here = np.asarray(anchor_boxes.overlap(jnp.array(a), jnp.array(b)))
    np.testing.assert_allclose(here, iou(a, b), atol=1e-6)
    assert here[0, 0] == 1 and here[1, 1] == 0


def test_detect_takes_the_best_candidates_of_all_maps_from_the_floor_on():
    random = np.random.default_rng(4)
    maps = tuple(jnp.array(random.normal(size=(n, n, 3, 7)), jnp.float32) for n in (2, 4, 8))
    anchors = anchor_boxes.anchors_at((64, 64))
    every = np.concatenate([np.asarray(m)[..., 4].ravel() for m in maps])
    every = np.sort(1 / (1 + np.exp(-every)))[::-1]
    some = partial(
        anchor_boxes.detect, candidates=20, size=(64, 64), floor=float(every[9]), limit=1.01
    )
    found = jax.jit(some)(maps, anchors)  # nothing can overlap so much
    np.testing.assert_allclose(found.scores, every[:20], rtol=1e-6)
    assert int(found.keep.sum()) == 10 and found.keep[:10].all()
    some = partial(anchor_boxes.detect, candidates=1000, floor=0.0, size=(64, 64), limit=0.0)
    some = jax.jit(some)
    single = some(maps, anchors)  # anything overlaps enough: one box a class is left
    assert len(single.scores) == len(every)
    assert sorted(np.asarray(single.classes)[np.asarray(single.keep)].tolist()) == [0, 1]
    broken = some((maps[0], maps[1].at[0, 0, 0, 4].set(jnp.nan), maps[2]), anchors)
    assert np.isnan(broken.scores[0]) and broken.keep[0]


def literal_loss(outputs, found, real, kinds, average, published):
    """The loss as sums over cells of plain binary cross-entropies."""

    def bce(p, t):
        return -(t * np.log(p) + (1 - t) * np.log(1 - p))

    total = 0.0
    for raw, anchors in zip(outputs, anchor_boxes.anchors_at(SIZE), strict=True):
        raw = np.asarray(raw, float)
        sigmoid, count = 1 / (1 + np.exp(-raw)), raw.shape[-1] - 5
        terms = np.zeros(5)  # place, size, object, classes; background
        number, objects, empties = raw[..., 0].size, 0, 0
        for image in range(len(raw)):
            one = found[image], real[image], kinds[image], np.asarray(anchors)
            have, empty, place, size, names = literal_targets(*one, count, published)
            for at in np.argwhere(have):
                p, r, at = sigmoid[(image, *at)], raw[(image, *at)], tuple(at)
                terms[0] += sum(bce(p[n], place[at][n]) for n in range(2))
                terms[1] += sum((r[2 + n] - size[at][n]) ** 2 for n in range(2))
                terms[2] += bce(p[4], 1)
                terms[3] += np.mean([bce(p[5 + n], names[at][n]) for n in range(count)])
                objects += 1
            terms[4] += bce(sigmoid[image, ..., 4][empty], 0).sum()
            empties += empty.sum()
        cells = average == "cells"
        terms[:4] /= number if cells else max(objects, 1)
        terms[4] /= number if cells else empties
        total += terms @ (2.5, 2.5, 1, 1, 0.5)
    return total


@pytest.mark.parametrize(("average", "published"), [("cells", True), ("objects", False)])
def test_the_loss_is_that_of_a_literal_sum(average, published):
    random = np.random.default_rng(5)
    found = np.stack([some_boxes(random, 5) for _ in range(3)])
    real, kinds = random.random((3, 5)) < 0.6, random.integers(0, 2, (3, 5))
    real[2] = False  # an image in which there is nothing
    outputs = [jnp.array(random.normal(size=(3, *GRID, 3, 7)), jnp.float32) for _ in range(3)]
    value = jax.jit(partial(yolo.loss, size=SIZE, average=average, published=published))(
        outputs, found, real, kinds
    )
    right = literal_loss(outputs, found, real, kinds, average, published)
    assert float(value) == pytest.approx(right, rel=1e-5)


def test_padding_changes_neither_loss_nor_gradient_and_extremes_stay_finite():
    random = np.random.default_rng(6)
    outputs = [jnp.array(random.normal(size=(2, *GRID, 3, 6)) * 40, jnp.float32)] * 3
    give = jax.jit(jax.value_and_grad(partial(yolo.loss, size=SIZE)))
    found, kinds = np.stack([some_boxes(random, 5) for _ in range(2)]), np.zeros((2, 5), int)
    real = np.arange(5) < [[2], [1]]
    one = give(outputs, found, real, kinds)
    two = give(outputs, np.where(real[..., None], found, np.float32(0)), real, kinds)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)
    healthy, slope = give(outputs, found, np.zeros_like(real), kinds)
    assert 0 < float(healthy) < float(one[0])
    assert not np.asarray(slope[0][..., :4]).any() and np.asarray(slope[0][..., 4]).any()


@pytest.mark.parametrize(
    ("stages", "grids"),
    [
        ([(112, 4), (56, 5), (28, 6), (14, 7), (7, 8)], (7, 14, 28)),
        ([(24, 4), (24, 5), (12, 6)], (6, 12, 24)),
        ([(25, 4), (13, 5)], (7, 13, 25)),
        ([(7, 6)], (4, 7, 14)),
    ],
)
def test_the_head_gives_three_maps_for_every_tower(stages, grids):
    maps = pyramid.choose([jnp.zeros((2, n, n, c)) for n, c in stages])
    head = yolo.Yolo(classes=2, widths=(16, 8, 4))
    made, outputs = {}, ()

    def run(key):
        variables = head.init(key, maps)
        outputs, changed = head.apply(variables, maps, None, True, mutable=["batch_stats"])
        return variables, outputs, changed

    made, outputs, _ = jax.eval_shape(run, jax.random.key(0))
    assert [x.shape for x in outputs] == [(2, n, n, 3, 7) for n in grids]
    widths = [made["params"][f"block_{n}_4"]["conv"]["kernel"].shape[-1] for n in range(3)]
    assert widths == [16, 8, 4]
    assert ("pyramid" in made["params"]) == (len(maps) < 3)


def test_the_published_head_has_as_many_parameters_as_its_layers_say():
    maps = [jnp.zeros((1, n, n, c)) for n, c in ((28, 512), (14, 1024), (7, 2048))]
    made = jax.eval_shape(lambda: yolo.Yolo(classes=1).init(jax.random.key(0), maps))
    number, inside = 0, (2048, 1024 + 256, 512 + 128)
    for seen, width in zip(inside, (512, 256, 128), strict=True):
        kernels = seen * width + 3 * 9 * width * 2 * width + 2 * 2 * width * width
        number += kernels + 2 * (3 * width + 3 * 2 * width) + 2 * width * 18 + 18
        number += (width * width // 2 + width) * (width > 128)  # the way up
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(made["params"])) == number


def test_one_map_becomes_finer_by_a_transposed_convolution_and_coarser_by_the_maximum():
    x = jnp.array(np.random.default_rng(7).normal(size=(2, 3, 3, 4)), jnp.float32)
    module = pyramid.Pyramid()
    variables = module.init(jax.random.key(0), [x])
    finer, same, coarser = module.apply(variables, [x])
    dense = variables["params"]["above"]["kernel"].reshape(4, 2, 2, 2)
    right = jax.lax.conv_transpose(x, dense.transpose(1, 2, 0, 3)[::-1, ::-1], (2, 2), "VALID")
    np.testing.assert_allclose(finer, right, atol=1e-5)
    assert same is x and coarser.shape == (2, 2, 2, 4)
    np.testing.assert_array_equal(coarser[:, 0, 0], x[:, :2, :2].max((1, 2)))
    np.testing.assert_array_equal(coarser[:, 1, 1], x[:, 2, 2])


def test_training_moves_the_running_statistics_and_evaluation_does_not():
    x = jnp.array(np.random.default_rng(8).normal(size=(8, 4, 4, 3)) + 2, jnp.float32)
    block = pyramid.ConvNorm(5, 3, slope=yolo.SLOPE)
    made = block.init(jax.random.key(0), x)
    seen, same = block.apply(made, x, False, mutable=["batch_stats"])
    assert (same["batch_stats"]["norm"]["mean"] == 0).all() and (seen < 0).any()
    seen, new = block.apply(made, x, True, mutable=["batch_stats"])
    inside = np.where(seen > 0, seen, seen / yolo.SLOPE)
    np.testing.assert_allclose(inside.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(inside.std((0, 1, 2)), 1, atol=1e-3)
    raw = jax.lax.conv(
        x.transpose(0, 3, 1, 2),
        jnp.transpose(made["params"]["conv"]["kernel"], (3, 2, 0, 1)),
        (1, 1),
        "SAME",
    )
    kept = 0.1 * np.asarray(raw).mean((0, 2, 3))
    np.testing.assert_allclose(new["batch_stats"]["norm"]["mean"], kept, rtol=1e-4, atol=1e-6)
