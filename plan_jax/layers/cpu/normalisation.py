"""BatchNorm with statistics over all devices, and LayerNorm: gradients in few passes over memory.

Source: Ioffe and Szegedy, arXiv 1502.03167; Ba et al., arXiv 1607.06450. What automatic
differentiation makes of BatchNorm is right, but XLA's CPU backend fuses its parts into sums over
rows that it does not vectorise (four times the time of the rule below). The sums are written so
that each of them is a plain one, and barriers keep XLA from storing x minus its mean for a second
use: making it again costs less.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

EPSILON = 1e-5


class Statistics(NamedTuple):
    """Mean and biased variance of each channel over `count` positions of all devices."""

    mean: Float[Array, " C"]
    var: Float[Array, " C"]
    count: Float[Array, ""]


def batch_norm(
    x: Float[Array, "*B C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    mask: Bool[Array, "*B"] | None = None,
    axis: str | None = None,
    relu: bool = False,
    added: Float[Array, "*B C"] | None = None,
) -> tuple[Float[Array, "*B C"], Statistics]:
    """Normalise each channel by the statistics of its positions; give these as well.

    Positions where mask is False do not count, but are normalised too. Sums go over all devices of
    `axis`. `added` is added to the result, and `relu` takes its positive part after that.
    Statistics are float32 and pass no gradient on; the result has the type of x.
    """
    y, statistics = _batch_norm(x, scale, bias, mask, added, axis, relu)
    return y, jax.tree.map(lax.stop_gradient, statistics)


def _total(x: Array, axis: str | None) -> Array:
    return x if axis is None else lax.psum(x, axis)


def _weights(x: Array, mask: Array | None) -> Array | float:
    """Give the weight of each row of x, as a column if they differ."""
    return 1.0 if mask is None else mask.reshape(-1, 1).astype(jnp.float32)


def _apply(
    x: Array,
    scale: Array,
    bias: Array,
    mask: Array | None,
    added: Array | None,
    axis: str | None,
    relu: bool,
) -> tuple[Array, Statistics]:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    real = _weights(x, mask)
    count = jnp.float32(len(rows)) if mask is None else real.sum()
    count = jnp.maximum(_total(count, axis), 1.0)
    mean = _total((rows * real).sum(0), axis) / count
    var = _total(((rows - lax.optimization_barrier(mean)) ** 2 * real).sum(0), axis) / count
    y = (rows - mean) * (lax.rsqrt(var + EPSILON) * scale) + bias
    y = y.reshape(x.shape)
    y = y if added is None else y + added.astype(jnp.float32)
    y = jnp.maximum(y, 0.0) if relu else y
    return y.astype(x.dtype), Statistics(mean, var, count)


_batch_norm = jax.custom_vjp(_apply, nondiff_argnums=(5, 6))


def _forward(
    x: Array,
    scale: Array,
    bias: Array,
    mask: Array | None,
    added: Array | None,
    axis: str | None,
    relu: bool,
) -> tuple:
    y, statistics = _apply(x, scale, bias, mask, added, axis, relu)
    like = None if added is None else jnp.zeros((), added.dtype)
    return (y, statistics), (x, scale, bias, mask, like, statistics, y if relu else None)


def _backward(axis: str | None, relu: bool, saved: tuple, given: tuple) -> tuple:
    """Take the sums of dy and of dy times the normalised x, then make dx in one pass.

    The parameters get this device's sums, as automatic differentiation gives them.
    """
    x, scale, bias, mask, like, (mean, var, count), y = saved
    dy = given[0].astype(jnp.float32)
    dy = dy if y is None else jnp.where(y > 0, dy, 0.0)
    slopes = dy.reshape(-1, x.shape[-1])
    inverse = lax.rsqrt(var + EPSILON)
    rows = x.reshape(slopes.shape).astype(jnp.float32)
    dbias = slopes.sum(0)
    dscale = (slopes * (rows - lax.optimization_barrier(mean))).sum(0) * inverse
    steep = inverse * _total(dscale, axis) / count  # of the part of dx that goes with x
    common = _total(dbias, axis) / count + (rows - mean) * steep
    dx = (scale * inverse) * (slopes - _weights(x, mask) * common)
    dadded = None if like is None else dy.astype(like.dtype)
    dx = dx.reshape(x.shape).astype(x.dtype)
    return dx, dscale.astype(scale.dtype), dbias.astype(bias.dtype), None, dadded


_batch_norm.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*B E"], scale: Float[Array, " E"], bias: Float[Array, " E"], epsilon: float
) -> Float[Array, "*B E"]:
    """Normalise each row to mean 0 and variance 1, then scale and shift it; float32."""
    return _layer_forward(x, scale, bias, epsilon)[0]


def _layer_forward(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple]:
    mean = x.mean(-1, keepdims=True)
    inverse = lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon)
    return (x - mean) * inverse * scale + bias, (x, scale, mean, inverse)


def _layer_backward(epsilon: float, saved: tuple, dy: Array) -> tuple:
    x, scale, mean, inverse = saved
    normal = (x - mean) * inverse
    steep = dy * scale
    along = (steep * normal).mean(-1, keepdims=True)
    dx = inverse * (steep - steep.mean(-1, keepdims=True) - normal * along)
    rows = dy.reshape(-1, dy.shape[-1])
    return dx, (rows * normal.reshape(rows.shape)).sum(0), rows.sum(0)


layer_norm.defvjp(_layer_forward, _layer_backward)
