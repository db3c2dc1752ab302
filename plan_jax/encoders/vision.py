"""Image towers: ResNet and ViT in Flax linen; a size is a row of data, not a class.

Sources: He et al., arXiv 1512.03385 (ResNet, torchvision's v1.5 strides); Dosovitskiy et al.,
arXiv 2010.11929 (ViT). A tower maps images Float[B Y X C] to `Seen`: a pooled vector, a
feature map and, from ResNets, the finer map before it.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

RESNETS = {
    "resnet50": {
        "stem": "conv7", "widths": (64, 128, 256, 512), "depths": (3, 4, 6, 3),
        "bottleneck": True, "local_stage": 2,
    },
    "resnet18": {
        "stem": "conv7", "widths": (64, 128, 256, 512), "depths": (2, 2, 2, 2),
        "bottleneck": False, "local_stage": 2,
    },
    "resnet_small": {
        "stem": "patch4", "stem_width": 32, "widths": (32, 64), "depths": (1, 2),
        "bottleneck": False, "local_stage": 1,
    },
    "resnet_tiny": {
        "stem": "patch4", "stem_width": 8, "widths": (8, 16), "depths": (1, 1),
        "bottleneck": False, "local_stage": 1,
    },
}  # fmt: skip
VITS = {
    "vit_b16": {"patch": 16, "width": 768, "depth": 12, "heads": 12},
    "vit_s16": {"patch": 16, "width": 384, "depth": 12, "heads": 6},
    "vit_ti16": {"patch": 16, "width": 192, "depth": 12, "heads": 3},
    "vit_small": {"patch": 8, "width": 96, "depth": 4, "heads": 4},
    "vit_tiny": {"patch": 8, "width": 16, "depth": 1, "heads": 2},
}


class Seen(NamedTuple):
    """What a tower sees in B images: pooled vectors and the pixels of its feature map.

    `fine` is the map one stage earlier: more pixels, a smaller field of view; or None. `attention`
    is that of ViT's class token to the patches in the last layer, mean over heads; or None.
    """

    pooled: Float[Array, "B E"]
    local: Float[Array, "B Y X C"]
    fine: Float[Array, "B V U C"] | None = None
    attention: Float[Array, "B P"] | None = None


def conv2d(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "H W C E"], stride: int, pad: int
) -> Float[Array, "B V U E"]:
    """Convolve with zero padding `pad` on every side (torch's convention), no bias."""
    height, width, _, out = kernel.shape
    if height == width == stride and not pad:  # nothing overlaps: one matrix product
        rows, cols = x.shape[1] // stride, x.shape[2] // stride
        x = x[:, : rows * stride, : cols * stride]
        x = rearrange(x, "b (v h) (u w) c -> b v u (h w c)", h=height, w=width)
        return x @ kernel.reshape(-1, out)
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv(nn.Module):
    """A convolution without bias; the kernel is [H W C E]."""

    features: int
    size: int
    stride: int = 1
    pad: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U E"]:
        """Apply it."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape)
        return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.pad)


class Norm(nn.Module):
    """BatchNorm as torch has it (momentum 0.1, eps 1e-5, unbiased running variance).

    Statistics are sums over all devices of `axis` divided by one count, so that they are the same
    on any number of devices also where a mask leaves them different shares.
    """

    axis: str | None
    affine: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B C"], train: bool, mask: Bool[Array, "*B"] | None = None
    ) -> Float[Array, "*B C"]:
        """Normalise over all but the last axis; positions where mask is False do not count."""
        dtype, x, width = x.dtype, x.astype(jnp.float32), x.shape[-1]
        mean_kept = self.variable("batch_stats", "mean", jnp.zeros, width)
        var_kept = self.variable("batch_stats", "var", jnp.ones, width)
        mean, var = mean_kept.value, var_kept.value
        if train:
            real = jnp.ones(x.shape[:-1]) if mask is None else mask.astype(jnp.float32)
            real = real.reshape(-1, 1)
            flat = x.reshape(-1, width)
            count = jnp.maximum(self._sum(real), 1.0)
            mean = self._sum(flat * real) / count
            var = self._sum((flat - mean) ** 2 * real) / count
            if not self.is_initializing():
                mean_kept.value = 0.9 * mean_kept.value + 0.1 * mean
                unbiased = var * count / jnp.maximum(count - 1, 1.0)
                var_kept.value = 0.9 * var_kept.value + 0.1 * unbiased
        y = (x - mean) * lax.rsqrt(var + 1e-5)
        if self.affine:
            y = y * self.param("scale", nn.initializers.ones, (width,))
            y = y + self.param("bias", nn.initializers.zeros, (width,))
        return y.astype(dtype)

    def _sum(self, x: Float[Array, "N C"]) -> Float[Array, " C"]:
        """Sum the rows on all devices."""
        total = x.sum(0)
        return total if self.axis is None or self.is_initializing() else lax.psum(total, self.axis)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 four times as wide (bottleneck)."""

    width: int
    stride: int
    bottleneck: bool
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], train: bool) -> Float[Array, "B V U E"]:
        """Apply it."""
        out = self.width * (4 if self.bottleneck else 1)
        sizes = (1, 3, 1) if self.bottleneck else (3, 3)
        widths = (self.width, self.width, out) if self.bottleneck else (self.width, out)
        strided = 1 if self.bottleneck else 0
        y = x
        for n, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            stride = self.stride if n == strided else 1
            y = Conv(width, size, stride, size // 2, self.dtype, name=f"conv{n + 1}")(y)
            y = Norm(self.axis, name=f"norm{n + 1}")(y, train)
            y = nn.relu(y) if n < len(sizes) - 1 else y
        if x.shape != y.shape:
            x = Conv(out, 1, self.stride, 0, self.dtype, name="conv_skip")(x)
            x = Norm(self.axis, name="norm_skip")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet; `local` is the map after stage `local_stage`, `pooled` the mean of the last one.

    `position` adds a learned map to the local stage's input-independent place code, and `pool`
    may join the mean with the maximum: both help small towers trained from scratch.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    bottleneck: bool
    stem: str = "conv7"
    stem_width: int = 64
    local_stage: int = 2
    position: bool = False
    pool: Literal["mean", "mean_max"] = "mean"
    axis: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], train: bool = False) -> Seen:
        """See B images."""
        x = self._stem(x, train)
        local = fine = x
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for n in range(depth):
                stride = 2 if stage > 0 and n == 0 else 1
                name = f"layer{stage + 1}_{n}"
                x = Block(width, stride, self.bottleneck, self.axis, self.dtype, name=name)(
                    x, train
                )
                if self.position and stage == self.local_stage and n == 0:
                    init = nn.initializers.normal(0.1)
                    x = x + self.param("position", init, x.shape[1:]).astype(x.dtype)
            local = x if stage == self.local_stage else local
            fine = x if stage == self.local_stage - 1 else fine
        pooled = x.mean((1, 2))
        if self.pool == "mean_max":
            pooled = jnp.concatenate([pooled, x.max((1, 2))], -1)
        return Seen(pooled, local, fine)

    def _stem(self, x: Float[Array, "B Y X C"], train: bool) -> Float[Array, "B V U E"]:
        patch = self.stem.startswith("patch")
        size, pad = (int(self.stem[5:]), 0) if patch else (7, 3)
        x = Conv(self.stem_width, size, size if patch else 2, pad, self.dtype, name="stem")(x)
        x = nn.relu(Norm(self.axis, name="stem_norm")(x, train))
        if not patch:
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        return x


