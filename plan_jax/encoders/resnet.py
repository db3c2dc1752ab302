"""ResNet in Flax linen; a size is a row of data, not a class.

Source: He et al., arXiv 1512.03385, with torchvision's semantics (v1.5: the 3x3 convolution of a
bottleneck has the stride; its padding; BatchNorm as torch has it).
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

from plan_jax.encoders.outputs import ImageOutput
from plan_jax.layers.cpu.convolution import conv2d, max_pool
from plan_jax.layers.cpu.normalisation import EPSILON, batch_norm
from plan_jax.layers.resize import resize_align_corners

RESNETS = {
    "resnet50": {
        "stem": "conv7",
        "widths": (64, 128, 256, 512),
        "depths": (3, 4, 6, 3),
        "bottleneck": True,
        "local_stage": 2,
    },
    "resnet34": {
        "stem": "conv7",
        "widths": (64, 128, 256, 512),
        "depths": (3, 4, 6, 3),
        "bottleneck": False,
        "local_stage": 2,
    },
    "resnet18": {
        "stem": "conv7",
        "widths": (64, 128, 256, 512),
        "depths": (2, 2, 2, 2),
        "bottleneck": False,
        "local_stage": 2,
    },
    "resnet_small": {
        "stem": "patch4",
        "stem_width": 32,
        "widths": (32, 64),
        "depths": (1, 2),
        "bottleneck": False,
        "local_stage": 1,
    },
    "resnet_tiny": {
        "stem": "patch4",
        "stem_width": 8,
        "widths": (8, 16),
        "depths": (1, 1),
        "bottleneck": False,
        "local_stage": 1,
    },
}


class Conv(nn.Module):
    """A convolution without bias; the kernel is [H W C E]."""

    features: int
    size: int
    stride: int = 1
    pad: int = 0
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U E"]:
        """Apply it."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return conv2d(x, kernel, self.stride, self.pad, self.dilation)


