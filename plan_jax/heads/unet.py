"""The U-Net decoder: from the maps of a vision tower to one logit for each pixel and class.

Source: Ronneberger et al., arXiv 1505.04597, in the form that MGCA (arXiv 2210.06044) fits, the
defaults of segmentation_models_pytorch: a block doubles the map (nearest neighbour), joins the
tower's map of that size, and applies two 3x3 convolutions without bias, each with BatchNorm and
ReLU; the blocks beyond the finest map join nothing; a 3x3 convolution with bias gives the logits.

A 3x3 convolution of a doubled map is one of the small map with four times the channels, one for
each of the four pixels that a small one becomes. The result is the same; a training step takes
about a sixth less time on a CPU, because the doubled map is never made.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, PyTree

from plan_jax.heads.pyramid import distinct
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
        self, seen: tuple[Float[Array, "B _ _ _"], ...], rows: PyTree = None, train: bool = False
    ) -> Float[Array, "B Y X K"]:
        """Give the logits; `rows` is not looked at, `train` is that of BatchNorm.

        Raises:
          UserError: there are fewer widths than blocks.
        """
        maps = distinct(seen)[::-1]
        x, skips = maps[0], {skip.shape[1:3]: skip for skip in maps[1:]}
        steps = ladder([one.shape[1:3] for one in maps], self.size)
        if len(steps) > len(self.widths):
            raise UserError(
                f"widths of the U-Net are {len(self.widths)} numbers, and this tower needs "
                f"{len(steps)} blocks; give {len(steps)} of them"
            )
        widths = self.widths[len(self.widths) - len(steps) :]
        for n, (step, width) in enumerate(zip(steps, widths, strict=True)):
            x = Block(width, name=f"block{n + 1}")(x, skips.get(step), step, train)
        init = nn.initializers.glorot_uniform()
        x = nn.Conv(self.classes, (3, 3), kernel_init=init, name="classes")(x)
        if x.shape[1:3] != self.size:
            x = jax.image.resize(x, (len(x), *self.size, self.classes), "bilinear")
        return x


class Block(nn.Module):
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
        """Apply it; `size` is (Y, X) of the result."""
        for n in (1, 2):
            channels = x.shape[-1] + (0 if n == 2 or skip is None else skip.shape[-1])
            shape = (3, 3, channels, self.width)
            kernel = self.param(f"kernel{n}", nn.initializers.he_uniform(), shape)
            x = convolve_enlarged(x, skip, kernel, size) if n == 1 else convolve(x, kernel)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=f"norm{n}")(x))
        return x


def ladder(sizes: Sequence[Size], image: Size) -> list[Size]:
    """List the size after each block, from the maps' sizes, deepest first, up to the image's.

    Every step doubles, or stops at the next map. Beyond the last map a step that would overshoot
    the image by more than the one pixel that halving rounds up is not made.

    >>> ladder([(12, 12), (24, 24)], (96, 96))
    [(24, 24), (48, 48), (96, 96)]
    >>> ladder([(4, 4), (7, 7)], (14, 14))
    [(7, 7), (14, 14)]
    """
    steps, size = [], sizes[0]
    for goal in sizes[1:]:
        while size != goal:
            size = tuple(min(2 * n, m) for n, m in zip(size, goal, strict=True))
            steps.append(size)
    while size != image and all(2 * n <= m + 1 for n, m in zip(size, image, strict=True)):
        size = tuple(min(2 * n, m) for n, m in zip(size, image, strict=True))
        steps.append(size)
    return steps


def convolve(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "3 3 C E"]
) -> Float[Array, "B Y X E"]:
    """Convolve with one pixel of zeros around the map."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def convolve_enlarged(
    x: Float[Array, "B y x C"],
    skip: Float[Array, "B Y X S"] | None,
    kernel: Float[Array, "3 3 N E"],
    size: Size,
) -> Float[Array, "B Y X E"]:
    """Convolve the small map, enlarged to `size` by nearest neighbour, joined with the fine one.

    *conv([enlarged x, skip], K) = conv(enlarged x, K[:C]) + conv(skip, K[C:])*, N = C + S.
    """
    (batch, rows, columns, channels), width = x.shape, kernel.shape[-1]
    own = kernel[:, :, :channels]
    if size == (2 * rows, 2 * columns):
        folded = jnp.einsum("aip,bjq,pqce->ijcabe", FOLD, FOLD, own)
        y = convolve(x, folded.reshape(3, 3, channels, 4 * width))
        y = y.reshape(batch, rows, columns, 2, 2, width).transpose(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, *size, width)
    else:
        y = convolve(enlarge(x, size), own)
    return y if skip is None else y + convolve(skip, kernel[:, :, channels:])


def enlarge(x: Float[Array, "B y x C"], size: Size) -> Float[Array, "B Y X C"]:
    """Enlarge by nearest neighbour: doubled and cut where that fits, else resized."""
    if all(2 * n - m in (0, 1) for n, m in zip(x.shape[1:3], size, strict=True)):
        return x.repeat(2, 1).repeat(2, 2)[:, : size[0], : size[1]]
    return jax.image.resize(x, (len(x), *size, x.shape[-1]), "nearest")
