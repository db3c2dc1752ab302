"""YOLOv3's head and loss as MGCA fits them to frozen ResNet maps.

Source: Redmon and Farhadi, arXiv 1804.02767, with the blocks, weights and means of MGCA's code
(github.com/HKU-MedAI/MGCA, mgca/models/ssl_detector.py and mgca/utils/yolo_loss.py).
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from plan_jax.heads.anchors import anchors_for_size, assign_targets
from plan_jax.heads.pyramid import KERNEL_INIT, ConvNorm, Pyramid
from plan_jax.layers.resize import resize_nearest

SLOPE = 0.1  # of LeakyReLU, YOLOv3
ANCHORS_PER_CELL = 3
# Weights of the losses of offsets, sides and background; those of objects and classes are 1.
OFFSET_WEIGHT, SIDE_WEIGHT, BACKGROUND_WEIGHT = 2.5, 2.5, 0.5


class Yolo(nn.Module):
    """Predicts three maps of boxes, coarsest first, for `classes` classes.

    Each map passes through six blocks, 1x1 of `widths[n]` and 3x3 of twice as many in turn, and a
    1x1 convolution with bias to the outputs of three anchors. The output of the fifth block also
    passes through a 1x1 block of the next width, is upsampled (nearest) and joined to the next
    finer map.
    """

    classes: int
    widths: tuple[int, int, int] = (512, 256, 128)

    @nn.compact
    def __call__(
        self,
        features: Sequence[Float[Array, "B _ _ _"]],
        examples: object = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B _ _ A E"], ...]:
        """Returns the outputs from one to three maps [B Y X C], finest first.

        `examples` is unused; `train` switches BatchNorm to batch statistics.
        """
        maps = Pyramid(name="pyramid")(features, train)
        block = partial(ConvNorm, slope=SLOPE)
        outputs, coarser = [], None
        for level, (x, width) in enumerate(zip(reversed(maps), self.widths, strict=True)):
            if coarser is not None:
                coarser = block(width, 1, name=f"up_{level}")(coarser, train)
                x = jnp.concatenate([resize_nearest(coarser, (x.shape[1], x.shape[2])), x], -1)
            for n in range(5):
                x = block(width * (1 + n % 2), 1 + 2 * (n % 2), name=f"block_{level}_{n}")(x, train)
            coarser = x
            x = block(2 * width, 3, name=f"block_{level}_5")(x, train)
            channels = ANCHORS_PER_CELL * (5 + self.classes)
            x = nn.Conv(channels, (1, 1), kernel_init=KERNEL_INIT, name=f"out_{level}")(x)
            outputs.append(x.reshape(*x.shape[:3], ANCHORS_PER_CELL, -1))
        return tuple(outputs)


def yolo_loss(
    outputs: Sequence[Float[Array, "B _ _ A E"]],
    boxes: Float[Array, "B R 4"],
    mask: Bool[Array, "B R"],
    classes: Int[Array, "B R"],
    *,
    size: tuple[int, int],
    average: Literal["cells", "objects"] = "cells",
    published_background: bool = False,
) -> Float[Array, ""]:
    """Computes the loss of three maps, coarsest first, against the true boxes of the images.

    *2.5 (BCE(x) + BCE(y) + MSE(w) + MSE(h)) + BCE(objectness | assigned) + 0.5 BCE(objectness |
    background) + BCE(classes)*, summed over the maps, BCE the binary cross-entropy of a sigmoid.

    Args:
      outputs: the maps that `Yolo` returns.
      boxes: the true boxes, padded.
      mask: True where a box is real. Padding changes nothing; an image without boxes teaches the
        background.
      classes: the class of each box.
      size: rows and columns of the images, in pixels.
      average: with `cells` every term is zero where its anchor is not assigned (not background) and
        averaged over all anchors of all cells, as published, so that the place of a box weighs
        little. `objects` (ours) averages over assigned anchors, and the background's term over the
        background.
      published_background: that of `assign_targets`.
    """
    num_classes = outputs[0].shape[-1] - 5
    cross_entropy = optax.sigmoid_binary_cross_entropy
    total = jnp.zeros(())
    for raw, anchors in zip(outputs, anchors_for_size(size), strict=True):
        raw = raw.astype(jnp.float32)
        assign = partial(
            assign_targets,
            anchors=anchors,
            grid=(raw.shape[1], raw.shape[2]),
            size=size,
            num_classes=num_classes,
            published_background=published_background,
        )
        targets = jax.vmap(assign)(boxes, mask, classes)
        assigned = targets.assigned.astype(jnp.float32)
        background = targets.background.astype(jnp.float32)
        num_assigned = num_background = jnp.asarray(float(assigned.size))
        if average == "objects":
            # At least 1: a batch may have no box.
            num_assigned = jnp.maximum(assigned.sum(), 1)
            num_background = jnp.maximum(background.sum(), 1)
        offset_loss = cross_entropy(raw[..., :2], targets.offset).sum(-1)
        side_loss = ((raw[..., 2:4] - targets.log_sides) ** 2).sum(-1)
        class_loss = cross_entropy(raw[..., 5:], targets.classes).mean(-1)
        object_loss = cross_entropy(raw[..., 4], jnp.ones_like(assigned))
        background_loss = cross_entropy(raw[..., 4], jnp.zeros_like(background))
        box_loss = OFFSET_WEIGHT * offset_loss + SIDE_WEIGHT * side_loss + object_loss + class_loss
        total += (box_loss * assigned).sum() / num_assigned
        total += BACKGROUND_WEIGHT * (background_loss * background).sum() / num_background
    return total