class Norm(nn.Module):
    """BatchNorm as torch has it (momentum 0.1, eps 1e-5, unbiased running variance).

    Statistics are sums over all devices of `axis` divided by one count, so that they are the same
    on any number of devices also where a mask leaves them different shares.
    """

    axis: str | None
    affine: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B C"],
        train: bool,
        mask: Bool[Array, "*B"] | None = None,
        relu: bool = False,
        added: Float[Array, "*B C"] | None = None,
    ) -> Float[Array, "*B C"]:
        """Normalise over all but the last axis; positions where mask is False do not count.

        `added` is added to the result, and `relu` takes the positive part of that.
        """
        width = x.shape[-1]
        mean_kept = self.variable("batch_stats", "mean", jnp.zeros, width)
        var_kept = self.variable("batch_stats", "var", jnp.ones, width)
        scale, bias = jnp.ones(width), jnp.zeros(width)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (width,))
            bias = self.param("bias", nn.initializers.zeros, (width,))
        if train:
            axis = None if self.is_initializing() else self.axis
            y, (mean, var, count) = batch_norm(x, scale, bias, mask, axis, relu, added)
            if not self.is_initializing():
                unbiased = var * count / jnp.maximum(count - 1, 1.0)
                mean_kept.value = 0.9 * mean_kept.value + 0.1 * mean
                var_kept.value = 0.9 * var_kept.value + 0.1 * unbiased
            return y
        y = (x.astype(jnp.float32) - mean_kept.value) * lax.rsqrt(var_kept.value + EPSILON)
        y = y * scale + bias
        y = y if added is None else y + added.astype(jnp.float32)
        return (nn.relu(y) if relu else y).astype(x.dtype)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 four times as wide (bottleneck)."""

    width: int
    stride: int
    bottleneck: bool
    axis: str | None
    dtype: Any
    dilation: int = 1

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
            dilation = self.dilation if size == 3 else 1
            pad = dilation * (size // 2)
            y = Conv(width, size, stride, pad, dilation, self.dtype, name=f"conv{n + 1}")(y)
            if n < len(sizes) - 1:
                y = Norm(self.axis, name=f"norm{n + 1}")(y, train, relu=True)
        if x.shape != y.shape:
            x = Conv(out, 1, self.stride, dtype=self.dtype, name="conv_skip")(x)
            x = Norm(self.axis, name="norm_skip")(x, train)
        return Norm(self.axis, name=f"norm{len(sizes)}")(y, train, relu=True, added=x)


class ResNet(nn.Module):
    """ResNet; `local` is the map after stage `local_stage`, `pooled` the mean of the last one.

    `resize` first scales the image to so many pixels (MGCA and GLoRIA: 299, which makes the third
    stage's map 19 x 19). The last `dilated` stages have dilations instead of strides, as
    torchvision's `replace_stride_with_dilation` (an option of BioViL). `position` adds a learned
    map to the local stage's input-independent place code, and `pool` may join the mean with the
    maximum: both help small towers trained from scratch. `remat` computes what is inside a block
    again in the backward pass instead of keeping it. The stem and the first `hold` stages, if it is
    more than 0, are frozen: no gradient, BatchNorm as in evaluation.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    bottleneck: bool
    stem: str = "conv7"
    stem_width: int = 64
    local_stage: int = 2
    resize: int = 0
    dilated: int = 0
    position: bool = False
    pool: Literal["mean", "mean_max"] = "mean"
    remat: bool = False
    hold: int = 0
    axis: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], train: bool = False) -> ImageOutput:
        """See B images."""
        x = resize_align_corners(x, (self.resize, self.resize)) if self.resize else x
        stem, x = self._stem(x, train and not self.hold)
        local = fine = x
        stages = [lax.stop_gradient(stem) if self.hold else stem]
        for stage in range(len(self.widths)):
            x = self._stage(stage, x, train and stage >= self.hold)
            x = x if stage >= self.hold else lax.stop_gradient(x)
            stages.append(x)
            local = x if stage == self.local_stage else local
            fine = x if stage == self.local_stage - 1 else fine
        pooled = x.mean((1, 2))
        if self.pool == "mean_max":
            pooled = jnp.concatenate([pooled, x.max((1, 2))], -1)
        return ImageOutput(pooled, local, fine, stages=tuple(stages))

    def is_frozen(self, name: str) -> bool:
        """Say whether the parameters called `name` in this tower are frozen by `hold`."""
        if name == "position":
            return self.local_stage < self.hold
        layer = name.startswith("layer")
        return int(name[5:].partition("_")[0]) <= self.hold if layer else self.hold > 0

    def _stage(self, stage: int, x: Float[Array, "B Y X C"], train: bool) -> Array:
        """Apply the blocks of a stage: [B Y X C] to [B V U E]."""
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        undilated = len(self.widths) - self.dilated
        for n in range(self.depths[stage]):
            stride = 2 if stage > 0 and n == 0 else 1
            dilation = 1
            if stage >= undilated:  # the first block still sees the map of the stage before
                dilation = 2 ** (stage - undilated + (n > 0))
                stride = 1
            x = block(
                self.widths[stage],
                stride,
                self.bottleneck,
                self.axis,
                self.dtype,
                dilation,
                name=f"layer{stage + 1}_{n}",
            )(x, train)
            if self.position and stage == self.local_stage and n == 0:
                init = nn.initializers.normal(0.1)
                x = x + self.param("position", init, x.shape[1:]).astype(x.dtype)
        return x

    def _stem(self, x: Float[Array, "B Y X C"], train: bool) -> tuple[Array, Array]:
        """Give what the stem sees, and that after its pooling: twice [B V U E]."""
        patch = self.stem.startswith("patch")
        size, pad = (int(self.stem[5:]), 0) if patch else (7, 3)
        x = Conv(self.stem_width, size, size if patch else 2, pad, dtype=self.dtype, name="stem")(x)
        x = Norm(self.axis, name="stem_norm")(x, train, relu=True)
        return x, x if patch else max_pool(x, 3, 2, 1)
