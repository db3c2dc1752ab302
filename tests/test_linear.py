"""The linear head: its initialisation, its feature statistics and its losses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from plan_jax.heads.linear import LOSSES, Linear, feature_statistics


def test_a_feature_that_does_not_vary_keeps_its_scale():
    features = np.float32([[1, 5, 0], [3, 5, 0]])
    statistics = feature_statistics(features)
    assert statistics["mean"].tolist() == [2, 5, 0] and statistics["std"].tolist() == [1, 1, 1]
    head = Linear(2)
    variables = head.init(jax.random.key(0), jnp.asarray(features), {})
    dense = variables["params"]["Dense_0"]
    assert np.abs(dense["kernel"]).max() <= 3**-0.5
    shifted = features + jnp.array([0.0, 0.0, 7.0])
    logits = head.apply({**variables, "batch_stats": statistics}, shifted, {})
    expected = np.float32([[-1, 0, 7], [1, 0, 7]]) @ np.asarray(dense["kernel"])
    np.testing.assert_allclose(logits, expected + np.asarray(dense["bias"]), rtol=1e-5)


@pytest.mark.parametrize("unknown", [0.5, 1.0])
def test_the_multilabel_loss_is_the_mean_over_known_labels(unknown):
    random = np.random.default_rng(3)
    logits = random.normal(size=(9, 3)).astype(np.float32)
    labels = random.integers(0, 2, (9, 3))
    labels[random.random((9, 3)) < unknown] = -1
    loss = jax.value_and_grad(LOSSES["multilabel"])
    examples = {"labels": jnp.asarray(labels == 1), "mask": jnp.asarray(labels >= 0)}
    value, gradient = loss(logits, examples)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    terms = [
        -np.log(p[at] if labels[at] else 1 - p[at]) for at in np.ndindex(9, 3) if labels[at] >= 0
    ]
    assert value == pytest.approx(np.mean(terms) if terms else 0, rel=1e-5)
    chex.assert_tree_all_finite(gradient)
    assert not np.asarray(gradient)[labels < 0].any()
    changed = examples | {"labels": examples["labels"] ^ ~examples["mask"]}
    assert loss(logits, changed)[0] == value


def test_the_multiclass_loss_is_that_of_integer_labels():
    random = np.random.default_rng(4)
    logits, classes = random.normal(size=(9, 3)).astype(np.float32), random.integers(0, 3, 9)
    value = LOSSES["multiclass"](jnp.asarray(logits), {"labels": np.eye(3, dtype=bool)[classes]})
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()
    assert value == pytest.approx(float(expected), rel=1e-6)
