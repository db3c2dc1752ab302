"""The transformer layer: its options against formulas, its cache, and dropout."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from plan_jax.layers.transformer import (
    Attention,
    TransformerLayer,
    attention_weights,
    dropout,
    exact_gelu,
    fold_in,
    swiglu,
)

KEY = jax.random.key(0)


def draw_normal(*shape, seed=0):
    """Returns standard normal numbers as Float32[shape]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_gelu_and_its_derivative_are_exact_over_the_whole_range():
    x = np.concatenate([np.linspace(-8, 8, 4001), [-1e4, -90.0, 90.0, 1e4]]).astype(np.float32)
    cumulative = np.array([0.5 * math.erfc(-float(value) / math.sqrt(2)) for value in x])
    density = np.exp(-0.5 * x.astype(float) ** 2) / math.sqrt(2 * math.pi)
    value, pullback = jax.vjp(exact_gelu, jnp.asarray(x))
    (derivative,) = pullback(jnp.ones_like(x))
    np.testing.assert_allclose(value, x * cumulative, rtol=3e-7, atol=1e-6)
    np.testing.assert_allclose(derivative, cumulative + x * density, atol=5e-7)
    narrow = jnp.asarray(x, jnp.bfloat16)
    assert exact_gelu(narrow).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        exact_gelu(narrow).astype(jnp.float32),
        exact_gelu(narrow.astype(jnp.float32)),
        rtol=2**-8,
    )


@pytest.mark.parametrize(
    ("pre_norm", "activation", "layer_scale"),
    [(False, nn.relu, 0.0), (True, nn.relu, 0.0), (False, nn.relu, 0.5), (True, swiglu, 0.5)],
)
def test_the_layer_is_its_formula(pre_norm, activation, layer_scale):
    """Compares with attention and MLP in numpy, with the norms of pre-norm and of post-norm."""
    options = {"pre_norm": pre_norm, "activation": activation, "layer_scale": layer_scale}
    layer = TransformerLayer(6, 2, 8, **options, epsilon=1e-5)
    x = draw_normal(3, 5, 6)
    params = jax.tree.map(lambda a: a + 0.3 * draw_normal(*a.shape), layer.init(KEY, x)["params"])
    arrays = jax.tree.map(np.asarray, params)
    mask = np.random.default_rng(1).random((3, 1, 5, 5)) < 0.7
    mask[:, :, np.arange(5), np.arange(5)] = True

    def dense(x, name):
        return x @ name["kernel"] + name["bias"]

    def norm(x, name):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * name["scale"] + name["bias"]

    def attention(x):
        query, key, value = (
            dense(x, arrays["attention"][name]).reshape(3, 5, 2, 3)
            for name in ("query", "key", "value")
        )
        logits = np.einsum("bnhc,bmhc->bhnm", query, key) / math.sqrt(3)
        weights = np.where(mask, np.exp(logits), 0)
        weights /= weights.sum(-1, keepdims=True)
        values = np.einsum("bhnm,bmhc->bnhc", weights, value).reshape(3, 5, 6)
        return dense(values, arrays["attention"]["out"])

    def mlp(x):
        x = dense(x, arrays["fc1"])
        if activation is swiglu:
            x = x[..., :4] / (1 + np.exp(-x[..., :4])) * x[..., 4:]
        return dense(np.maximum(x, 0) if activation is nn.relu else x, arrays["fc2"])

    def scale(x, name):
        """Scales each channel of each token by its factor."""
        if not layer_scale:
            return x
        for b, n, e in np.ndindex(x.shape):
            x[b, n, e] = x[b, n, e] * arrays[name][e]
        return x

    assert ("scale1" in arrays) == ("scale2" in arrays) == bool(layer_scale)
    expected = np.asarray(x)
    if pre_norm:
        expected = expected + scale(attention(norm(expected, arrays["norm1"])), "scale1")
        expected = expected + scale(mlp(norm(expected, arrays["norm2"])), "scale2")
    else:
        expected = norm(expected + scale(attention(expected), "scale1"), arrays["norm1"])
        expected = norm(expected + scale(mlp(expected), "scale2"), arrays["norm2"])
    output = layer.apply({"params": params}, x, jnp.asarray(mask))
    np.testing.assert_allclose(output.x, expected, rtol=1e-4, atol=1e-5)
    projections = output.attention
    weights = attention_weights(projections.query, projections.key, jnp.asarray(mask))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert not np.asarray(weights)[np.broadcast_to(~mask, weights.shape)].any()


