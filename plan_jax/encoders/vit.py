"""ViT in Flax linen; a size is a row of data, not a class.

Source: Dosovitskiy et al., arXiv 2010.11929, with the semantics of timm and DeiT (class token,
learned positions, pre-norm layers, LayerNorm eps 1e-6, exact GELU). The sizes of patch 14 are those
of DINOv2 (Oquab et al., arXiv 2304.07193), which RAD-DINO (Perez-Garcia et al., arXiv 2401.10815)
has too: LayerScale and, in some of its models, registers (Darcet et al., arXiv 2309.16588).
"""

import math
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from plan_jax.encoders import ImageOutput
from plan_jax.encoders.resnet import Conv
from plan_jax.layers.dense import add_parameter
from plan_jax.layers.resize import resize_bicubic
from plan_jax.layers.transformer import (
    LayerNorm,
    exact_gelu,
    is_frozen_layer,
    run_layers,
    swiglu,
)
from plan_jax.types import UserError

VITS: dict[str, dict[str, Any]] = {
    "vit_b16": {"patch": 16, "width": 768, "depth": 12, "heads": 12},
    "vit_s16": {"patch": 16, "width": 384, "depth": 12, "heads": 6},
    "vit_ti16": {"patch": 16, "width": 192, "depth": 12, "heads": 3},
    "vit_g14": {
        "patch": 14,
        "width": 1536,
        "depth": 40,
        "heads": 24,
        "layer_scale": 1.0,
        "swiglu": True,
    },
    "vit_l14": {"patch": 14, "width": 1024, "depth": 24, "heads": 16, "layer_scale": 1.0},
    "vit_b14": {"patch": 14, "width": 768, "depth": 12, "heads": 12, "layer_scale": 1.0},
    "vit_s14": {"patch": 14, "width": 384, "depth": 12, "heads": 6, "layer_scale": 1.0},
    "vit_small": {"patch": 8, "width": 96, "depth": 4, "heads": 4},
    "vit_tiny": {"patch": 8, "width": 16, "depth": 1, "heads": 2},
    "vit_tiny14": {"patch": 14, "width": 16, "depth": 2, "heads": 2, "layer_scale": 1.0},
}
EPSILON = 1e-6  # of every LayerNorm, as in timm


