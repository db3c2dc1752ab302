"""The SETR-PUP decoder: from the patches of a ViT to one logit for each pixel and class.

Source: Zheng et al., SETR, arXiv 2012.15840 (progressive upsampling), in the form that MGCA (arXiv
2210.06044) fits: a linear layer of the tower's own width, then blocks of 3x3 convolution,
BatchNorm, ReLU and bilinear doubling that keeps the corner pixels (torch's `align_corners=True`),
then a 3x3 convolution with bias. The bias in front of BatchNorm, which takes it away again, is left
out.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from plan_jax.layers.resize import resize_align_corners

WIDTHS = (512, 256, 128, 64)  # MGCA's code: `decode_features`
TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # its default for kernels


class SETR(nn.Module):
    """Decodes the last of the maps it is given into logits of `size` (Y, X) for `classes`.

    There is a block for each whole doubling that fits between map and image, at most as many as
    there are `widths`, of which the first are used: four for a patch of 16 pixels. What is then
    left to the image's size is resized bilinearly, corners kept (ours).
    """

    classes: int
    size: tuple[int, int]
    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(
        self, seen: tuple[Float[Array, "B _ _ _"], ...], rows: PyTree = None, train: bool = False
    ) -> Float[Array, "B Y X K"]:
        """Give the logits; `rows` is not looked at, `train` is that of BatchNorm."""
        x = nn.Dense(seen[-1].shape[-1], kernel_init=TORCH, name="tokens")(seen[-1])
        for n, width in enumerate(self.widths):
            if any(2 * a > b for a, b in zip(x.shape[1:3], self.size, strict=True)):
                break
            x = nn.Conv(width, (3, 3), use_bias=False, kernel_init=TORCH, name=f"conv{n + 1}")(x)
            norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name=f"norm{n + 1}")
            x = double(nn.relu(norm(x)))
        x = nn.Conv(self.classes, (3, 3), kernel_init=TORCH, name="classes")(x)
        return x if x.shape[1:3] == self.size else resize_align_corners(x, self.size)


def double(x: Float[Array, "B y x C"]) -> Float[Array, "B Y X C"]:
    """Double a map bilinearly, its corner pixels kept: n samples lie at 0, (n-1)/(2n-1), ...

    Every sample is between two neighbours, *out[2k] = x[k] + (x[k-1] - x[k]) k / (2n-1)* and
    *out[2k+1] = x[k] + (x[k+1] - x[k]) (n-1-k) / (2n-1)*: shifts and sums, no gathering.

    >>> double(jnp.array([0.0, 3.0]).reshape(1, 1, 2, 1))[0, 0, :, 0].tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    for axis in (1, 2):
        x = jnp.moveaxis(x, axis, 1)
        count = x.shape[1]
        k = jnp.arange(count, dtype=x.dtype)[:, None, None]
        before = jnp.concatenate([x[:, :1], x[:, :-1]], 1)
        after = jnp.concatenate([x[:, 1:], x[:, -1:]], 1)
        even = x + (before - x) * (k / (2 * count - 1))
        odd = x + (after - x) * ((count - 1 - k) / (2 * count - 1))
        x = jnp.stack([even, odd], 2).reshape(len(x), 2 * count, *x.shape[2:])
        x = jnp.moveaxis(x, 1, axis)
    return x
