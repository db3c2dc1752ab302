"""Three feature maps, each half the size of the one before, from the stages of any image tower.

A ResNet with three or more sizes has them: its last three (C3, C4, C5 of a ResNet-50). For two
sizes a strided convolution computes the third (ours). A ViT has one: Li et al. (arXiv 2203.16527)
compute finer maps by transposed convolutions and coarser ones by pooling; three sizes instead of
their four are ours.
"""

from collections.abc import Sequence

import jax
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from plan_jax.layers.batch_norm import BatchNorm

KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default, too


class ConvNorm(nn.Module):
    """A convolution without bias, BatchNorm and LeakyReLU.

    `slope` is that of LeakyReLU below zero; 0 is ReLU.
    """

    width: int
    size: int
    stride: int = 1
    slope: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], train: bool = False) -> Float[Array, "B V U E"]:
        """Returns the activations of the layer; V = ceil(Y / stride)."""
        padding, window = self.size // 2, (self.size, self.size)
        x = nn.Conv(
            self.width, window, self.stride, [(padding, padding)] * 2, use_bias=False, name="conv"
        )(x)
        x = BatchNorm(None, name="norm")(x, train)
        return jax.nn.leaky_relu(x, self.slope)


class Pyramid(nn.Module):
    """Computes three maps, finest first, from the one, two or three of `last_three_sizes`.

    Three maps stay as they are. Two are completed by a 3x3 convolution of stride 2 with BatchNorm
    and ReLU, as wide as the coarser one. One map of size g becomes maps of size 2 g (transposed 2x2
    convolution of stride 2, half as wide), g, and ceil(g / 2) (maximum of 2x2 pixels).
    """

    @nn.compact
    def __call__(
        self, maps: Sequence[Float[Array, "B _ _ _"]], train: bool = False
    ) -> tuple[Float[Array, "B _ _ _"], ...]:
        """Returns three maps [B Y X C], finest first, from maps in the same order."""
        if len(maps) == 3:
            return tuple(maps)
        if len(maps) == 2:
            return *maps, ConvNorm(maps[-1].shape[-1], 3, 2, name="below")(maps[-1], train)
        (patches,) = maps
        # A transposed convolution whose windows do not overlap is one product and a transposition.
        width = max(1, patches.shape[-1] // 2)
        finer = nn.Dense(4 * width, kernel_init=KERNEL_INIT, name="above")(patches)
        finer = rearrange(finer, "b y x (i j c) -> b (y i) (x j) c", i=2, j=2)
        return finer, patches, nn.max_pool(patches, (2, 2), (2, 2), "SAME")


def last_of_each_size(
    maps: Sequence[Float[Array, "B _ _ _"]],
) -> tuple[Float[Array, "B _ _ _"], ...]:
    """Returns the last map [B Y X C] of each size, from maps that come finest first."""
    return tuple({x.shape[1:3]: x for x in maps}.values())


def last_three_sizes(
    maps: Sequence[Float[Array, "B _ _ _"]],
) -> tuple[Float[Array, "B _ _ _"], ...]:
    """Returns the last map [B Y X C] of each of the three coarsest sizes, finest first.

    >>> import jax.numpy as jnp
    >>> stages = [jnp.zeros((1, n, n, c)) for n, c in ((8, 1), (4, 2), (4, 3), (2, 4), (1, 5))]
    >>> [x.shape[1:] for x in last_three_sizes(stages)]
    [(4, 4, 3), (2, 2, 4), (1, 1, 5)]
    """
    return last_of_each_size(maps)[-3:]
