"""Resizing of maps, against interpolation by numpy and by loops over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.layers.resize import double_align_corners, resize_align_corners, resize_nearest


def test_bilinear_resizing_keeps_the_corners():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)

    def resize_line(values, count):
        return np.interp(np.linspace(0, len(values) - 1, count), np.arange(len(values)), values)

    def expected(rows, columns):
        resized_rows = np.apply_along_axis(resize_line, 1, x, rows)
        return np.apply_along_axis(resize_line, 2, resized_rows, columns)

    np.testing.assert_allclose(jax.jit(double_align_corners)(x), expected(6, 8), atol=1e-5)
    resized = jax.jit(resize_align_corners, static_argnums=1)(x, (7, 5))
    np.testing.assert_allclose(resized, expected(7, 5), atol=1e-5)
    single = jax.jit(double_align_corners)(np.ones((1, 1, 1, 3)))
    np.testing.assert_array_equal(single, np.ones((1, 2, 2, 3)))


@pytest.mark.parametrize("size", [(4, 6), (8, 12), (7, 11), (12, 17), (6, 9), (5, 8), (2, 3)])
def test_nearest_resizing_repeats_pixels_or_reads_pixel_centres(size):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 6, 3)), jnp.float32)
    factors = [-(-goal // count) for count, goal in zip((4, 6), size, strict=True)]
    repeated = all(f * n - m < f for f, n, m in zip(factors, (4, 6), size, strict=True))
    rows, columns = (
        [p // f if repeated else int((p + 0.5) * n / m) for p in range(m)]
        for f, n, m in zip(factors, (4, 6), size, strict=True)
    )
    expected = np.asarray(x)[:, rows][:, :, columns]
    np.testing.assert_array_equal(resize_nearest(x, size), expected)
