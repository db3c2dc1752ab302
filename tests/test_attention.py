"""Attention, GELU, Dense and LayerNorm with gradients of their own, against the plain ones."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from plan_jax.layers.cpu.attention import LARGE, attend
from plan_jax.layers.cpu.gelu import gelu
from plan_jax.layers.cpu.normalisation import layer_norm
from plan_jax.layers.transformer import Dense


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(function, given, *arrays):
    return jax.jit(lambda *a: (function(*a), jax.vjp(function, *a)[1](given)))(*arrays)


def check(one, other, most):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=most, rtol=most)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("count", "batch"), [(8, 2), (110, 4), (110, 3)])
def test_attention_is_the_plain_one(count, batch, masked):
    assert 4 * 8 * 8 < LARGE < 4 * 110 * 110  # so both ways are taken
    q, k, v, given = (drawn(batch, count, 4, 8, seed=n) for n in range(4))
    mask = None
    if masked:
        mask = jnp.asarray(np.random.default_rng(9).random((batch, 1, count, count)) < 0.6)
        mask = mask.at[0, 0, 3].set(False)  # a query that may look at nothing

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    own = value_and_gradients(lambda q, k, v: attend(q, k, v, mask), given, q, k, v)
    check(own, value_and_gradients(plain, given, q, k, v), 1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_to_fewer_keys_than_queries_under_checkpoint_and_vmap(batch):
    q, given = (drawn(2, batch, 140, 4, 8, seed=n) for n in range(2))
    k, v = (drawn(2, batch, 75, 4, 8, seed=n) for n in range(2, 4))
    assert LARGE < 4 * 140 * 75
    own = value_and_gradients(jax.vmap(jax.checkpoint(attend)), given, q, k, v)
    plain = value_and_gradients(jax.vmap(jax.nn.dot_product_attention), given, q, k, v)
    check(own, plain, 1e-5)


def test_attention_in_bfloat16_rounds_little_more_than_the_plain_one():
    wide = [drawn(2, 110, 4, 24, seed=n) for n in range(4)]
    wide = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in wide]
    mask = jnp.asarray(np.random.default_rng(9).random((2, 1, 110, 110)) < 0.6)
    plain = partial(jax.nn.dot_product_attention, mask=mask)
    true = value_and_gradients(plain, wide[3], *wide[:3])
    errors = []
    for function in (partial(attend, mask=mask), plain):
        narrow = [x.astype(jnp.bfloat16) for x in wide]
        made = value_and_gradients(function, narrow[3], *narrow[:3])
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(made))
        pairs = zip(*map(jax.tree.leaves, (made, true)), strict=True)
        errors.append([float(jnp.abs(a - b).mean()) for a, b in pairs])
    for own, others in zip(*errors, strict=True):
        assert 0 < own < 1.5 * others


def test_gelu_is_the_exact_one():
    x, given = drawn(5, 300) * 3, drawn(5, 300, seed=1)
    own = value_and_gradients(gelu, given, x)
    plain = value_and_gradients(lambda x: nn.gelu(x, approximate=False), given, x)
    check(own, plain, 2e-6)


def test_gelu_and_its_slope_are_right_everywhere():
    x = np.concatenate([np.linspace(-8, 8, 4001), [-1e4, -90.0, 90.0, 1e4]]).astype(np.float32)
    below = np.array([0.5 * math.erfc(-float(value) / math.sqrt(2)) for value in x])
    density = np.exp(-0.5 * x.astype(float) ** 2) / math.sqrt(2 * math.pi)
    value, (slope,) = value_and_gradients(gelu, jnp.ones_like(x), jnp.asarray(x))
    np.testing.assert_allclose(value, x * below, rtol=3e-7, atol=1e-6)
    np.testing.assert_allclose(slope, below + x * density, atol=5e-7)
    narrow = value_and_gradients(gelu, *[jnp.asarray(x, jnp.bfloat16)] * 2)
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(narrow))


def test_dense_is_flax_s():
    x, given = drawn(3, 5, 8), drawn(3, 5, 12, seed=1)
    params = nn.Dense(12).init(jax.random.key(0), x)
    for one, other in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(Dense(12, parts=3).init(jax.random.key(0), x)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    params["params"]["bias"] = drawn(12, seed=2)
    plain = value_and_gradients(lambda p, x: nn.Dense(12).apply(p, x), given, params, x)
    check(value_and_gradients(lambda p, x: Dense(12).apply(p, x), given, params, x), plain, 1e-5)

    def joined(p, x):
        return jnp.concatenate(Dense(12, parts=3).apply(p, x), -1)

    check(value_and_gradients(joined, given, params, x), plain, 1e-5)


def test_layer_norm_is_flax_s():
    x, given = drawn(3, 7, 40) * 2 + 1, drawn(3, 7, 40, seed=1)
    scale, bias = drawn(40, seed=2), drawn(40, seed=3)

    def plain(x, scale, bias):
        return nn.LayerNorm(1e-6).apply({"params": {"scale": scale, "bias": bias}}, x)

    own = value_and_gradients(lambda *a: layer_norm(*a, 1e-6), given, x, scale, bias)
    check(own, value_and_gradients(plain, given, x, scale, bias), 1e-5)
