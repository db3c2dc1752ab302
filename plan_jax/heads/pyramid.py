"""Three maps, each half the size of the one before, from whatever stages a vision tower gives.

A ResNet with three or more sizes gives the last three (C3, C4, C5 of a ResNet-50). For two sizes a
strided convolution makes the third (ours). A ViT has one: Li et al. (arXiv 2203.16527) make finer
maps by transposed convolutions and coarser ones by pooling; three sizes instead of their four are
ours.
"""

from collections.abc import Sequence

import jax
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

MOMENTUM, EPSILON = 0.9, 1e-5  # torch's defaults; the running variance is the biased one
KERNEL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default, too


class ConvNorm(nn.Module):
    """A convolution without bias, BatchNorm, LeakyReLU of `slope` below zero (0: ReLU)."""

    width: int
    size: int
    stride: int = 1
    slope: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], train: bool = False) -> Float[Array, "B V U E"]:
        """Apply it; V = ceil(Y / stride)."""
        pad, window = self.size // 2, (self.size, self.size)
        x = nn.Conv(self.width, window, self.stride, [(pad, pad)] * 2, use_bias=False, name="conv")(
            x
        )
        x = nn.BatchNorm(not train, momentum=MOMENTUM, epsilon=EPSILON, name="norm")(x)
        return jax.nn.leaky_relu(x, self.slope)


class Pyramid(nn.Module):
    """Make three maps, finest first, of the one, two or three that `choose` gives.

    Three stay as they are. Below two, a 3x3 convolution of stride 2 with BatchNorm and ReLU, as
    wide as the coarser one. One of size g becomes 2 g (transposed 2x2 convolution of stride 2,
    half as wide), g, and ceil(g / 2) (maximum of 2x2 pixels).
    """

    @nn.compact
    def __call__(
        self, maps: Sequence[Float[Array, "B _ _ _"]], train: bool = False
    ) -> tuple[Float[Array, "B _ _ _"], ...]:
        """Make them of maps [B Y X C], finest first."""
        if len(maps) == 3:
            return tuple(maps)
        if len(maps) == 2:
            return *maps, ConvNorm(maps[-1].shape[-1], 3, 2, name="below")(maps[-1], train)
        (only,) = maps
        # Without overlap a transposed convolution is one product and a change of layout.
        finer = nn.Dense(4 * max(1, only.shape[-1] // 2), kernel_init=KERNEL, name="above")(only)
        finer = rearrange(finer, "b y x (i j c) -> b (y i) (x j) c", i=2, j=2)
        return finer, only, nn.max_pool(only, (2, 2), (2, 2), "SAME")


def distinct(maps: Sequence[Float[Array, "B _ _ _"]]) -> tuple[Float[Array, "B _ _ _"], ...]:
    """Keep the last map [B Y X C] of each size, of maps that come finest first."""
    return tuple({one.shape[1:3]: one for one in maps}.values())


def choose(maps: Sequence[Float[Array, "B _ _ _"]]) -> tuple[Float[Array, "B _ _ _"], ...]:
    """Take the last map [B Y X C] of each size, and of those the last three, finest first.

    >>> import jax.numpy as jnp
    >>> stages = [jnp.zeros((1, n, n, c)) for n, c in ((8, 1), (4, 2), (4, 3), (2, 4), (1, 5))]
    >>> [m.shape[1:] for m in choose(stages)]
    [(4, 4, 3), (2, 2, 4), (1, 1, 5)]
    """
    return distinct(maps)[-3:]
