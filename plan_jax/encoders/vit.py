"""ViT in Flax linen; a size is a row of data, not a class.

Source: Dosovitskiy et al., arXiv 2010.11929, with the semantics of timm and DeiT (class token,
learned positions, pre-norm layers, LayerNorm eps 1e-6, exact GELU).
"""

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from plan_jax.encoders import ImageOutput
from plan_jax.encoders.resnet import Conv
from plan_jax.layers.transformer import is_frozen_layer, run_layers

VITS = {
    "vit_b16": {"patch": 16, "width": 768, "depth": 12, "heads": 12},
    "vit_s16": {"patch": 16, "width": 384, "depth": 12, "heads": 6},
    "vit_ti16": {"patch": 16, "width": 192, "depth": 12, "heads": 3},
    "vit_small": {"patch": 8, "width": 96, "depth": 4, "heads": 4},
    "vit_tiny": {"patch": 8, "width": 16, "depth": 1, "heads": 2},
}
EPSILON = 1e-6  # of every LayerNorm, as in timm


class ViT(nn.Module):
    """Vision transformer with a class token; `pooled` is that token, `local` are the patches.

    `scan`, `remat` and `frozen_layers` are those of `run_layers`; with any frozen layer the
    embeddings are frozen too.
    """

    patch: int
    width: int
    depth: int
    heads: int
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
        """Encodes B images; `train` is unused (there is neither dropout nor BatchNorm)."""
        # A convolution whose stride is its size is one linear layer on every patch.
        patches = Conv(self.width, self.patch, self.patch, dtype=self.dtype, name="embed")(image)
        bias = self.param("embed_bias", nn.initializers.zeros, (self.width,))
        patches = patches + bias.astype(patches.dtype)
        num_rows = patches.shape[1]
        patches = rearrange(patches, "b y x c -> b (y x) c")
        initializer = nn.initializers.normal(0.02)
        class_token = self.param("token", initializer, (1, 1, self.width)).astype(patches.dtype)
        class_tokens = jnp.repeat(class_token, patches.shape[0], 0)
        tokens = jnp.concatenate([class_tokens, patches], 1)
        position = self.param("position", initializer, (1, tokens.shape[1], self.width))
        tokens = tokens + position.astype(tokens.dtype)
        options = {
            "width": self.width,
            "num_heads": self.heads,
            "hidden": 4 * self.width,
            "epsilon": EPSILON,
            "dtype": self.dtype,
        }
        tokens, attention = run_layers(self, options, tokens)
        tokens = nn.LayerNorm(EPSILON, name="norm")(tokens)
        if self.frozen_layers >= self.depth:
            tokens = lax.stop_gradient(tokens)
        local = rearrange(tokens[:, 1:], "b (y x) c -> b y x c", y=num_rows)
        # Without the class token's attention to itself, which is not attention to a patch.
        return ImageOutput(tokens[:, 0], local, attention=attention[:, 1:], stages=(local,))
