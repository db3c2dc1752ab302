"""BatchNorm against its formula: masks, running statistics, several devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from plan_jax.layers.batch_norm import BatchNorm, batch_statistics

KEY = jax.random.key(0)


def draw_inputs(batch=8):
    """Returns random maps, scale and bias, and a mask of positions."""
    keys = jax.random.split(KEY, 4)
    x = 3.0 + 2.0 * jax.random.normal(keys[0], (batch, 3, 4, 6))
    params = {
        "scale": 1 + jax.random.normal(keys[1], (6,)),
        "bias": jax.random.normal(keys[2], (6,)),
    }
    return x, params, jax.random.bernoulli(keys[3], 0.6, x.shape[:-1])


def normalise(x, params, mask=None, axis=None):
    """Returns the output of BatchNorm in training mode."""
    stats = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
    variables = {"params": params, "batch_stats": stats}
    return BatchNorm(axis).apply(variables, x, True, mask, mutable=["batch_stats"])[0]


def literal_batch_norm(x, params, mask):
    """Computes BatchNorm in training mode by its formula, in two passes."""
    weights = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
    axes, weights = tuple(range(x.ndim - 1)), weights[..., None]
    mean = (x * weights).sum(axes) / weights.sum()
    var = ((x - mean) ** 2 * weights).sum(axes) / weights.sum()
    return (x - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def assert_close(actual, expected, tolerance):
    """Compares trees; the tolerance is relative to the largest entry of each leaf."""
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max() + 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_the_formula(masked):
    x, params, mask = draw_inputs()
    mask = mask if masked else None
    weight = jax.random.normal(jax.random.key(1), x.shape)

    def results(function):
        def total(x, params):
            y = function(x, params, mask)
            return (y * weight).sum(), y

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(x, params)

    assert_close(results(normalise), results(literal_batch_norm), 1e-5)


def test_statistics_are_those_of_the_unmasked_positions():
    x, params, mask = draw_inputs()
    statistics = batch_statistics(x, mask)
    positions = np.asarray(x)[np.asarray(mask)]
    assert statistics.num_positions == len(positions)
    np.testing.assert_allclose(statistics.mean, positions.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.var, positions.var(0), rtol=1e-5)
    narrow = x.astype(jnp.bfloat16)
    assert normalise(narrow, params).dtype == jnp.bfloat16
    assert batch_statistics(narrow).var.dtype == jnp.float32
    empty = batch_statistics(x, jnp.zeros_like(mask))
    assert empty.num_positions == 1 and not empty.var.any()
    chex.assert_tree_all_finite(normalise(x, params, jnp.zeros_like(mask)))


def test_running_statistics_are_those_of_torch():
    """They have momentum 0.1 and the unbiased variance, and normalise in evaluation."""
    x, mask = jax.random.normal(KEY, (4, 5, 2)), jax.random.bernoulli(KEY, 0.6, (4, 5))
    norm = BatchNorm(None)
    variables = norm.init(KEY, x, True)
    y, updated = norm.apply(variables, x, True, mask, mutable=["batch_stats"])
    positions = np.asarray(x)[np.asarray(mask)]
    expected = (x - positions.mean(0)) / np.sqrt(positions.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    mean, var = (updated["batch_stats"][name] for name in ("mean", "var"))
    np.testing.assert_allclose(mean, 0.1 * positions.mean(0), rtol=1e-4)
    np.testing.assert_allclose(var, 0.9 + 0.1 * positions.var(0, ddof=1), rtol=1e-4)
    y = norm.apply({**variables, **updated}, x, False)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["shard_map", "pmap"])
@pytest.mark.parametrize("masked", [False, True])
def test_eight_devices_equal_one(implementation, masked):
    """Devices have different numbers of positions; the gradients of parameters are summed."""
    x, params, mask = draw_inputs(16)
    mask = mask if masked else jnp.ones_like(mask)
    weight = jax.random.normal(jax.random.key(3), x.shape)

    def gradients(x, mask, weight, axis=None):
        def loss(x, params):
            return (jnp.sin(normalise(x, params, mask, axis)) * weight).sum()

        x_grad, params_grad = jax.grad(loss, (0, 1))(x, params)
        return x_grad, params_grad if axis is None else lax.psum(params_grad, axis)

    arrays = x, mask, weight
    expected = jax.jit(gradients)(*arrays)
    if implementation == "pmap":
        shards = [a.reshape(8, 2, *a.shape[1:]) for a in arrays]
        x_grad, params_grad = jax.pmap(lambda *a: gradients(*a, "d"), "d")(*shards)
        actual = x_grad.reshape(x.shape), jax.tree.map(lambda a: a[0], params_grad)
    else:
        mesh, batch = Mesh(np.array(jax.devices()), "d"), PartitionSpec("d")
        sharded = jax.shard_map(
            lambda *a: gradients(*a, "d"),
            mesh=mesh,
            in_specs=batch,
            out_specs=(batch, PartitionSpec()),
            check_vma=False,
        )
        actual = jax.jit(sharded)(*arrays)
    assert_close(actual, expected, 2e-5)
