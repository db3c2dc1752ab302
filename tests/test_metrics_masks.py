"""Dice and intersection over union against slow loops, and where there is nothing to overlap."""

import math

import numpy as np
import pytest

from plan_jax.metrics import masks as mask_metrics


def masks(number=40, pixels=30, seed=0):
    """Pairs of masks, among them empty and full ones on either side, and equal ones."""
    random = np.random.default_rng(seed)
    found = random.random((number, pixels)) < random.random((number, 1))
    truth = random.random((number, pixels)) < random.random((number, 1))
    found[[0, 1, 6]], truth[[0, 2, 7]] = False, False
    found[[3, 7]], truth[[3, 6]] = True, True
    found[4] = truth[4]
    found[5] = ~truth[5]
    return found, truth


def literal(found, truth):
    """Dice and IoU of one image, from sets of pixels."""
    a = {i for i, one in enumerate(found) if one}
    b = {i for i, one in enumerate(truth) if one}
    if not b:
        return (0.0, 0.0) if a else (1.0, 1.0)
    return 2 * len(a & b) / (len(a) + len(b)), len(a & b) / len(a | b)


def test_values_are_those_of_a_literal_loop():
    found, truth = masks()
    wanted = np.array([literal(*pair) for pair in zip(found, truth, strict=True)])
    np.testing.assert_allclose(mask_metrics.dice(found, truth), wanted[:, 0], rtol=1e-12)
    np.testing.assert_allclose(mask_metrics.iou(found, truth), wanted[:, 1], rtol=1e-12)
    assert len(np.unique(wanted[:, 0])) > 20


def test_an_image_without_truth_counts_for_silence():
    empty, full = np.zeros((1, 6), bool), np.ones((1, 6), bool)
    for metric in (mask_metrics.dice, mask_metrics.iou):
        assert metric(empty, empty) == 1
        assert metric(full, empty) == metric(empty, full) == 0
        assert metric(full, full) == 1
    assert np.isnan(mask_metrics.dice_positive(empty, empty))
    assert np.isnan(mask_metrics.dice_positive(full, empty))
    assert mask_metrics.dice_positive(empty, full) == 0


def test_iou_follows_from_dice():
    dice, iou = mask_metrics.dice(*masks()), mask_metrics.iou(*masks())
    np.testing.assert_allclose(iou, dice / (2 - dice), rtol=1e-12)


def test_only_images_with_a_truth_are_in_dice_positive():
    found, truth = masks()
    values = mask_metrics.dice_positive(found, truth)
    assert (np.isnan(values) == ~truth.any(1)).all() and np.isnan(values).sum() >= 3
    kept = truth.any(1)
    mean = mask_metrics.mean_known(values)
    assert mean == pytest.approx(mask_metrics.dice(found[kept], truth[kept]).mean())
    assert mean != pytest.approx(mask_metrics.dice(found, truth).mean())
    assert math.isnan(mask_metrics.mean_known(np.full(3, np.nan)))


def test_order_and_other_images_do_not_matter():
    found, truth = masks()
    order = np.random.default_rng(1).permutation(len(found))
    for metric in (mask_metrics.dice, mask_metrics.iou, mask_metrics.dice_positive):
        whole = metric(found, truth)
        np.testing.assert_array_equal(metric(found[order], truth[order]), whole[order])
        np.testing.assert_array_equal(metric(found[8:9], truth[8:9]), whole[8:9])
        pixels = np.random.default_rng(2).permutation(found.shape[1])
        np.testing.assert_array_equal(metric(found[:, pixels], truth[:, pixels]), whole)
