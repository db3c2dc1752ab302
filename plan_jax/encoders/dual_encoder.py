"""Two towers and their heads: maps images and texts into one shared space, as `Features`.

The local head of the image side is g(.) of PLAN, MGCA and GLoRIA: a learned map from a pixel of
the feature map to the space of the words. Heads are those of the papers, see `HEAD_KINDS`.
Deviation: padded words do not enter the statistics of BatchNorm (they do in MGCA's code).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt8

from plan_jax.encoders.bert import BERTS, Bert
from plan_jax.encoders.bert import EPSILON as BERT_EPSILON
from plan_jax.encoders.resnet import RESNETS, ResNet
from plan_jax.encoders.vit import VITS, ViT
from plan_jax.layers.batch_norm import BatchNorm
from plan_jax.layers.dense import Dense
from plan_jax.layers.pooling import mean_cells
from plan_jax.layers.resize import resize_bilinear
from plan_jax.layers.transformer import exact_gelu
from plan_jax.types import Batch, Features, Stages, TextBatch

# Normalisation of grey values from 0 to 1 -> mean and deviation, of three colours or of all.
MEAN_AND_STD: dict[str, tuple[Any, Any]] = {
    "fixed": (0.5, 0.5),  # MGCA, GLoRIA, M-FLAG
    "unit": (0.0, 1.0),  # BioViL, BioViL-T
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ASG, MedKLIP, REFERS, ConVIRT
    "medclip": (0.5862785803043838, 0.27950088968644304),
    "mrm": (0.4978, 0.2449),
    "rad_dino": (0.5307, 0.2583),
}
# `image` scales each image to mean 0 and variance 1.
NORMALISATIONS = ("image", *MEAN_AND_STD)
# Kind of a projection head -> its layers. LayerNorm is BERT's, the last BatchNorm has no scale.
HEAD_KINDS = {
    "linear": "Linear (GLoRIA)",
    "norm": "Linear, BatchNorm",
    "mlp": "Linear, BatchNorm, ReLU, Linear, BatchNorm (MGCA, M-FLAG, PLAN)",
    "mlp_bn": "Linear, BatchNorm, ReLU, Linear (BioViL)",
    "mlp_relu": "Linear, ReLU, Linear (ConVIRT)",
    "mlp_ln": "Linear, GELU, LayerNorm, Linear (CXR-BERT)",
}
# Kinds without parameters of their own: the global head for each pixel or word, the mean of the
# projected pixels, and the tower's own output.
PLAIN_KINDS = ("shared", "mean", "none")


def make_image_tower(name: str, axis: str | None, dtype: Any, **sizes: Any) -> ResNet | ViT:
    """Returns the image tower called `name` (a row of RESNETS or VITS), with `sizes` replaced.

    Raises:
      KeyError: no tower has this name.
      TypeError: the tower has no such size.
    """
    if name in RESNETS:
        return ResNet(axis=axis, dtype=dtype, **{**RESNETS[name], **sizes})
    return ViT(dtype=dtype, **{**VITS[name], **sizes})


def make_text_tower(name: str, vocab_size: int, dtype: Any, **sizes: Any) -> Bert:
    """Returns the text tower called `name` (a row of BERTS), with `sizes` replaced.

    Raises:
      KeyError: no tower has this name.
      TypeError: the tower has no such size.
    """
    return Bert(vocab_size=vocab_size, dtype=dtype, **{**BERTS[name], **sizes})


class ProjectionHead(nn.Module):
    """A projection to the shared space; `HEAD_KINDS` lists the layers of each `kind`."""

    kind: str
    hidden_dim: int
    embed_dim: int
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B E"], train: bool, mask: Bool[Array, "*B"] | None = None
    ) -> Float[Array, "*B D"]:
        """Projects the last axis; positions where mask is False do not enter any statistics."""
        if self.kind.startswith("mlp"):
            # BatchNorm subtracts the mean, so a bias before it would have no effect.
            has_bias = self.kind in ("mlp_relu", "mlp_ln")
            x = Dense(self.hidden_dim, use_bias=has_bias, dtype=self.dtype, name="fc1")(x)
            if self.kind == "mlp_ln":
                x = nn.LayerNorm(BERT_EPSILON, name="norm1")(exact_gelu(x))
            elif self.kind == "mlp_relu":
                x = nn.relu(x)
            else:
                x = nn.relu(BatchNorm(self.axis, name="norm1")(x, train, mask))
        x = Dense(self.embed_dim, dtype=self.dtype, name="fc2")(x).astype(jnp.float32)
        if self.kind not in ("norm", "mlp"):
            return x
        return BatchNorm(self.axis, affine=False, name="norm2")(x, train, mask)


def describe_grey(image: UInt8[Array, "B Y X 1"], grid: tuple[int, int]) -> Float[Array, "B Q 2"]:
    """Returns the mean and the standard deviation of grey values in each cell of a grid.

    Both are scaled to mean 0 and variance 1 over the image, so that they do not depend on its
    exposure; an image of one grey value has 0 everywhere.
    """
    grey = image.astype(jnp.float32) / 255
    # Around the mean, or the difference of squares would be of rounding errors.
    grey = grey - grey.mean((1, 2), keepdims=True)
    mean = mean_cells(grey, grid)
    deviation = jnp.sqrt(jnp.maximum(mean_cells(grey**2, grid) - mean**2, 0))
    values = jnp.concatenate([mean, deviation], -1).reshape(image.shape[0], -1, 2)
    values = values - values.mean(1, keepdims=True)
    return values / (values.std(1, keepdims=True) + 1e-3)


class FineHead(nn.Module):
    """Projects the finer map and adds the projected coarse one (a lateral connection).

    Source: Lin et al., arXiv 1612.03144 (feature pyramid), with one level.
    """

    embed_dim: int
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(
        self, fine: Float[Array, "B V U C"], coarse: Float[Array, "B Y X E"], train: bool
    ) -> Float[Array, "B V U D"]:
        """Returns the projected pixels of the finer map."""
        lateral = Dense(self.embed_dim, dtype=self.dtype, name="lateral")(fine)
        # One bias is enough for the sum of two projections.
        top = Dense(self.embed_dim, use_bias=False, dtype=self.dtype, name="top")(coarse)
        top = resize_bilinear(top.astype(jnp.float32), (fine.shape[1], fine.shape[2]))
        pixels = lateral.astype(jnp.float32) + top
        return BatchNorm(self.axis, affine=False, name="norm")(pixels, train)


class DualEncoder(nn.Module):
    """Both towers with their four heads (global and local, image and text).

    Attributes:
      vision, text: the name of each tower and the sizes to replace, see `make_image_tower`.
      heads: the kind of each head: image_global, image_local, text_global, text_local. A `shared`
        local head is the global one, applied to each pixel or word with its running statistics
        (ConVIRT has no local head: its heat map is a class activation map). The global vector of
        `mean` is that of an image's projected pixels (BioViL). With `none`, a text's vectors are
        those of the tower (GLoRIA).
      normalisation: of grey values x from 0 to 1: `image` (each image to mean 0, variance 1), or
        (x - mean) / deviation by `MEAN_AND_STD`.
      channels: how often the grey channel is repeated; `imagenet` needs 3.
      fine_map: whether there is a head on the map one stage earlier.
      axis: the mapped device axis of BatchNorm; None on one device.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    heads: dict[str, str]
    vocab_size: int
    embed_dim: int = 128
    head_hidden_dim: int = 2048
    normalisation: str = "fixed"
    channels: int = 3
    fine_map: bool = False
    axis: str | None = None
    dtype: Any = jnp.float32

    def is_frozen(self, path: str) -> bool:
        """Returns whether the parameter at `path`, as `image_tower/stem/kernel`, is frozen."""
        tower_name, _, rest = path.partition("/")
        options = {"dtype": self.dtype, "parent": None}
        tower: ResNet | ViT | Bert
        if tower_name == "image_tower":
            tower = make_image_tower(axis=None, **options, **self.vision)
        elif tower_name == "text_tower":
            tower = make_text_tower(vocab_size=self.vocab_size, **options, **self.text)
        else:
            return False
        return tower.is_frozen(rest.partition("/")[0])

    def setup(self) -> None:
        """Builds towers and heads."""
        self.image_tower = make_image_tower(axis=self.axis, dtype=self.dtype, **self.vision)
        self.text_tower = make_text_tower(vocab_size=self.vocab_size, dtype=self.dtype, **self.text)
        for name, kind in self.heads.items():
            if kind not in PLAIN_KINDS:
                head = ProjectionHead(
                    kind, self.head_hidden_dim, self.embed_dim, self.axis, self.dtype
                )
                setattr(self, f"{name}_head", head)
        if self.fine_map:
            self.image_fine_head = FineHead(self.embed_dim, self.axis, self.dtype)

    def extract_stages(self, image: UInt8[Array, "B Y X 1"], train: bool = False) -> Stages:
        """Encodes grey images (0..255) by the tower only, without the heads of pre-training."""
        output = self.image_tower(self._normalise(image), train)
        stages = Stages(output.pooled, output.stages)
        # The heads of tasks compute in float32, whatever the tower's dtype.
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stages)

    def encode_image(self, image: UInt8[Array, "B Y X 1"], train: bool = False) -> Features:
        """Encodes grey images (0..255)."""
        output = self.image_tower(self._normalise(image), train)
        if self.heads["image_local"] == "shared":
            # Batch statistics of pixels differ from those of whole images: use the running ones.
            local = self.image_global_head(output.local, False)
        else:
            local = self.image_local_head(output.local, train)
        if self.heads["image_global"] == "mean":
            pooled = local.mean((1, 2))
        else:
            pooled = self.image_global_head(output.pooled, train)
        batch, *grid = local.shape[:3]
        fine = guide = fine_grid = None
        if self.fine_map:
            assert output.fine is not None, "fine_map needs an image tower with a finer map"
            fine = self.image_fine_head(output.fine, output.local, train)
            fine_grid = fine.shape[1], fine.shape[2]
            fine = fine.reshape(batch, -1, self.embed_dim)
            guide = describe_grey(image, fine_grid)
        local = local.reshape(batch, -1, self.embed_dim)
        return Features(
            pooled,
            local,
            mask=jnp.ones(local.shape[:2], bool),
            fine=fine,
            raw=output.local.reshape(*local.shape[:2], -1).astype(jnp.float32),
            attention=output.attention,
            guide=guide,
            grid=tuple(grid),
            fine_grid=fine_grid,
        )

    def encode_text(
        self, text: TextBatch, train: bool = False, index: Int[Array, " B"] | None = None
    ) -> Features:
        """Encodes texts; vectors and attention of padded words are 0.

        `index` is the place of each text in the whole batch, to which its dropout belongs.
        """
        mask = text.word_id > 0
        output = self.text_tower(text.tokens, text.word_index, text.sentence, train, index)
        pooled, local = output.pooled.astype(jnp.float32), output.words.astype(jnp.float32)
        if self.heads["text_global"] != "none":
            pooled = self.text_global_head(output.pooled, train)
        if self.heads["text_local"] == "shared":
            local = self.text_global_head(output.words, False)
        elif self.heads["text_local"] != "none":
            local = self.text_local_head(output.words, train, mask)
        next_attention = output.next_attention
        return Features(
            pooled,
            local * mask[..., None],
            mask,
            word_id=text.word_id,
            sentence=text.sentence,
            raw=output.words.astype(jnp.float32),
            attention=output.attention * mask,
            next_attention=None if next_attention is None else next_attention * mask,
        )

    def __call__(
        self, batch: Batch, train: bool = False, index: Int[Array, " B"] | None = None
    ) -> tuple[Features, Features]:
        """Encodes both sides of a batch; `index` is that of `encode_text`."""
        return self.encode_image(batch.image, train), self.encode_text(batch.text, train, index)

    def _normalise(self, image: UInt8[Array, "B Y X 1"]) -> Float[Array, "B Y X C"]:
        pixels = jnp.repeat(image.astype(jnp.float32) / 255, self.channels, -1)
        if self.normalisation == "image":
            mean = pixels.mean((1, 2, 3), keepdims=True)
            std = pixels.std((1, 2, 3), keepdims=True)
            pixels = (pixels - mean) / (std + 1e-3)  # an image of one grey value has std 0
        else:
            mean, std = map(jnp.asarray, MEAN_AND_STD[self.normalisation])
            pixels = (pixels - mean) / std
        return pixels  # in float32: a tower may resize them before it rounds them
