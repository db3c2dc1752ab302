"""Attention of `layers.cpu` against `jax.nn.dot_product_attention`: values and gradients."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.layers.cpu.attention import MIN_HEAD_SIZE, MIN_TABLE_SIZE, attend


def draw_normal(*shape, seed=0):
    """Returns standard normal numbers as Float32[shape]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(function, cotangent, *arrays):
    """Returns a function's value, and its gradients for the cotangent of the value."""
    return jax.jit(lambda *a: (function(*a), jax.vjp(function, *a)[1](cotangent)))(*arrays)


@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize(("count", "batch"), [(8, 2), (110, 4), (110, 3)])
def test_values_and_gradients_equal_those_of_the_plain_implementation(count, batch, use_mask):
    # Small tables use the plain implementation, so the counts have to cover both.
    assert 4 * 8 * 8 < MIN_TABLE_SIZE < 4 * 110 * 110
    query, key, value, cotangent = (draw_normal(batch, count, 4, 8, seed=n) for n in range(4))
    mask = None
    if use_mask:
        mask = jnp.asarray(np.random.default_rng(9).random((batch, 1, count, count)) < 0.6)
        mask = mask.at[0, 0, 3].set(False)  # query 3 may attend to no key

    def plain(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    actual = value_and_gradients(partial(attend, mask=mask), cotangent, query, key, value)
    expected = value_and_gradients(plain, cotangent, query, key, value)
    chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask_heads", [0, 1, 3])
def test_heads_with_large_tables_are_computed_one_by_one(mask_heads):
    query, cotangent = (draw_normal(2, 900, 3, 4, seed=n) for n in range(2))
    key, value = (draw_normal(2, 600, 3, 4, seed=n) for n in range(2, 4))
    assert MIN_HEAD_SIZE <= 900 * 600
    mask = None
    if mask_heads:
        random = np.random.default_rng(9).random((2, mask_heads, 900, 600))
        mask = jnp.asarray(random < 0.6).at[0, 0, 3].set(False)
    plain = partial(jax.nn.dot_product_attention, mask=mask)
    actual = value_and_gradients(partial(attend, mask=mask), cotangent, query, key, value)
    expected = value_and_gradients(plain, cotangent, query, key, value)
    chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_a_mask_of_fewer_axes_is_broadcast():
    query, key, value, cotangent = (draw_normal(2, 110, 4, 8, seed=n) for n in range(4))
    mask = jnp.tril(jnp.ones((110, 110), bool))  # causal, as in the report decoder
    actual = value_and_gradients(partial(attend, mask=mask), cotangent, query, key, value)
    plain = partial(jax.nn.dot_product_attention, mask=mask[None, None])
    expected = value_and_gradients(plain, cotangent, query, key, value)
    chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_fewer_keys_than_queries_under_checkpoint_and_vmap(batch):
    query, cotangent = (draw_normal(2, batch, 140, 4, 8, seed=n) for n in range(2))
    key, value = (draw_normal(2, batch, 75, 4, 8, seed=n) for n in range(2, 4))
    assert MIN_TABLE_SIZE < 4 * 140 * 75
    arrays = cotangent, query, key, value
    actual = value_and_gradients(jax.vmap(jax.checkpoint(attend)), *arrays)
    expected = value_and_gradients(jax.vmap(jax.nn.dot_product_attention), *arrays)
    chex.assert_trees_all_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_rounding_in_bfloat16_is_similar_to_that_of_the_plain_implementation():
    wide_inputs = [draw_normal(2, 110, 4, 24, seed=n) for n in range(4)]
    wide_inputs = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in wide_inputs]
    mask = jnp.asarray(np.random.default_rng(9).random((2, 1, 110, 110)) < 0.6)
    plain = partial(jax.nn.dot_product_attention, mask=mask)
    exact = value_and_gradients(plain, wide_inputs[3], *wide_inputs[:3])
    errors = []
    for function in (partial(attend, mask=mask), plain):
        narrow_inputs = [x.astype(jnp.bfloat16) for x in wide_inputs]
        rounded = value_and_gradients(function, narrow_inputs[3], *narrow_inputs[:3])
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(rounded))
        pairs = zip(*map(jax.tree.leaves, (rounded, exact)), strict=True)
        errors.append([float(jnp.abs(a - b).mean()) for a, b in pairs])
    for kernel_error, plain_error in zip(*errors, strict=True):
        assert 0 < kernel_error < 1.5 * plain_error


def exact_attention(query, key, value, cotangent):
    """Returns the value and the gradients of attention by their formulas, in float64."""
    q, k, v, g = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (query, key, value, cotangent))
    scale = q.shape[-1] ** -0.5
    logits = scale * q @ k.swapaxes(2, 3)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    gradients = g @ v.swapaxes(2, 3)
    gradients = scale * weights * (gradients - (weights * gradients).sum(-1, keepdims=True))
    results = weights @ v, gradients @ k, gradients.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ g
    return [x.swapaxes(1, 2) for x in results]


@pytest.mark.parametrize(("scale_of_logits", "mean"), [(3.0, 0.0), (1.0, 10.0), (0.1, 3.0)])
def test_recomputed_weights_are_as_accurate_as_the_plain_implementation(scale_of_logits, mean):
    """Values far from 0 have gradients that cancel, so errors of recomputed weights would show."""
    query, key = (scale_of_logits * draw_normal(2, 110, 4, 24, seed=n) + 0.5 for n in range(2))
    value, cotangent = (
        0.1 * draw_normal(2, 110, 4, 24, seed=2) + mean,
        draw_normal(2, 110, 4, 24, seed=3) + 1,
    )
    exact = exact_attention(query, key, value, cotangent)
    errors = []
    for function in (attend, jax.nn.dot_product_attention):
        output, gradients = value_and_gradients(function, cotangent, query, key, value)
        errors.append(
            [
                np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
                for a, b in zip((output, *gradients), exact, strict=True)
            ]
        )
    for kernel_error, plain_error in zip(*errors, strict=True):
        assert kernel_error < 3 * plain_error + 1e-6, errors
