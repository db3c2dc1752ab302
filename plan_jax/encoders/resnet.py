"""ResNet in Flax linen; a size is a row of data, not a class.

Source: He et al., arXiv 1512.03385, with torchvision's semantics (v1.5: the 3x3 convolution of a
bottleneck has the stride; its padding; BatchNorm as torch has it).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from plan_jax.encoders import ImageOutput
from plan_jax.layers.batch_norm import BatchNorm
from plan_jax.layers.cpu.convolution import conv2d
from plan_jax.layers.dense import add_parameter
from plan_jax.layers.pooling import max_pixel
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
    padding: int = 0
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B V U E"]:
        """Returns the convolved maps."""
        initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # torchvision's
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", initializer, shape)
        # Parameters stay in float32; only the computation is in `dtype`.
        x, kernel = (jnp.asarray(leaf, self.dtype) for leaf in (x, kernel))
        return conv2d(x, kernel, self.stride, self.padding, self.dilation)


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
        """Returns the maps after the block."""
        out_width = self.width * (4 if self.bottleneck else 1)
        sizes = (1, 3, 1) if self.bottleneck else (3, 3)
        widths = (self.width, self.width, out_width) if self.bottleneck else (self.width, out_width)
        strided_index = sizes.index(3)  # the first 3x3 convolution
        residual = x
        for index, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            stride = self.stride if index == strided_index else 1
            dilation = self.dilation if size == 3 else 1
            padding = dilation * (size // 2)
            name = f"conv{index + 1}"
            conv = Conv(width, size, stride, padding, dilation, self.dtype, name=name)
            residual = conv(residual)
            residual = BatchNorm(self.axis, name=f"norm{index + 1}")(residual, train)
            if index < len(sizes) - 1:  # the last ReLU comes after the sum
                residual = nn.relu(residual)
        skip = x
        if x.shape != residual.shape:
            skip = Conv(out_width, 1, self.stride, dtype=self.dtype, name="conv_skip")(x)
            skip = BatchNorm(self.axis, name="norm_skip")(skip, train)
        return nn.relu(residual + skip)


class ResNet(nn.Module):
    """ResNet; `local` is the map after stage `local_stage`, `pooled` the mean of the last one.

    `resize` is the side in pixels to which images are resized first, 0 for none (MGCA and GLoRIA:
    299, which makes the third stage's map 19 x 19). The last `dilated` stages have dilations
    instead of strides, as torchvision's `replace_stride_with_dilation` (an option of BioViL).
    `position` adds a learned map of positions to the local stage, and the pooling `mean_max`
    concatenates the mean and the maximum: both help small towers trained from scratch. `remat`
    recomputes the activations inside a block in the backward pass instead of storing them. With
    `scan` the equal blocks of a stage, all but its first, are one `lax.scan` over their stacked
    parameters: a program of one of them, which compiles in less time, for a copy of the
    parameters. With `frozen_layers` above 0, the stem and that many stages are frozen: no gradient,
    and BatchNorm as in evaluation.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    bottleneck: bool
    stem: str = "conv7"  # or patch4, a convolution of 4 x 4 pixels at stride 4
    stem_width: int = 64  # channels of the first convolution
    local_stage: int = 2
    resize: int = 0
    dilated: int = 0
    position: bool = False
    pool: Literal["mean", "mean_max"] = "mean"  # of the last map, into one vector
    scan: bool = False
    remat: bool = False
    frozen_layers: int = 0
    axis: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "B Y X C"], train: bool = False) -> ImageOutput:
        """Encodes B images; `train` switches BatchNorm to batch statistics."""
        x = resize_align_corners(image, (self.resize, self.resize)) if self.resize else image
        stem, x = self._stem(x, train and not self.frozen_layers)
        # If the local stage is the first one, the map before it is the stem's.
        local = fine = x
        stages = [lax.stop_gradient(stem) if self.frozen_layers else stem]
        for stage in range(len(self.widths)):
            is_trained = stage >= self.frozen_layers
            x = self._stage(stage, x, train and is_trained)
            x = x if is_trained else lax.stop_gradient(x)
            stages.append(x)
            local = x if stage == self.local_stage else local
            fine = x if stage == self.local_stage - 1 else fine
        pooled = x.astype(jnp.float32).mean((1, 2))
        if self.pool == "mean_max":
            pooled = jnp.concatenate([pooled, max_pixel(x)], -1)
        return ImageOutput(pooled, local, fine, stages=tuple(stages))

    def is_frozen(self, name: str) -> bool:
        """Returns whether `frozen_layers` freezes this tower's parameters called `name`."""
        if name == "position":
            return self.local_stage < self.frozen_layers
        if name.startswith("layer"):  # layer{stage}_{block}, stages from 1 as torchvision counts
            return int(name.removeprefix("layer").partition("_")[0]) <= self.frozen_layers
        return self.frozen_layers > 0

    def _stage(
        self, stage: int, x: Float[Array, "B Y X C"], train: bool
    ) -> Float[Array, "B V U E"]:
        """Applies the blocks of a stage."""
        block_class = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        is_scanned = self.scan and self.depths[stage] > 2 and not self.is_initializing()
        for index in range(1 if is_scanned else self.depths[stage]):
            x = block_class(*self._options(stage, index), name=f"layer{stage + 1}_{index}")(
                x, train
            )
            if self.position and stage == self.local_stage and index == 0:
                position = self.param("position", nn.initializers.normal(0.1), x.shape[1:])
                x = add_parameter(x, position)
        return self._scan_blocks(stage, x, train) if is_scanned else x

    def _options(self, stage: int, index: int) -> tuple[int, int, bool, str | None, Any, int]:
        """Returns the fields of a `Block`, equal for all blocks of a stage but the first."""
        first_dilated = len(self.widths) - self.dilated
        stride = 2 if stage > 0 and index == 0 else 1
        dilation = 1
        if stage >= first_dilated:
            # As in torchvision, the first block keeps the dilation of the stage before.
            dilation = 2 ** (stage - first_dilated + (index > 0))
            stride = 1
        return self.widths[stage], stride, self.bottleneck, self.axis, self.dtype, dilation

    def _scan_blocks(
        self, stage: int, x: Float[Array, "B V U E"], train: bool
    ) -> Float[Array, "B V U E"]:
        """Applies all blocks of a stage but the first as one block over stacked parameters."""
        block = Block(*self._options(stage, 1), parent=None)
        names = [f"layer{stage + 1}_{index}" for index in range(1, self.depths[stage])]
        variables = [
            {kind: self.variables[kind][name] for kind in ("params", "batch_stats")}
            for name in names
        ]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)

        def body(x: Array, variables: Any) -> tuple[Array, Any]:
            y, updated = block.apply(variables, x, train, mutable=["batch_stats"])
            return y, updated["batch_stats"]

        x, stacked_stats = lax.scan(jax.checkpoint(body) if self.remat else body, x, stacked)
        if train and self.is_mutable_collection("batch_stats"):
            for index, name in enumerate(names):
                stats = jax.tree.map(lambda leaf, n=index: leaf[n], stacked_stats)
                self.put_variable("batch_stats", name, stats)
        return x

    def _stem(
        self, x: Float[Array, "B Y X C"], train: bool
    ) -> tuple[Float[Array, "B V U E"], Float[Array, "B _ _ E"]]:
        """Returns the stem's maps before and after pooling; a stem of patches has no pooling."""
        is_patch = self.stem.startswith("patch")
        size = int(self.stem.removeprefix("patch")) if is_patch else 7
        stride, padding = (size, 0) if is_patch else (2, 3)
        x = Conv(self.stem_width, size, stride, padding, dtype=self.dtype, name="stem")(x)
        x = nn.relu(BatchNorm(self.axis, name="stem_norm")(x, train))
        if is_patch:
            return x, x
        return x, nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
