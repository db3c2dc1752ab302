"""BatchNorm with torch's semantics, a mask, and statistics over all devices.

Source: Ioffe and Szegedy, arXiv 1502.03167.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

EPSILON = 1e-5
MOMENTUM = 0.1  # torch's: the weight of the new statistics in the running ones


class Statistics(NamedTuple):
    """Mean and biased variance of each channel over `num_positions` of all devices."""

    mean: Float[Array, " C"]
    var: Float[Array, " C"]
    num_positions: Float[Array, ""]


def batch_statistics(
    x: Float[Array, "*B C"], mask: Bool[Array, "*B"] | None = None, axis: str | None = None
) -> Statistics:
    """Computes the statistics of the positions where `mask` is True, in float32.

    Sums over all devices of `axis` are divided by one count, so that statistics are the same on any
    number of devices, also where a mask leaves devices different numbers of positions. Without any
    position the count is 1 and mean and variance are 0.
    """

    def total(values: Array) -> Array:
        return values if axis is None else lax.psum(values, axis)

    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    weight = jnp.ones((len(rows), 1)) if mask is None else mask.reshape(-1, 1).astype(jnp.float32)
    count = jnp.maximum(total(weight.sum()), 1.0)
    mean = total((rows * weight).sum(0)) / count
    # Two passes: the mean of squares less the square of the mean cancels where the mean is large.
    var = total(((rows - mean) ** 2 * weight).sum(0)) / count
    return Statistics(mean, var, count)


class BatchNorm(nn.Module):
    """BatchNorm as in torch: momentum 0.1, epsilon 1e-5, unbiased running variance.

    `axis` is the mapped device axis over which statistics are summed; None on one device.
    """

    axis: str | None
    affine: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B C"], train: bool, mask: Bool[Array, "*B"] | None = None
    ) -> Float[Array, "*B C"]:
        """Returns x normalised over all but the last axis, in x's type.

        Positions where `mask` is False do not enter the statistics, but are normalised too.
        """
        width = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        running_var = self.variable("batch_stats", "var", jnp.ones, width)
        scale, bias = jnp.ones(width), jnp.zeros(width)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (width,))
            bias = self.param("bias", nn.initializers.zeros, (width,))
        mean, var = running_mean.value, running_var.value
        if train:
            # While parameters are initialised no device axis is mapped.
            axis = None if self.is_initializing() else self.axis
            mean, var, count = batch_statistics(x, mask, axis)
            if not self.is_initializing():
                unbiased = var * count / jnp.maximum(count - 1, 1.0)
                keep = 1 - MOMENTUM
                running_mean.value = keep * running_mean.value + MOMENTUM * mean
                running_var.value = keep * running_var.value + MOMENTUM * unbiased
        y = (x.astype(jnp.float32) - mean) * (lax.rsqrt(var + EPSILON) * scale) + bias
        return y.astype(x.dtype)