def test_decoding_with_a_cache_equals_the_causal_layer():
    layer = TransformerLayer(8, 2, 8, cross_attention=True)
    x, image = draw_normal(2, 4, 8), draw_normal(2, 3, 8, seed=1)

    def run(module, x, image, *args, **options):
        return module(x, *args, memory=module.project_memory(image), **options)

    causal = jnp.tril(jnp.ones((4, 4), bool))
    output, variables = layer.init_with_output(KEY, x, image, causal, method=run)
    cache = jax.tree.map(jnp.zeros_like, (output.attention.key, output.attention.value))
    for position in range(4):
        mask = (jnp.arange(4) <= position)[None]
        options = {"cache": type(layer.apply(variables, image, method="project_memory"))(*cache)}
        token = x[:, position : position + 1]
        step = layer.apply(variables, token, image, mask, position=position, method=run, **options)
        np.testing.assert_allclose(step.x[:, 0], output.x[:, position], rtol=1e-4, atol=1e-5)
        cache = step.attention.key, step.attention.value
    chex.assert_trees_all_close(cache, tuple(output.attention[1:]), atol=1e-5)


def test_rows_that_share_memory_are_those_of_repeated_memory():
    layer = TransformerLayer(8, 2, 8, cross_attention=True)
    x, image = draw_normal(6, 1, 8), draw_normal(2, 3, 8, seed=1)

    def run(module, x, image):
        return module(x, memory=module.project_memory(image)).x

    shared, variables = layer.init_with_output(KEY, x, image, method=run)
    repeated = layer.apply(variables, x, jnp.repeat(image, 3, 0), method=run)
    np.testing.assert_allclose(shared, repeated, atol=1e-6)


@pytest.mark.parametrize("rate", ["dropout", "hidden_dropout", "attention_dropout"])
def test_each_dropout_acts_only_with_a_key(rate):
    plain = TransformerLayer(8, 2, 8)
    noisy = TransformerLayer(8, 2, 8, **{rate: 0.5})
    x = draw_normal(2, 4, 8)
    variables = plain.init(KEY, x)
    expected = plain.apply(variables, x).x
    np.testing.assert_array_equal(noisy.apply(variables, x).x, expected)
    outputs = [noisy.apply(variables, x, None, jax.random.key(n)).x for n in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 0.01
    assert np.abs(outputs[0] - expected).max() > 0.01


def test_dropout_of_attention_differs_between_heads():
    """As in torch: heads that are equal without dropout differ with it."""
    width, heads = 8, 4
    module = Attention(width, heads, use_bias=False, dropout=0.5)
    x = draw_normal(2, 6, width)
    same_value = jnp.tile(draw_normal(width, width // heads), (1, heads))
    params = {name: {"kernel": jnp.zeros((width, width))} for name in ("query", "key")}
    params |= {"value": {"kernel": same_value}, "out": {"kernel": jnp.eye(width)}}
    variables = {"params": params}
    memory = module.apply(variables, x, method="project")
    plain, _ = module.apply(variables, x, memory)
    dropped, _ = module.apply(variables, x, memory, key=KEY)
    plain, dropped = (np.reshape(output, (2, 6, heads, -1)) for output in (plain, dropped))
    assert np.abs(plain - plain[:, :, :1]).max() < 1e-6
    for first in range(heads):
        for second in range(first):
            assert np.abs(dropped[:, :, first] - dropped[:, :, second]).max() > 0.1


def test_dropout_keeps_the_mean():
    output = dropout(jnp.ones((200, 200)), 0.25, KEY)
    assert set(np.unique(np.asarray(output).round(5))) == {0.0, np.float32(1 / 0.75).round(5)}
    assert float(output.mean()) == pytest.approx(1, abs=0.02)


def test_dropout_with_a_key_for_each_row_belongs_to_the_row():
    """In a layer with all rates, and in `dropout` itself."""
    rates = {name: 0.4 for name in ("dropout", "hidden_dropout", "attention_dropout")}
    layer = TransformerLayer(8, 2, 8, **rates)
    x = jnp.tile(draw_normal(1, 4, 8), (5, 1, 1))
    variables = layer.init(KEY, x)
    keys = fold_in(KEY, jnp.arange(5))
    output = layer.apply(variables, x, None, keys).x
    assert min(np.abs(output[n] - output[m]).max() for n in range(5) for m in range(n)) > 0.01
    rows = jnp.array([3, 1])
    part = layer.apply(variables, x[rows], None, keys[rows]).x
    np.testing.assert_allclose(part, output[rows], atol=1e-6)
    dropped = dropout(jnp.ones((5, 300)), 0.25, keys)
    for n in range(5):
        np.testing.assert_array_equal(dropped[n], dropout(jnp.ones(300), 0.25, keys[n]))
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)
