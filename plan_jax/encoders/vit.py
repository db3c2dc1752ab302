"""ViT in Flax linen; a size is a row of data, not a class.

Source: Dosovitskiy et al., arXiv 2010.11929, with the semantics of timm and DeiT (class token,
learned positions, LayerNorm eps 1e-6, one projection for queries, keys and values, exact GELU).
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from plan_jax.encoders.outputs import ImageOutput
from plan_jax.encoders.resnet import Conv
from plan_jax.layers.cpu.attention import attend
from plan_jax.layers.cpu.gelu import gelu
from plan_jax.layers.transformer import (
    Dense,
    LayerNorm,
    first_attention,
    is_frozen_layer,
    run_layers,
)

VITS = {
    "vit_b16": {"patch": 16, "width": 768, "depth": 12, "heads": 12},
    "vit_s16": {"patch": 16, "width": 384, "depth": 12, "heads": 6},
    "vit_ti16": {"patch": 16, "width": 192, "depth": 12, "heads": 3},
    "vit_small": {"patch": 8, "width": 96, "depth": 4, "heads": 4},
    "vit_tiny": {"patch": 8, "width": 16, "depth": 1, "heads": 2},
}


class Layer(nn.Module):
    """A pre-norm transformer layer of ViT (LayerNorm eps 1e-6, exact GELU)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N E"], key: None = None
    ) -> tuple[Float[Array, "B N E"], Float[Array, "B N"]]:
        """Apply it; also give the attention of the first token, mean over heads."""
        width = x.shape[-1]
        y = LayerNorm(1e-6, name="norm1")(x).astype(self.dtype)
        qkv = Dense(3 * width, parts=3, dtype=self.dtype, name="qkv")(y)
        q, k, v = (rearrange(part, "b n (h e) -> b n h e", h=self.heads) for part in qkv)
        y = rearrange(attend(q, k, v), "b n h e -> b n (h e)")
        x = x + Dense(width, dtype=self.dtype, name="proj")(y)
        y = LayerNorm(1e-6, name="norm2")(x).astype(self.dtype)
        y = gelu(Dense(4 * width, dtype=self.dtype, name="fc1")(y))
        return x + Dense(width, dtype=self.dtype, name="fc2")(y), first_attention(q, k)


class ViT(nn.Module):
    """Vision transformer with a class token; `pooled` is that token, `local` are the patches.

    `scan`, `remat` and `hold` are those of `run_layers`; `hold` > 0 freezes the embedding too.
    """

    patch: int
    width: int
    depth: int
    heads: int
    scan: bool = False
    remat: bool = False
    hold: int = 0
    dtype: Any = jnp.float32

    def is_frozen(self, name: str) -> bool:
        """Say whether the parameters called `name` in this tower are frozen by `hold`."""
        return self.hold >= self.depth if name == "norm" else is_frozen_layer(name, self.hold)

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], train: bool = False) -> ImageOutput:
        """See B images."""
        x = Conv(self.width, self.patch, self.patch, dtype=self.dtype, name="embed")(x)
        bias = self.param("embed_bias", nn.initializers.zeros, (self.width,))
        x = x + bias.astype(x.dtype)
        rows = x.shape[1]
        x = rearrange(x, "b y x c -> b (y x) c")
        init = nn.initializers.normal(0.02)
        token = self.param("token", init, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.repeat(token, x.shape[0], 0), x], 1)
        x = x + self.param("position", init, (1, x.shape[1], self.width)).astype(x.dtype)
        settings = {"heads": self.heads, "dtype": self.dtype}
        x, attention = run_layers(self, Layer, settings, x)
        x = LayerNorm(1e-6, name="norm")(x)
        local = rearrange(x[:, 1:], "b (y x) c -> b y x c", y=rows)
        if self.hold >= self.depth:
            x, local = jax.lax.stop_gradient((x, local))
        return ImageOutput(x[:, 0], local, attention=attention[:, 1:], stages=(local,))
