"""Dice and intersection over union against sets of pixels, and for empty masks."""

import math

import numpy as np
import pytest

from plan_jax.metrics import masks as mask_metrics


def random_masks(count=40, pixels=30, seed=0):
    """Predicted and true masks, some of them empty or full, on one side or both, some equal."""
    random = np.random.default_rng(seed)
    predicted = random.random((count, pixels)) < random.random((count, 1))
    truth = random.random((count, pixels)) < random.random((count, 1))
    predicted[[0, 1, 6]], truth[[0, 2, 7]] = False, False
    predicted[[3, 7]], truth[[3, 6]] = True, True
    predicted[4] = truth[4]
    predicted[5] = ~truth[5]
    return predicted, truth


def literal_scores(predicted, truth):
    """Dice and IoU of one image, from sets of pixels."""
    a, b = set(np.flatnonzero(predicted)), set(np.flatnonzero(truth))
    if not b:
        return (0.0, 0.0) if a else (1.0, 1.0)
    return 2 * len(a & b) / (len(a) + len(b)), len(a & b) / len(a | b)


def test_values_are_those_of_sets_of_pixels():
    predicted, truth = random_masks()
    expected = np.array([literal_scores(*pair) for pair in zip(predicted, truth, strict=True)])
    np.testing.assert_allclose(mask_metrics.dice(predicted, truth), expected[:, 0], rtol=1e-12)
    np.testing.assert_allclose(mask_metrics.iou(predicted, truth), expected[:, 1], rtol=1e-12)
    assert len(np.unique(expected[:, 0])) > 20


def test_an_empty_truth_counts_as_the_name_says():
    empty, full = np.zeros((1, 6), bool), np.ones((1, 6), bool)
    for metric in (mask_metrics.dice, mask_metrics.iou):
        assert metric(empty, empty) == 1
        assert metric(full, empty) == metric(empty, full) == 0
        assert metric(full, full) == 1
    assert np.isnan(mask_metrics.dice_positive(empty, empty))
    assert np.isnan(mask_metrics.dice_positive(full, empty))
    assert mask_metrics.dice_positive(empty, full) == 0


def test_iou_follows_from_dice():
    dice, iou = mask_metrics.dice(*random_masks()), mask_metrics.iou(*random_masks())
    np.testing.assert_allclose(iou, dice / (2 - dice), rtol=1e-12)


def test_dice_positive_ignores_images_without_truth():
    predicted, truth = random_masks()
    values = mask_metrics.dice_positive(predicted, truth)
    assert (np.isnan(values) == ~truth.any(1)).all() and np.isnan(values).sum() >= 3
    positive = truth.any(1)
    mean = mask_metrics.nan_mean(values)
    assert mean == pytest.approx(mask_metrics.dice(predicted[positive], truth[positive]).mean())
    assert mean != pytest.approx(mask_metrics.dice(predicted, truth).mean())
    assert math.isnan(mask_metrics.nan_mean(np.full(3, np.nan)))


def test_the_order_of_images_and_pixels_does_not_matter():
    predicted, truth = random_masks()
    order = np.random.default_rng(1).permutation(len(predicted))
    for metric in (mask_metrics.dice, mask_metrics.iou, mask_metrics.dice_positive):
        values = metric(predicted, truth)
        np.testing.assert_array_equal(metric(predicted[order], truth[order]), values[order])
        np.testing.assert_array_equal(metric(predicted[8:9], truth[8:9]), values[8:9])
        pixels = np.random.default_rng(2).permutation(predicted.shape[1])
        np.testing.assert_array_equal(metric(predicted[:, pixels], truth[:, pixels]), values)