def first_attention(
    q: Float[Array, "B N H C"], k: Float[Array, "B N H C"], mask: Bool[Array, "B N"] | None = None
) -> Float[Array, "B N"]:
    """Give the softmax attention of the first token to all that mask leaves, mean over heads."""
    logits = jnp.einsum("bhc,bnhc->bhn", q[:, 0], k).astype(jnp.float32) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, -1e9)
    return jax.nn.softmax(logits, -1).mean(1)


class Layer(nn.Module):
    """A pre-norm transformer layer of ViT (LayerNorm eps 1e-6, exact GELU)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N E"]
    ) -> tuple[Float[Array, "B N E"], Float[Array, "B N"]]:
        """Apply it; also give the attention of the first token, mean over heads."""
        width = x.shape[-1]
        y = nn.LayerNorm(1e-6, name="norm1")(x).astype(self.dtype)
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(y)
        q, k, v = rearrange(qkv, "b n (t h e) -> t b n h e", t=3, h=self.heads)
        y = rearrange(jax.nn.dot_product_attention(q, k, v), "b n h e -> b n (h e)")
        x = x + nn.Dense(width, dtype=self.dtype, name="proj")(y)
        y = nn.LayerNorm(1e-6, name="norm2")(x).astype(self.dtype)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="fc1")(y), approximate=False)
        return x + nn.Dense(width, dtype=self.dtype, name="fc2")(y), first_attention(q, k)


class ViT(nn.Module):
    """Vision transformer with a class token; `pooled` is that token, `local` are the patches."""

    patch: int
    width: int
    depth: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], train: bool = False) -> Seen:
        """See B images."""
        x = Conv(self.width, self.patch, self.patch, 0, self.dtype, name="embed")(x)
        bias = self.param("embed_bias", nn.initializers.zeros, (self.width,))
        x = x + bias.astype(x.dtype)
        grid = (x.shape[1], x.shape[2])
        x = rearrange(x, "b y x c -> b (y x) c")
        init = nn.initializers.normal(0.02)
        token = self.param("token", init, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.repeat(token, x.shape[0], 0), x], 1)
        x = x + self.param("position", init, (1, x.shape[1], self.width)).astype(x.dtype)
        for n in range(self.depth):
            x, attention = Layer(self.heads, self.dtype, name=f"layer{n}")(x)
        x = nn.LayerNorm(1e-6, name="norm")(x)
        local = rearrange(x[:, 1:], "b (y x) c -> b y x c", y=grid[0])
        return Seen(x[:, 0], local, attention=attention[:, 1:])


def make_vision(name: str, axis: str | None, dtype: Any, **changes: Any) -> nn.Module:
    """Make the tower called `name` (a row of RESNETS or VITS), with some of its sizes changed.

    Raises: KeyError for an unknown name, TypeError for an unknown size.
    """
    if name in RESNETS:
        return ResNet(axis=axis, dtype=dtype, **{**RESNETS[name], **changes})
    return ViT(dtype=dtype, **{**VITS[name], **changes})
