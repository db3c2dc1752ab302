"""Heads on towers: which features are cached, what stays frozen, what is fitted."""

import chex
import jax
import numpy as np
import pytest
from fitted_heads import attach_scalar_head, fit_scalar_head, labelled_images

from plan_jax.heads import examples, head_on_tower
from plan_jax.types import UserError


def test_a_head_on_frozen_features_learns_and_leaves_the_tower_alone():
    attached = attach_scalar_head()
    fit_result = fit_scalar_head(attached)
    images, labels = labelled_images(50, 9)
    logits = attached.predict(fit_result.params, fit_result.stats, attached.examples(images))
    assert ((logits > 0) == (labels > 0)).mean() > 0.9
    assert fit_result.history[-1]["loss"] < 0.8 * fit_result.history[0]["loss"]
    assert fit_result.score == max(epoch["score"] for epoch in fit_result.history)
    assert not jax.tree.leaves(fit_result.params["tower"])
    chex.assert_trees_all_equal(fit_result.stats["tower"], attached.stats["tower"])


def test_cached_features_are_the_computed_ones():
    cached, computed = attach_scalar_head(), attach_scalar_head(cache_bytes=0)
    images, _ = labelled_images(70)
    cached_examples = cached.examples(images)
    assert set(cached_examples) == {"features", "source"}
    assert set(computed.examples(images)) == {"image"}
    features = computed.features(computed.params, computed.stats, {"image": images})
    np.testing.assert_allclose(cached_examples["features"], features, rtol=1e-6)
    fits = fit_scalar_head(cached), fit_scalar_head(computed)
    losses = [[epoch["loss"] for epoch in fit_result.history] for fit_result in fits]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_finetuning_changes_the_tower_and_its_statistics():
    attached = attach_scalar_head("finetune")
    fit_result = fit_scalar_head(attached, epochs=3)
    for final, initial in (
        (fit_result.params["tower"], attached.params["tower"]),
        (fit_result.stats["tower"], attached.stats["tower"]),
    ):
        unchanged = jax.tree.leaves(jax.tree.map(np.array_equal, final, initial))
        assert not any(unchanged)


def test_frozen_train_norm_changes_statistics_only():
    attached = attach_scalar_head("frozen_train_norm")
    fit_result = fit_scalar_head(attached, epochs=2)
    assert not jax.tree.leaves(fit_result.params["tower"])
    unchanged = jax.tree.map(np.array_equal, fit_result.stats["tower"], attached.stats["tower"])
    assert not any(jax.tree.leaves(unchanged))


def test_a_prediction_does_not_depend_on_the_number_of_examples():
    attached = attach_scalar_head()
    images, _ = labelled_images(67)
    parameters = attached.params, attached.stats
    logits = attached.predict(*parameters, attached.examples(images))
    first_logits = attached.predict(*parameters, attached.examples(images[:5]))
    assert logits.shape == (67,)
    np.testing.assert_allclose(logits[:5], first_logits, rtol=1e-6)


def test_any_number_of_examples_compiles_once():
    double = jax.jit(chex.assert_max_traces(lambda x: 2 * x, n=1))
    for count in (1, 63, 64, 65, 130):
        values = examples.map_chunks(double, np.arange(count))
        np.testing.assert_array_equal(values, 2 * np.arange(count))


def test_features_that_are_not_finite_are_counted():
    message = r"features of 1 of 3 images are not finite \(the first is image 1\); use another"
    with pytest.raises(UserError, match=message):
        head_on_tower.require_finite({"a": np.array([[1.0], [np.nan], [2.0]])})
