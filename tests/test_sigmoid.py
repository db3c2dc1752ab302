"""The sigmoid loss against the literal formula, on one and on eight devices, and its memory."""

import functools

import chex
import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from plan_jax import parallel
from plan_jax.methods import METHODS, contrastive

PARAMS = {"log_scale": jnp.log(5.0), "bias": jnp.array(-1.5)}
SHARDED, REPLICATED = PartitionSpec(parallel.AXIS), PartitionSpec()
PAIRS, KEY = 16, jax.random.key(0)
SMALL_HYPERS = {
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8},
    "mgca": {"num_prototypes": 4, "tile_size": 2},
    "place": {"num_queries": 3},
    "plan": {"num_sampled_words": 3, "rounds": 0, "tile_size": 2},
}


def draw_sides(pairs, dim=8):
    """Returns features of images and texts, not of unit length."""
    rng = np.random.default_rng(2)
    return tuple(jnp.asarray(rng.normal(size=(pairs, dim)), jnp.float32) for _ in range(2))


def literal_sigmoid_loss(images, texts, params):
    """Computes the formula of section 3.1 pair by pair; sums of numbers, so that it has gradients.

    It shares nothing with the loss under test but jax.numpy.
    """
    x, y = (side / jnp.linalg.norm(side, axis=1, keepdims=True) for side in (images, texts))
    scale, value = jnp.exp(params["log_scale"]), 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            z = 1 if i == j else -1
            value += jnp.log(1 + jnp.exp(-z * (scale * jnp.dot(x[i], y[j]) + params["bias"])))
    return value / len(x)


@functools.cache
def literal_gradients():
    """Returns value and gradients of the literal formula for `draw_sides(PAIRS)` and PARAMS."""
    return jax.value_and_grad(literal_sigmoid_loss, (0, 1, 2))(*draw_sides(PAIRS), PARAMS)


def compile_on(devices, pairs, dim=8):
    """Returns the compiled loss and gradients (images, texts, parameters) on several devices."""

    def compute(images, texts, params):
        gradient = jax.value_and_grad(contrastive.sigmoid_loss, (0, 1, 2))
        if devices == 1:
            return gradient(images, texts, params)
        value, (*sides, params) = gradient(images, texts, params, parallel.AXIS)
        sides = [side / devices for side in sides]  # of the losses of all devices
        return value[None], (*sides, parallel.mean(params))

    if devices > 1:
        compute = jax.shard_map(
            compute,
            mesh=parallel.make_mesh(devices),
            in_specs=(SHARDED, SHARDED, REPLICATED),
            out_specs=(SHARDED, (SHARDED, SHARDED, REPLICATED)),
            check_vma=False,
        )
    return jax.jit(compute).lower(*draw_sides(pairs, dim), PARAMS).compile()


@pytest.mark.parametrize(("devices", "tile"), [(1, 1), (1, 3), (1, 256), (8, 1), (8, 256)])
def test_loss_and_gradients_are_the_literal_formula(devices, tile, monkeypatch):
    monkeypatch.setattr(contrastive, "SIGMOID_TILE", tile)
    expected = literal_gradients()
    value, gradients = compile_on(devices, PAIRS)(*draw_sides(PAIRS), PARAMS)
    np.testing.assert_allclose(value, np.full_like(value, expected[0]), rtol=1e-5)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)) > 1e-3
    chex.assert_trees_all_close(gradients, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("devices", "share"), [(1, 1 / 4), (8, 1 / 8)])
def test_no_table_of_all_pairs_exists(devices, share):
    pairs, dim = 4096, 128  # the unit vectors and their gradients take most of the memory
    compiled = compile_on(devices, pairs, dim)
    table = pairs * pairs * 4  # bytes
    assert compiled.memory_analysis().temp_size_in_bytes < share * table
    text = compiled.as_text()
    assert "all-gather" not in text
    assert ("collective-permute" in text) == (devices > 1)


def draw_parameters(method, hyper):
    """Returns random parameters and memory of a method's shapes; drawing them by `init` is slow."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: method.init(key, features.make_context(), hyper), KEY)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_starts_from_the_scale_and_bias_of_the_paper(name):
    method, hypers = METHODS[name], SMALL_HYPERS.get(name, {})

    def init(contrast):
        hyper = method.Hyper(**hypers, contrast=contrast)
        params, _ = method.init(KEY, features.make_context(), hyper)
        # Without the other parameters, whose drawing the compiler then drops.
        return {key: params[key] for key in PARAMS if key in params}

    params = jax.jit(init, static_argnums=0)("sigmoid")
    np.testing.assert_allclose(params["log_scale"], np.log(10), rtol=1e-6)
    np.testing.assert_allclose(params["bias"], -10)
    assert "bias" not in jax.eval_shape(lambda: init("softmax"))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_compares_all_pairs_and_learns_scale_and_bias(name):
    method = METHODS[name]
    hyper = method.Hyper(**SMALL_HYPERS.get(name, {}), contrast="sigmoid")
    params, memory = draw_parameters(method, hyper)
    images, texts = features.draw_features(PAIRS)
    pooled = draw_sides(PAIRS)
    sides = images.replace(pooled=pooled[0]), texts.replace(pooled=pooled[1])

    def compute(sides, extra):
        def loss(learned):
            return method.loss(
                params | learned,
                memory,
                *sides,
                extra,
                key=jax.random.key(1),
                step=jnp.array(9),
                hyper=hyper,
                axis=parallel.AXIS,
            )

        # No other part of the loss is returned, so that the compiler drops all of them.
        gradients, (metrics, _) = jax.grad(loss, has_aux=True)(PARAMS)
        return metrics["loss_global"], parallel.mean(gradients)

    mapped = jax.shard_map(
        compute,
        mesh=parallel.make_mesh(8),
        in_specs=(SHARDED, SHARDED),
        out_specs=REPLICATED,
        check_vma=False,
    )
    value, gradients = jax.jit(mapped)(sides, features.draw_extra(texts))
    expected, (_, _, expected_gradients) = literal_gradients()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    weight = getattr(hyper, "weight_global", 1.0)
    expected_gradients = jax.tree.map(lambda x: weight * x, expected_gradients)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-5)


@pytest.mark.parametrize("name", ["place", "plan"])
def test_similarity_weighs_the_cosine_by_the_learned_scale(name):
    method = METHODS[name]
    hyper = method.Hyper(**SMALL_HYPERS[name], contrast="sigmoid")
    params, memory = draw_parameters(method, hyper)
    similarity = jax.jit(functools.partial(method.similarity, hyper=hyper))
    tables = similarity(params | PARAMS, memory, *features.draw_features())
    expected = 5.0 * tables["global"] + tables["local"] / hyper.tau_local
    np.testing.assert_allclose(tables["both"], expected, rtol=1e-5, atol=1e-5)
