"""The convolution of `layers.cpu` against XLA's: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from plan_jax.layers.cpu import winograd
from plan_jax.layers.cpu.convolution import conv2d

KEY = jax.random.key(0)
# rows, columns, channels in and out, kernel size, stride, padding, dilation
SHAPES = [
    (16, 16, 3, 8, 7, 2, 3, 1),
    (17, 15, 3, 8, 7, 2, 3, 1),
    (16, 18, 1, 8, 7, 2, 3, 1),  # stems
    (8, 8, 4, 16, 1, 1, 0, 1),
    (8, 8, 16, 4, 1, 1, 0, 1),
    (9, 8, 4, 6, 1, 2, 0, 1),
    (8, 8, 9, 10, 3, 1, 1, 1),
    (7, 7, 33, 40, 3, 1, 1, 1),
    (8, 5, 32, 32, 3, 1, 1, 1),
    (1, 1, 32, 32, 3, 1, 1, 1),
    (2, 3, 40, 32, 3, 1, 1, 1),  # Winograd
    (8, 8, 9, 12, 3, 2, 1, 1),
    (9, 7, 32, 33, 3, 2, 1, 1),
    (1, 2, 9, 8, 3, 2, 1, 1),
    (9, 9, 5, 6, 3, 1, 2, 2),
    (7, 8, 32, 32, 3, 1, 2, 2),
    (9, 9, 5, 6, 3, 2, 2, 2),
    (8, 12, 3, 10, 4, 4, 0, 1),
    (9, 11, 3, 10, 4, 4, 0, 1),  # patches
    (9, 9, 9, 6, 3, 1, 0, 1),
    (9, 10, 9, 6, 5, 2, 3, 1),
    (11, 10, 9, 6, 3, 3, 1, 1),
    (9, 8, 5, 6, 1, 1, 1, 1),
    (9, 9, 9, 6, 3, 4, 1, 1),
    (6, 6, 9, 6, 3, 1, 4, 1),
]


def plain_conv(x, kernel, stride, padding, dilation):
    """Computes the convolution by XLA's own operation."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * 2,
        [(padding, padding)] * 2,
        rhs_dilation=(dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def draw_inputs(shape, dtype=jnp.float32):
    """Returns random maps and a random kernel of one of `SHAPES`."""
    rows, columns, channels, features, size = shape[:5]
    x = jax.random.normal(KEY, (2, rows, columns, channels), dtype)
    return x, jax.random.normal(jax.random.key(1), (size, size, channels, features), dtype)


def value_and_gradients(function, *inputs):
    """Returns the value of a function, and the gradients of a randomly weighted sum of it."""
    shape = jax.eval_shape(function, *inputs).shape
    weight = np.random.default_rng(0).normal(size=shape)

    @jax.jit
    def run(*inputs):
        value, pullback = jax.vjp(function, *inputs)
        return value, *pullback(jnp.asarray(weight, value.dtype))

    return run(*inputs)


def assert_close(actual, expected, tolerance):
    """Compares arrays; the tolerance is relative to the largest entry."""
    for a, b in zip(actual, expected, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max() + 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_xla(shape):
    inputs, geometry = draw_inputs(shape), shape[5:]
    expected = value_and_gradients(lambda x, k: plain_conv(x, k, *geometry), *inputs)
    actual = value_and_gradients(lambda x, k: conv2d(x, k, *geometry), *inputs)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize(
    "shape", [SHAPES[0], SHAPES[3], SHAPES[8], SHAPES[11], SHAPES[17]], ids=str
)
def test_bfloat16_stays_bfloat16_and_is_close(shape):
    inputs, geometry = draw_inputs(shape, jnp.bfloat16), shape[5:]
    wide_inputs = [x.astype(jnp.float32) for x in inputs]
    expected = value_and_gradients(lambda x, k: plain_conv(x, k, *geometry), *wide_inputs)
    actual = value_and_gradients(lambda x, k: conv2d(x, k, *geometry), *inputs)
    assert {x.dtype for x in actual} == {jnp.dtype(jnp.bfloat16)}
    assert_close(actual, expected, 0.02)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[8], SHAPES[11]], ids=str)
def test_vmap_and_checkpoint_change_no_gradient(shape):
    x, kernel = draw_inputs(shape)

    def loss(x, kernel):
        return (conv2d(x, kernel, *shape[5:]) ** 2).sum()

    expected = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
    mapped = jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1)), (0, None))
    actual = jax.jit(mapped)(jnp.stack([x, 2 * x]), kernel)
    assert_close([leaf[0] for leaf in actual], expected, 1e-5)


def test_gradients_of_winograd_equal_automatic_differentiation():
    """The map is not a multiple of the tile, so some tiles overlap its edge."""
    x, kernel = draw_inputs((7, 6, 5, 4, 3))
    cotangent = jax.random.normal(KEY, (2, 7, 6, 4))
    pullback = jax.jit(lambda *inputs: jax.vjp(winograd.convolve, *inputs)[1](cotangent))
    actual = jax.jit(winograd.gradients)(x, kernel, cotangent)
    assert_close(actual, pullback(x, kernel), 1e-5)
