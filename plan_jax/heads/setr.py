"""The SETR-PUP decoder: from the patches of a ViT to one logit for each pixel and class.

Source: Zheng et al., SETR, arXiv 2012.15840 (progressive upsampling), in the form that MGCA (arXiv
2210.06044) fits: a linear layer of the tower's own width, then blocks of 3x3 convolution,
BatchNorm, ReLU and bilinear doubling that keeps the corner pixels (torch's `align_corners=True`),
then a 3x3 convolution with bias. The bias in front of BatchNorm, which BatchNorm subtracts again,
is omitted.
"""

from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from plan_jax.layers.batch_norm import BatchNorm
from plan_jax.layers.resize import double_align_corners, resize_align_corners

WIDTHS = (512, 256, 128, 64)  # MGCA's code: `decode_features`
KERNEL_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default


class SETR(nn.Module):
    """Decodes the last of the tower's maps into logits of `size` (Y, X) for `classes`.

    There is a block for each whole doubling that fits between map and image, at most as many as
    there are `widths`, of which the first are used: four for a patch of 16 pixels. The remaining
    factor to the size of the image is resized bilinearly, corners kept (ours).
    """

    classes: int
    size: tuple[int, int]
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
        """
        patches = features[-1]
        x = nn.Dense(patches.shape[-1], kernel_init=KERNEL_INIT, name="tokens")(patches)
        for n, width in enumerate(self.widths, 1):
            # Another doubling would overshoot the image.
            if any(2 * a > b for a, b in zip(x.shape[1:3], self.size, strict=True)):
                break
            x = nn.Conv(width, (3, 3), use_bias=False, kernel_init=KERNEL_INIT, name=f"conv{n}")(x)
            x = BatchNorm(None, name=f"norm{n}")(x, train)
            x = double_align_corners(nn.relu(x))
        x = nn.Conv(self.classes, (3, 3), kernel_init=KERNEL_INIT, name="classes")(x)
        return x if x.shape[1:3] == self.size else resize_align_corners(x, self.size)
