"""The U-Net decoder: from the maps of an image tower to one logit for each pixel and class.

Source: Ronneberger et al., arXiv 1505.04597, in the form that MGCA (arXiv 2210.06044) fits, the
defaults of segmentation_models_pytorch: a block doubles the map (nearest neighbour), joins the
tower's map of that size, and applies two 3x3 convolutions without bias, each with BatchNorm and
ReLU; the blocks beyond the finest map join nothing; a 3x3 convolution with bias gives the logits.

A 3x3 convolution of a doubled map equals one of the small map with four times the channels, a group
for each of the four pixels that a small one becomes. The result is the same; a training step takes
about a sixth less time on a CPU, because the doubled map is never computed.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, PyTree

from plan_jax.heads.pyramid import last_of_each_size
from plan_jax.layers.batch_norm import BatchNorm
from plan_jax.layers.resize import resize_bilinear, resize_nearest
from plan_jax.types import UserError

WIDTHS = (256, 128, 64, 32, 16)  # of the blocks, deepest first: segmentation_models_pytorch
LAYOUT = ("NHWC", "HWIO", "NHWC")
# FOLD[phase, i, tap] is 1 where tap 0..2 of the large map's pixel 2y + phase reads the small map's
# pixel y + i - 1.
FOLD = np.array([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]], np.float32)

Size = tuple[int, int]


class UNet(nn.Module):
    """Decodes maps, finest first, into logits of `size` (Y, X) for a number of `classes`.

    `widths` are those of the blocks; with fewer blocks the last ones are used. A block that cannot
    double (a map of 7 rows above one of 4) is cut at the far edges, and any other ratio is resized:
    maps by nearest neighbour, logits that cannot reach `size` bilinearly (ours).
    """

    classes: int
    size: Size
    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(
        self,
        features: tuple[Float[Array, "B _ _ _"], ...],
        examples: PyTree = None,
        train: bool = False,
    ) -> Float[Array, "B Y X K"]:
        """Returns per-pixel logits.

        `examples` is unused; `train` switches BatchNorm to batch statistics.

        Raises:
          UserError: there are fewer widths than blocks.
        """
        maps = last_of_each_size(features)[::-1]
        x, skips = maps[0], {skip.shape[1:3]: skip for skip in maps[1:]}
        sizes = block_sizes([(skip.shape[1], skip.shape[2]) for skip in maps], self.size)
        if len(sizes) > len(self.widths):
            raise UserError(
                f"config.eval.segmentation.unet_widths has {len(self.widths)} widths, and this "
                f"tower needs {len(sizes)} blocks; give {len(sizes)} widths"
            )
        # The finest blocks keep their widths whatever the depth of the tower.
        widths = self.widths[len(self.widths) - len(sizes) :]
        for n, (size, width) in enumerate(zip(sizes, widths, strict=True), 1):
            x = UpsampleBlock(width, name=f"block{n}")(x, skips.get(size), size, train)
        init = nn.initializers.glorot_uniform()
        x = nn.Conv(self.classes, (3, 3), kernel_init=init, name="classes")(x)
        if x.shape[1:3] != self.size:
            x = resize_bilinear(x, self.size)
        return x


class UpsampleBlock(nn.Module):
    """Doubles a map, joins a finer one and convolves twice, with BatchNorm and ReLU."""

    width: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B y x C"],
        skip: Float[Array, "B Y X S"] | None,
        size: Size,
        train: bool,
    ) -> Float[Array, "B Y X E"]:
        """Returns a map of `size` (Y, X)."""
        for n in (1, 2):
            skip_width = 0 if n == 2 or skip is None else skip.shape[-1]
            shape = (3, 3, x.shape[-1] + skip_width, self.width)
            kernel = jnp.asarray(self.param(f"kernel{n}", nn.initializers.he_uniform(), shape))
            x = convolve_upsampled(x, skip, kernel, size) if n == 1 else convolve(x, kernel)
            x = nn.relu(BatchNorm(None, name=f"norm{n}")(x, train))
        return x


def block_sizes(map_sizes: Sequence[Size], image_size: Size) -> list[Size]:
    """Returns the size after each block, from the sizes of the maps, deepest first.

    Every block doubles, or stops at the next map. Beyond the last map a block that would exceed the
    image by more than the one pixel that halving rounds up is omitted.

    >>> block_sizes([(12, 12), (24, 24)], (96, 96))
    [(24, 24), (48, 48), (96, 96)]
    >>> block_sizes([(4, 4), (7, 7)], (14, 14))
    [(7, 7), (14, 14)]
    """

    def double(size: Size, limit: Size) -> Size:
        return min(2 * size[0], limit[0]), min(2 * size[1], limit[1])

    sizes, size = [], map_sizes[0]
    for goal in map_sizes[1:]:
        while size != goal:
            size = double(size, goal)
            sizes.append(size)
    while size != image_size and all(2 * n <= m + 1 for n, m in zip(size, image_size, strict=True)):
        size = double(size, image_size)
        sizes.append(size)
    return sizes


def convolve(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "3 3 C E"]
) -> Float[Array, "B Y X E"]:
    """Convolves with one pixel of zeros around the map."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def convolve_upsampled(
    x: Float[Array, "B y x C"],
    skip: Float[Array, "B Y X S"] | None,
    kernel: Float[Array, "3 3 N E"],
    size: Size,
) -> Float[Array, "B Y X E"]:
    """Convolves the small map, upsampled to `size` by nearest neighbour and joined with `skip`.

    *conv([up(x), skip], K) = conv(up(x), K[:C]) + conv(skip, K[C:])*, N = C + S: a convolution is
    linear in its channels, so both parts are computed apart and never joined.
    """
    (batch, rows, columns, channels), width = x.shape, kernel.shape[-1]
    map_kernel = kernel[:, :, :channels]
    if size == (2 * rows, 2 * columns):
        # The kernel of each of the four phases (a, b) on the small map, as groups of channels.
        folded = jnp.einsum("aip,bjq,pqce->ijcabe", FOLD, FOLD, map_kernel)
        y = convolve(x, folded.reshape(3, 3, channels, 4 * width))
        y = y.reshape(batch, rows, columns, 2, 2, width).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, *size, width)
    else:
        y = convolve(resize_nearest(x, size), map_kernel)
    return y if skip is None else y + convolve(skip, kernel[:, :, channels:])
