"""Two towers and their heads: images and texts into one shared space, as `Features`.

The local head of the image side is g(.) of PLAN, MGCA and GLoRIA: a learned map from a pixel of
the feature map to the space of the words. Heads are named by what the papers use: `linear`
(GLoRIA) and `mlp` (Linear, BatchNorm, ReLU, Linear, BatchNorm without scale; MGCA, PLAN); `norm` is
a Linear with that last BatchNorm. Deviation: padded words do not enter the statistics of BatchNorm
(they do in MGCA's code).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt8

from plan_jax.encoders.bert import make_text_tower
from plan_jax.encoders.resnet import Norm
from plan_jax.encoders.vision import make_image_tower
from plan_jax.types import Batch, Features, Stages, TextBatch


class Head(nn.Module):
    """A projection to the shared space: `linear`, `norm` or `mlp`."""

    kind: str
    hidden: int
    dim: int
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B E"], train: bool, mask: Bool[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Project the last axis; positions where mask is False do not enter any statistics."""
        if self.kind == "mlp":
            x = nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="fc1")(x)
            x = Norm(self.axis, name="norm1")(x, train, mask, relu=True)
        x = nn.Dense(self.dim, dtype=self.dtype, name="fc2")(x).astype(jnp.float32)
        if self.kind == "linear":
            return x
        return Norm(self.axis, affine=False, name="norm2")(x, train, mask)


class FineHead(nn.Module):
    """Projects the finer map and adds what the coarse one knows there (a lateral connection).

    Source: Lin et al., arXiv 1612.03144 (feature pyramid), with one level.
    """

    dim: int
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(
        self, fine: Float[Array, "B V U C"], coarse: Float[Array, "B Y X E"], train: bool
    ) -> Float[Array, "B V U D"]:
        """Project every pixel of the finer map."""
        x = nn.Dense(self.dim, dtype=self.dtype, name="lateral")(fine)
        y = nn.Dense(self.dim, use_bias=False, dtype=self.dtype, name="top")(coarse)
        shape = (y.shape[0], *fine.shape[1:3], self.dim)
        x = (x + jax.image.resize(y, shape, "bilinear")).astype(jnp.float32)
        return Norm(self.axis, affine=False, name="norm")(x, train)


class DualEncoder(nn.Module):
    """Both towers with their four heads (global and local, image and text).

    `heads` gives the kind of each: image_global, image_local, text_global, text_local. A `shared`
    local head is the global one applied to each pixel or word with its stored statistics (ConVIRT
    has no other: its heat map is a class activation map). `standard` is how grey values are
    normalised: `image` (each image to mean 0, variance 1) or `fixed` ((x - 0.5) / 0.5, as MGCA and
    GLoRIA do). `fine` adds a head on the map one stage earlier.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    heads: dict[str, str]
    vocab: int
    dim: int = 128
    hidden: int = 2048
    standard: str = "fixed"
    channels: int = 3
    fine: bool = False
    axis: str | None = None
    dtype: Any = jnp.float32

    def is_frozen(self, name: str) -> bool:
        """Say whether a parameter, called by its path (`image_tower/stem/kernel`), is frozen."""
        tower, _, rest = name.partition("/")
        if tower == "image_tower":
            module = make_image_tower(axis=None, dtype=self.dtype, parent=None, **self.vision)
        elif tower == "text_tower":
            module = make_text_tower(vocab=self.vocab, dtype=self.dtype, parent=None, **self.text)
        else:
            return False
        return module.is_frozen(rest.partition("/")[0])

    def setup(self) -> None:
        """Make towers and heads."""
        self.image_tower = make_image_tower(axis=self.axis, dtype=self.dtype, **self.vision)
        self.text_tower = make_text_tower(vocab=self.vocab, dtype=self.dtype, **self.text)
        for name, kind in self.heads.items():
            if kind != "shared":
                head = Head(kind, self.hidden, self.dim, self.axis, self.dtype)
                setattr(self, f"{name}_head", head)
        if self.fine:
            self.image_fine_head = FineHead(self.dim, self.axis, self.dtype)

    def stages(self, image: UInt8[Array, "B Y X 1"], train: bool = False) -> Stages:
        """Encode images (grey, 0..255) by the tower alone, before any head of pre-training."""
        seen = self.image_tower(self._standardise(image), train)
        return jax.tree.map(lambda x: x.astype(jnp.float32), Stages(seen.pooled, seen.stages))

    def _standardise(self, image: UInt8[Array, "B Y X 1"]) -> Float[Array, "B Y X C"]:
        x = jnp.repeat(image.astype(jnp.float32) / 255, self.channels, -1)
        if self.standard == "image":
            mean, std = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
            x = (x - mean) / (std + 1e-3)
        else:
            x = (x - 0.5) / 0.5
        return x.astype(self.dtype)

    def encode_image(self, image: UInt8[Array, "B Y X 1"], train: bool = False) -> Features:
        """Encode images (grey, 0..255)."""
        seen = self.image_tower(self._standardise(image), train)
        pooled = self.image_global_head(seen.pooled, train)
        if self.heads["image_local"] == "shared":
            local = self.image_global_head(seen.local, False)
        else:
            local = self.image_local_head(seen.local, train)
        grid, fine, fine_grid = local.shape[1:3], None, None
        if self.fine:
            fine = self.image_fine_head(seen.fine, seen.local, train)
            fine_grid, fine = fine.shape[1:3], fine.reshape(fine.shape[0], -1, self.dim)
        local = local.reshape(local.shape[0], -1, self.dim)
        mask = jnp.ones(local.shape[:2], bool)
        raw = seen.local.reshape(*local.shape[:2], -1).astype(jnp.float32)
        return Features(
            pooled,
            local,
            mask,
            fine=fine,
            raw=raw,
            attention=seen.attention,
            grid=grid,
            fine_grid=fine_grid,
        )

    def encode_text(self, text: TextBatch, train: bool = False) -> Features:
        """Encode texts."""
        mask = text.word_id > 0
        out = self.text_tower(text.tokens, text.word_index, text.sentence, train)
        pooled = self.text_global_head(out.pooled, train)
        if self.heads["text_local"] == "shared":
            local = self.text_global_head(out.words, False)
        else:
            local = self.text_local_head(out.words, train, mask)
        attention = out.attention * mask
        raw = out.words.astype(jnp.float32)
        return Features(
            pooled,
            local * mask[..., None],
            mask,
            text.word_id,
            text.sentence,
            raw=raw,
            attention=attention,
        )

    def __call__(self, batch: Batch, train: bool = False) -> tuple[Features, Features]:
        """Encode both sides of a batch."""
        return self.encode_image(batch.image, train), self.encode_text(batch.text, train)
