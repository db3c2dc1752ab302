"""Sparsemax against a literal loop, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.layers.sparsemax import sparsemax

RNG = np.random.default_rng(0)


def literal_sparsemax(x):
    """Computes the projection of one vector onto the simplex: algorithm 1, by sorting."""
    descending, total, threshold = sorted(np.asarray(x, np.float64), reverse=True), 0.0, None
    for k, value in enumerate(descending, 1):
        total += value
        if 1 + k * value > total:
            threshold = (total - 1) / k
    return np.maximum(x - threshold, 0)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 5.0, 1e4])
def test_sparsemax_is_the_literal_loop(scale):
    x = scale * np.concatenate([RNG.normal(size=(4, 30)), RNG.standard_cauchy((4, 30))])
    x[0, :3] = x[0].max()  # ties
    actual = jax.jit(jax.vmap(sparsemax))(jnp.asarray(x, jnp.float32))
    expected = [literal_sparsemax(row) for row in x.astype(np.float32)]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_its_gradient_is_that_of_the_literal_loop():
    x, weight = RNG.normal(size=9), RNG.normal(size=9)
    actual = jax.jit(jax.grad(lambda x: jnp.sum(sparsemax(x) * weight)))(
        jnp.asarray(x, jnp.float32)
    )
    for p in range(9):
        shift = np.zeros(9)
        shift[p] = 1e-6
        above, below = (literal_sparsemax(y) @ weight for y in (x + shift, x - shift))
        np.testing.assert_allclose(actual[p], (above - below) / 2e-6, atol=1e-4)


def test_entries_far_below_the_rest_have_no_share():
    x = jnp.array([[1e3, 1e3 + 0.5, -1e9], [-1e9, -1e9, -1e9]])
    expected = [[0.25, 0.75, 0.0], [1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(sparsemax(x), expected, rtol=1e-5)
