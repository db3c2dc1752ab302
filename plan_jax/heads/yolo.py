"""YOLOv3's head and loss as MGCA fits them to frozen ResNet maps.

Source: Redmon and Farhadi, arXiv 1804.02767, with the blocks, weights and means of MGCA's code
(github.com/HKU-MedAI/MGCA, mgca/models/ssl_detector.py and mgca/utils/yolo_loss.py).
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from plan_jax.heads.anchors import anchors_at, assign
from plan_jax.heads.pyramid import KERNEL, ConvNorm, Pyramid

SLOPE = 0.1  # of LeakyReLU, YOLOv3
ANCHORS_A_CELL = 3
PLACE, SIZE, EMPTY = 2.5, 2.5, 0.5  # weights of the losses; those of objects and classes are 1


class Yolo(nn.Module):
    """Three maps of boxes, coarsest first, for `classes` classes.

    On each map six blocks, 1x1 with `widths[n]` and 3x3 with twice as many by turns, and a 1x1
    convolution with bias to the numbers of three anchors; what the fifth block gives goes through
    a 1x1 block of the next width, is enlarged (nearest) and joined to the next finer map.
    """

    classes: int
    widths: tuple[int, int, int] = (512, 256, 128)

    @nn.compact
    def __call__(
        self, maps: Sequence[Float[Array, "B _ _ _"]], rows: object = None, train: bool = False
    ) -> tuple[Float[Array, "B _ _ A E"], ...]:
        """Read one to three maps [B Y X C], finest first; `rows` is not looked at."""
        maps = Pyramid(name="pyramid")(maps, train)
        outputs, below = [], None
        for level, (seen, width) in enumerate(zip(reversed(maps), self.widths, strict=True)):
            block = partial(ConvNorm, slope=SLOPE)
            x = seen
            if below is not None:
                below = block(width, 1, name=f"up_{level}")(below, train)
                x = jnp.concatenate([enlarge(below, seen.shape[1:3]), seen], -1)
            for n in range(5):
                x = block(width * (1 + n % 2), 1 + 2 * (n % 2), name=f"block_{level}_{n}")(x, train)
            below = x
            x = block(2 * width, 3, name=f"block_{level}_5")(x, train)
            numbers = ANCHORS_A_CELL * (5 + self.classes)
            x = nn.Conv(numbers, (1, 1), kernel_init=KERNEL, name=f"out_{level}")(x)
            outputs.append(x.reshape(*x.shape[:3], ANCHORS_A_CELL, -1))
        return tuple(outputs)


def enlarge(x: Float[Array, "B Y X C"], size: tuple[int, int]) -> Float[Array, "B V U C"]:
    """Repeat pixels until a map has `size` (V, U) or more, and cut off what is too much.

    >>> enlarge(jnp.arange(2.0).reshape(1, 1, 2, 1), (2, 3))[0, :, :, 0].tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """
    for axis, wanted in enumerate(size, 1):
        x = jnp.repeat(x, -(-wanted // x.shape[axis]), axis)
    return x[:, : size[0], : size[1]]


def loss(
    outputs: Sequence[Float[Array, "B _ _ A E"]],
    boxes: Float[Array, "B R 4"],
    real: Bool[Array, "B R"],
    classes: Int[Array, "B R"],
    *,
    size: tuple[int, int],
    average: Literal["cells", "objects"] = "cells",
    published: bool = False,
) -> Float[Array, ""]:
    """Give the loss of three maps, coarsest first, against the true boxes of images of `size`.

    *2.5 (BCE(x) + BCE(y) + MSE(w) + MSE(h)) + BCE(objectness | assigned) + 0.5 BCE(objectness |
    background) + BCE(classes)*, summed over the maps. With `average="cells"` every term is zero
    where its anchor is not assigned (not background) and averaged over all anchors of all cells,
    as published, so that a box's place counts little; `"objects"` (ours) averages over what is
    assigned, and the background's over the background. `published` is that of `assign`. Boxes
    that are not `real` change nothing; images without any teach the background.
    """
    count = outputs[0].shape[-1] - 5
    total = jnp.zeros(())
    for raw, anchors in zip(outputs, anchors_at(size), strict=True):
        raw = raw.astype(jnp.float32)
        one = partial(
            assign,
            anchors=anchors,
            grid=raw.shape[1:3],
            size=size,
            count=count,
            published=published,
        )
        goal = jax.vmap(one)(boxes, real, classes)
        have, empty = goal.assigned.astype(jnp.float32), goal.background.astype(jnp.float32)
        objects = empties = float(have.size)
        if average == "objects":
            objects, empties = jnp.maximum(have.sum(), 1), jnp.maximum(empty.sum(), 1)
        place = cross_entropy(raw[..., :2], goal.place).sum(-1)
        sides = ((raw[..., 2:4] - goal.size) ** 2).sum(-1)
        kind = cross_entropy(raw[..., 5:], goal.classes).mean(-1)
        present, absent = (cross_entropy(raw[..., 4], jnp.float32(n)) for n in (1, 0))
        total += ((PLACE * place + SIZE * sides + present + kind) * have).sum() / objects
        total += EMPTY * (absent * empty).sum() / empties
    return total


def cross_entropy(logits: Float[Array, "*B"], target: Float[Array, "..."]) -> Float[Array, "*B"]:
    """Give the binary cross-entropy of sigmoid(logits): finite however large they are.

    *max(l, 0) - l t + log(1 + exp(-|l|))*, `target` [*B] from 0 to 1.
    """
    return jnp.maximum(logits, 0) - logits * target + jnp.log1p(jnp.exp(-jnp.abs(logits)))
