"""Convolutions, pooling and BatchNorm: values and gradients are those of the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from plan_jax.layers.cpu import winograd
from plan_jax.layers.cpu.convolution import conv2d, max_pool
from plan_jax.layers.cpu.normalisation import batch_norm

KEY = jax.random.key(0)
# rows, columns, channels in and out, size, stride, pad, dilation
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


def plain(x, kernel, stride, pad, dilation):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * 2,
        [(pad, pad)] * 2,
        rhs_dilation=(dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def plain_pool(x, size, stride, pad):
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    places = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, places)


def draw(shape, dtype=jnp.float32):
    rows, columns, channels, out, size = shape[:5]
    x = jax.random.normal(KEY, (2, rows, columns, channels), dtype)
    return x, jax.random.normal(jax.random.key(1), (size, size, channels, out), dtype)


def results(function, *inputs):
    """The value of a function and the gradients of its weighted sum."""
    shape = jax.eval_shape(function, *inputs).shape
    weight = np.random.default_rng(0).normal(size=shape)

    @jax.jit
    def run(*inputs):
        value, back = jax.vjp(function, *inputs)
        return value, *back(jnp.asarray(weight, value.dtype))

    return run(*inputs)


def assert_close(got, want, share):
    """Compare, as a share of the largest entry."""
    got, want = (jax.tree.map(lambda x: np.asarray(x, np.float32), side) for side in (got, want))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(other).max() + 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_platforms_convolution(shape):
    inputs, settings = draw(shape), shape[5:]
    want = results(lambda x, k: plain(x, k, *settings), *inputs)
    got = results(lambda x, k: conv2d(x, k, *settings), *inputs)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    "shape", [SHAPES[0], SHAPES[3], SHAPES[8], SHAPES[11], SHAPES[17]], ids=str
)
def test_bfloat16_is_close_and_stays(shape):
    inputs, settings = draw(shape, jnp.bfloat16), shape[5:]
    wide = [x.astype(jnp.float32) for x in inputs]
    want = results(lambda x, k: plain(x, k, *settings), *wide)
    got = results(lambda x, k: conv2d(x, k, *settings), *inputs)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert_close(got, want, 0.02)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[8], SHAPES[11]], ids=str)
def test_many_at_once_and_recomputed_are_the_same(shape):
    x, kernel = draw(shape)

    def loss(x, kernel):
        return (conv2d(x, kernel, *shape[5:]) ** 2).sum()

    want = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
    many = jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1)), (0, None))
    many = jax.jit(many)(jnp.stack([x, 2 * x]), kernel)
    assert_close([leaf[0] for leaf in many], want, 1e-5)


def test_the_gradients_of_winograd_are_its_own():
    """What automatic differentiation makes of its forward pass, tiles over the edge included."""
    x, kernel = draw((7, 6, 5, 4, 3))
    dy = jax.random.normal(KEY, (2, 7, 6, 4))
    want = jax.jit(lambda *xs: jax.vjp(winograd.convolve, *xs)[1](dy))(x, kernel)
    assert_close(jax.jit(winograd.gradients)(x, kernel, dy), want, 1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "size", "stride", "pad"),
    [(8, 8, 3, 2, 1), (9, 7, 3, 2, 1), (9, 8, 2, 2, 0), (7, 8, 3, 1, 1), (7, 7, 3, 3, 1)],
)
def test_pooling_is_that_of_the_platform(rows, columns, size, stride, pad):
    x = jax.random.normal(KEY, (2, rows, columns, 3))
    want = results(lambda x: plain_pool(x, size, stride, pad), x)
    assert_close(results(lambda x: max_pool(x, size, stride, pad), x), want, 1e-6)


def test_the_first_of_equal_maxima_gets_the_gradient():
    x = jnp.zeros((1, 4, 4, 1))
    slope = jax.grad(lambda x: max_pool(x, 2, 2, 0).sum())(x)[0, :, :, 0]
    np.testing.assert_array_equal(slope, np.kron(np.ones((2, 2)), [[1, 0], [0, 0]]))


def literal(x, scale, bias, mask, added, relu):
    """BatchNorm as the formula says, for automatic differentiation."""
    real = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
    axes, real = tuple(range(x.ndim - 1)), real[..., None]
    mean = (x * real).sum(axes) / real.sum()
    var = ((x - mean) ** 2 * real).sum(axes) / real.sum()
    y = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias
    y = y if added is None else y + added
    return jax.nn.relu(y) if relu else y


def normal_inputs(batch=8):
    keys = jax.random.split(KEY, 5)
    x = 3.0 + 2.0 * jax.random.normal(keys[0], (batch, 3, 4, 6))
    scale, bias = 1 + jax.random.normal(keys[1], (6,)), jax.random.normal(keys[2], (6,))
    added = jax.random.normal(keys[3], x.shape)
    mask = jax.random.bernoulli(keys[4], 0.6, x.shape[:-1])
    return x, scale, bias, added, mask


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("adding", [False, True])
def test_batch_norm_is_its_formula(relu, masked, adding):
    *inputs, mask = normal_inputs()
    mask = mask if masked else None

    def ours(x, scale, bias, added):
        return batch_norm(x, scale, bias, mask, None, relu, added if adding else None)[0]

    def formula(x, scale, bias, added):
        return literal(x, scale, bias, mask, added if adding else None, relu)

    assert_close(results(ours, *inputs), results(formula, *inputs), 1e-5)


def test_statistics_are_those_of_what_counts():
    x, scale, bias, _, mask = normal_inputs()
    _, statistics = batch_norm(x, scale, bias, mask)
    real = np.asarray(x)[np.asarray(mask)]
    assert statistics.count == len(real)
    np.testing.assert_allclose(statistics.mean, real.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.var, real.var(0), rtol=1e-5)
    y, statistics = batch_norm(x.astype(jnp.bfloat16), scale, bias)
    assert y.dtype == jnp.bfloat16 and statistics.var.dtype == jnp.float32
    nothing = batch_norm(x, scale, bias, jnp.zeros_like(mask))[1]
    assert nothing.count == 1 and not nothing.var.any()


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
@pytest.mark.parametrize("masked", [False, True])
def test_eight_devices_are_one(way, masked):
    """Devices have different shares of what counts, and their parameters' gradients add up."""
    x, scale, bias, added, mask = normal_inputs(16)
    mask = mask if masked else jnp.ones_like(mask)
    weight = jax.random.normal(jax.random.key(3), x.shape)

    def slopes(x, added, mask, weight, axis=None):
        def loss(x, added, scale, bias):
            y, _ = batch_norm(x, scale, bias, mask, axis, True, added)
            return (conv2d(y, kernel, 1, 1) ** 2 * weight[..., :2]).sum()

        *items, dscale, dbias = jax.grad(loss, (0, 1, 2, 3))(x, added, scale, bias)
        totals = (dscale, dbias) if axis is None else lax.psum((dscale, dbias), axis)
        return *items, *totals

    kernel = jax.random.normal(KEY, (3, 3, 6, 2))
    arrays = x, added, mask, weight
    want = jax.jit(slopes)(*arrays)
    if way == "pmap":
        split = [a.reshape(8, 2, *a.shape[1:]) for a in arrays]
        got = jax.pmap(lambda *a: slopes(*a, "d"), "d")(*split)
        got = *(a.reshape(x.shape) for a in got[:2]), *(a[0] for a in got[2:])
    else:
        mesh, items = Mesh(np.array(jax.devices()), "d"), PartitionSpec("d")
        whole = PartitionSpec()
        got = jax.jit(
            jax.shard_map(
                lambda *a: slopes(*a, "d"),
                mesh=mesh,
                in_specs=items,
                out_specs=(items, items, whole, whole),
                check_vma=False,
            )
        )(*arrays)
    assert_close(got, want, 2e-5)
