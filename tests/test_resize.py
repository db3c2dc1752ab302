"""Resizing of maps, against interpolation by numpy and by loops over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.layers.resize import (
    bicubic_matrix,
    double_align_corners,
    resize_align_corners,
    resize_bicubic,
    resize_nearest,
)


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


def keys_kernel(t, a):
    """Returns the kernel of Keys (1981) at a distance t from a sample."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def interpolate_line(values, count, antialias, offset=0.0):
    """Returns `count` samples of a line by loops over pixels, as torch's documentation has it."""
    size, result = len(values), []
    scale = size / (count + offset)
    for n in range(count):
        centre = (n + 0.5) * scale
        if antialias:
            width = max(scale, 1.0)
            weights = [keys_kernel((i + 0.5 - centre) / width, -0.5) for i in range(size)]
            total = sum(weights)
            result.append(sum(w * v for w, v in zip(weights, values, strict=True)) / total)
        else:
            first = int(np.floor(centre - 0.5)) - 1
            total = 0.0
            for i in range(first, first + 4):
                pixel = values[min(max(i, 0), size - 1)]
                total += keys_kernel(i + 0.5 - centre, -0.75) * pixel
            result.append(total)
    return np.array(result)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(3, 5), (9, 2), (6, 6)])
def test_bicubic_resizing_is_a_loop_over_pixels(size, antialias):
    x = np.random.default_rng(3).normal(size=(2, 6, 6, 3)).astype(np.float32)
    rows = np.apply_along_axis(interpolate_line, 1, x, size[0], antialias)
    expected = np.apply_along_axis(interpolate_line, 2, rows, size[1], antialias)
    actual = jax.jit(resize_bicubic, static_argnums=(1, 2))(x, size, antialias)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    if size == (6, 6):
        np.testing.assert_allclose(actual, x, atol=1e-6)


def test_the_offset_of_the_scale_moves_bicubic_samples():
    values = np.random.default_rng(4).normal(size=37)
    actual = bicubic_matrix(37, 16, offset=0.1) @ values
    np.testing.assert_allclose(actual, interpolate_line(values, 16, False, 0.1), atol=1e-9)
    assert np.abs(actual - bicubic_matrix(37, 16) @ values).max() > 1e-3