class ViT(nn.Module):
    """Vision transformer; `pooled` is the class token, `local` are the patches.

    Attributes:
      registers: number of learned tokens that belong to no patch and have no position.
      layer_scale: that of `TransformerLayer`.
      swiglu: whether the MLP is SwiGLU, with two thirds of the channels.
      class_token: without one, as in I-JEPA, `pooled` is the mean of the patches.
      scan, remat, frozen_layers: those of `run_layers`; with any frozen layer the embeddings are
        frozen too.
    """

    patch: int
    width: int
    depth: int
    heads: int
    registers: int = 0
    layer_scale: float = 0.0
    swiglu: bool = False
    class_token: bool = True
    scan: bool = False
    remat: bool = False
    frozen_layers: int = 0
    dtype: Any = jnp.float32

    def is_frozen(self, name: str) -> bool:
        """Returns whether `frozen_layers` freezes this tower's parameters called `name`."""
        # The last norm comes after all layers, so it is frozen only if all of them are.
        if name == "norm":
            return self.frozen_layers >= self.depth
        return is_frozen_layer(name, self.frozen_layers)

    @nn.compact
    def __call__(self, image: Float[Array, "B Y X C"], train: bool = False) -> ImageOutput:
        """Encodes B images; `train` is unused (there is neither dropout nor BatchNorm).

        Raises:
          UserError: the sides of the images are not multiples of a patch.
        """
        check_patches(image.shape[1], self.patch)
        check_patches(image.shape[2], self.patch)
        # A convolution whose stride is its size is one linear layer on every patch.
        patches = Conv(self.width, self.patch, self.patch, dtype=self.dtype, name="embed")(image)
        bias = self.param("embed_bias", nn.initializers.zeros, (self.width,))
        patches = add_parameter(patches, bias)
        grid = patches.shape[1], patches.shape[2]
        tokens = rearrange(patches, "b y x c -> b (y x) c")
        if self.class_token:
            tokens = jnp.concatenate([self._repeat_token("token", 1, tokens), tokens], 1)
        tokens = add_parameter(tokens, self._positions(grid))
        if self.registers:
            registers = self._repeat_token("registers", self.registers, tokens)
            first = int(self.class_token)
            tokens = jnp.concatenate([tokens[:, :first], registers, tokens[:, first:]], 1)
        options = {
            "width": self.width,
            "num_heads": self.heads,
            "hidden": hidden_width(self.width, self.swiglu),
            "activation": swiglu if self.swiglu else exact_gelu,
            "layer_scale": self.layer_scale,
            "epsilon": EPSILON,
            "dtype": self.dtype,
        }
        tokens, attention = run_layers(self, options, tokens)
        tokens = LayerNorm(EPSILON, name="norm")(tokens)
        if self.frozen_layers >= self.depth:
            tokens = lax.stop_gradient(tokens)
        num_other = int(self.class_token) + self.registers
        patches = tokens[:, num_other:]
        local = rearrange(patches, "b (y x) c -> b y x c", y=grid[0])
        if not self.class_token:
            return ImageOutput(patches.mean(1), local, stages=(local,))
        # Without the attention to the class token and registers, which are no patches.
        return ImageOutput(tokens[:, 0], local, attention=attention[:, num_other:], stages=(local,))

    def _repeat_token(
        self, name: str, count: int, tokens: Float[Array, "B N E"]
    ) -> Float[Array, "B {count} E"]:
        """Returns `count` learned tokens for each image, in the type of `tokens`."""
        shape = (1, count, self.width)
        token = self.param(name, nn.initializers.normal(0.02), shape)
        # Repeated before the cast, so that the gradient is summed over images in float32.
        return jnp.repeat(token, tokens.shape[0], 0).astype(tokens.dtype)  # `len` refuses a symbol

    def _positions(self, grid: tuple[int, int]) -> Float[Array, "1 N E"]:
        """Returns the positions of the class token and of a grid of patches.

        The parameter belongs to the square grid that it was initialised with. For another one it is
        interpolated as in transformers: with antialiasing where there are registers.
        """
        num_class = int(self.class_token)
        if self.is_initializing() or not self.has_variable("params", "position"):
            if grid[0] != grid[1]:
                raise UserError(
                    f"a ViT cannot start from {grid[0]} x {grid[1]} patches; use square images"
                )
            shape = (1, num_class + grid[0] * grid[1], self.width)
            return self.param("position", nn.initializers.normal(0.02), shape)
        position = jnp.asarray(self.get_variable("params", "position"))
        side = math.isqrt(position.shape[1] - num_class)
        if grid == (side, side):
            return position
        patches = position[:, num_class:].reshape(1, side, side, self.width)
        patches = resize_bicubic(patches, grid, antialias=self.registers > 0)
        patches = patches.reshape(1, -1, self.width)
        return jnp.concatenate([position[:, :num_class], patches], 1)


def hidden_width(width: int, is_swiglu: bool) -> int:
    """Returns the channels of an MLP's first layer: 4 `width`, or both halves of SwiGLU.

    A half of SwiGLU has two thirds of 4 `width`, rounded up to a multiple of 8, as in DINOv2.

    >>> hidden_width(768, False), hidden_width(1536, True)
    (3072, 8192)
    """
    if not is_swiglu:
        return 4 * width
    return 2 * math.ceil(int(4 * width * 2 / 3) / 8) * 8


def check_patches(size: int, patch: int) -> None:
    """Raises UserError unless images of `size` pixels are cut into whole patches.

    >>> check_patches(518, 14)
    """
    if size % patch or not size:
        below, above = size // patch * patch, (size // patch + 1) * patch
        choices = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"images of {size} pixels cannot be cut into patches of {patch}; set data.size to"
            f" {choices}"
        )
