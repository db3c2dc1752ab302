"""Pooling of pixels: values, gradients, and a compiler that rounds differently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from plan_jax.layers.batch_norm import batch_statistics
from plan_jax.layers.pooling import max_pixel, mean_cells


def literal_max(x):
    """Returns the maxima [B C] of x [B Y X C], and 1 at the first pixel of each, else 0."""
    values, slopes = np.zeros((len(x), x.shape[-1]), x.dtype), np.zeros(x.shape, x.dtype)
    for b, c in np.ndindex(values.shape):
        pixels = [(y, v) for y in range(x.shape[1]) for v in range(x.shape[2])]
        y, v = max(pixels, key=lambda pixel: x[b, *pixel, c])  # the first of equals
        values[b, c], slopes[b, y, v, c] = x[b, y, v, c], 1
    return values, slopes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_goes_to_the_first_of_the_largest_pixels(dtype):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 3, (3, 4, 5, 6)).astype(np.float32)  # of six values, so there are ties
    weights = rng.integers(1, 9, (3, 6)).astype(np.float32)
    values, slopes = literal_max(x)
    output, pull = jax.vjp(max_pixel, jnp.asarray(x, dtype))
    assert output.dtype == dtype
    np.testing.assert_array_equal(output.astype(jnp.float32), values)
    gradient = pull(jnp.asarray(weights, dtype))[0].astype(jnp.float32)
    np.testing.assert_array_equal(gradient, slopes * weights[:, None, None])


def test_the_gradient_is_finite_where_the_compiler_rounds_differently():
    def normalise(x):
        mean, var, _ = batch_statistics(x)
        return (x - mean) * lax.rsqrt(var + 1e-5)

    def loss(x, skip):
        maps = jax.nn.relu(normalise(x) + normalise(skip))  # as a residual block ends
        return jnp.sin(jnp.concatenate([maps.mean((1, 2)), max_pixel(maps)], -1)).sum()

    maps = jax.random.normal(jax.random.key(0), (2, 16, 4, 4, 16))
    gradient = jax.jit(jax.grad(loss, (0, 1))).lower(*maps)
    # With these, XLA's CPU backend computes the maps in two loops, which round apart.
    options = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11):  # 0.10 has the option, 0.12 does not
        options["xla_cpu_use_fusion_emitters"] = True
    gradient = gradient.compile(compiler_options=options)
    assert all(np.isfinite(leaf).all() for leaf in gradient(*maps))


@pytest.mark.parametrize(("size", "grid"), [((6, 4), (3, 2)), ((5, 7), (2, 3)), ((3, 3), (3, 3))])
def test_the_mean_of_cells_is_that_of_their_pixels_by_share(size, grid):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    # Each pixel as many small ones, of which a whole number lies in each cell.
    small = x.repeat(grid[0], 1).repeat(grid[1], 2)
    expected = small.reshape(2, grid[0], size[0], grid[1], size[1], 3).mean((2, 4))
    np.testing.assert_allclose(mean_cells(jnp.asarray(x), grid), expected, rtol=1e-5, atol=1e-6)
