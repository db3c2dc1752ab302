"""Products and LayerNorm of `layers.cpu` against XLA's: values and gradients."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from plan_jax.layers.cpu import use_xla_only
from plan_jax.layers.cpu.layer_norm import normalise
from plan_jax.layers.cpu.product import multiply
from plan_jax.layers.transformer import LayerNorm

LAST_AXIS = (((2,), (0,)), ((), ()))


def draw_normal(*shape, seed=0, dtype=jnp.float32):
    """Returns standard normal numbers of the given shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def value_and_gradients(function, cotangent, *arrays):
    """Returns a function's value, and its gradients for the cotangent of the value."""
    return jax.jit(lambda *a: (function(*a), jax.vjp(function, *a)[1](cotangent)))(*arrays)


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.04)])
def test_products_are_those_of_xla(dtype, limit):
    arrays = draw_normal(3, 7, 5, dtype=dtype), draw_normal(5, 11, seed=1, dtype=dtype)
    cotangent = draw_normal(3, 7, 11, seed=2, dtype=dtype)
    actual = value_and_gradients(multiply, cotangent, *arrays)
    plain = partial(lax.dot_general, dimension_numbers=LAST_AXIS)
    expected = value_and_gradients(plain, cotangent, *arrays)
    chex.assert_trees_all_equal_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=limit, atol=limit * 5)


def test_a_kernels_gradient_has_no_transposed_copy():
    """XLA transposes the cotangent in memory for its own gradient of a product [B N C] [C E]."""
    x, kernel, cotangent = draw_normal(3, 7, 5), draw_normal(5, 11), draw_normal(3, 7, 11)

    def compile_gradient(function):
        def gradient(x, kernel, cotangent):
            return jax.vjp(partial(function, x), kernel)[1](cotangent)

        return jax.jit(gradient).lower(x, kernel, cotangent).compile().as_text()

    assert "[11,21]" not in compile_gradient(multiply)  # channels of the cotangent before its rows


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_layer_norm_is_flaxs(mean):
    x = mean + draw_normal(2, 5, 12)
    scale, bias, cotangent = (draw_normal(*shape) for shape in ((12,), (12,), (2, 5, 12)))

    def plain(x, scale, bias):
        return nn.LayerNorm(1e-5).apply({"params": {"scale": scale, "bias": bias}}, x)

    actual = value_and_gradients(partial(normalise, epsilon=1e-5), cotangent, x, scale, bias)
    expected = value_and_gradients(plain, cotangent, x, scale, bias)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    names = [
        jax.tree.structure(norm.init(jax.random.key(0), x))
        for norm in (LayerNorm(), nn.LayerNorm())
    ]
    assert names[0] == names[1]


def test_layer_norm_of_equal_channels_is_its_bias():
    x, scale, bias = jnp.full((2, 6), 4.0), jnp.ones(6), jnp.arange(6.0)
    value, grads = value_and_gradients(
        partial(normalise, epsilon=1e-6), jnp.ones((2, 6)), x, scale, bias
    )
    np.testing.assert_allclose(value, np.tile(bias, (2, 1)), atol=1e-6)
    chex.assert_tree_all_finite(grads)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.vmap])
def test_kernels_under_checkpoint_and_vmap(wrap):
    x, kernel = draw_normal(2, 3, 7, 5), draw_normal(5, 5, seed=1)
    scale = jnp.ones(5)

    def layer(x):
        y = normalise(x, scale, scale, 1e-6)
        return jnp.tanh(multiply(y, kernel))

    actual = jax.jit(jax.grad(lambda x: (wrap(layer)(x) ** 2).sum()))(x)
    with use_xla_only():
        expected = jax.jit(jax.grad(lambda x: (layer(x) ** 2).sum()))(x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
