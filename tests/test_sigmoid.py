"""The sigmoid loss against the literal formula, on one and on eight devices, and its memory."""

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
# The weight of the global contrast in the metric of each method's loss is 1.
SMALL_HYPERS = {
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8},
    "mgca": {"num_prototypes": 4, "tile_size": 2},
    "place": {"num_queries": 3},
    "plan": {"num_sampled_words": 3, "rounds": 0, "tile_size": 2},
}


def draw_sides(pairs, dim=6):
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


def compile_on(devices, pairs, dim=6):
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


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("tile", [1, 3, 256])
def test_loss_and_gradients_are_the_literal_formula(devices, tile, monkeypatch):
    monkeypatch.setattr(contrastive, "SIGMOID_TILE", tile)
    pairs = 16
    sides = draw_sides(pairs)
    expected = jax.value_and_grad(literal_sigmoid_loss, (0, 1, 2))(*sides, PARAMS)
    value, gradients = compile_on(devices, pairs)(*sides, PARAMS)
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


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_use_it_and_learns_its_scale_and_bias(name):
    method = METHODS[name]
    hyper = method.Hyper(**SMALL_HYPERS.get(name, {}), contrast="sigmoid")
    params, memory = method.init(jax.random.key(0), features.make_context(), hyper)
    np.testing.assert_allclose(params["log_scale"], np.log(10), rtol=1e-6)
    np.testing.assert_allclose(params["bias"], -10)
    softmax_params, _ = method.init(
        jax.random.key(0), features.make_context(), method.Hyper(**SMALL_HYPERS.get(name, {}))
    )
    assert "bias" not in softmax_params
    params |= PARAMS
    images, texts = features.draw_features()

    def compute_loss(params):
        return method.loss(
            params,
            memory,
            images,
            texts,
            features.draw_extra(texts),
            key=jax.random.key(1),
            step=jnp.array(9),
            hyper=hyper,
        )

    (_, (metrics, _)), gradients = jax.jit(jax.value_and_grad(compute_loss, has_aux=True))(params)
    expected = literal_sigmoid_loss(images.pooled, texts.pooled, PARAMS)
    np.testing.assert_allclose(metrics["loss_global"], expected, rtol=1e-5)
    assert abs(gradients["log_scale"]) > 1e-4 and abs(gradients["bias"]) > 1e-4


@pytest.mark.parametrize("name", ["place", "plan"])
def test_similarity_weighs_the_cosine_by_the_learned_scale(name):
    method = METHODS[name]
    hyper = method.Hyper(**SMALL_HYPERS[name], contrast="sigmoid")
    params, memory = method.init(jax.random.key(0), features.make_context(), hyper)
    tables = method.similarity(params | PARAMS, memory, *features.draw_features(), hyper)
    expected = 5.0 * tables["global"] + tables["local"] / hyper.tau_local
    np.testing.assert_allclose(tables["both"], expected, rtol=1e-5, atol=1e-5)
