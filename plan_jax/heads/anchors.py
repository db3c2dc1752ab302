"""Anchor boxes of a YOLOv3 head: targets from true boxes, decoding, non-maximum suppression.

All functions have static shapes and run under jit and vmap. Boxes are (x0, y0, x1, y1) in pixels. A
map has Y rows, X columns and A anchors in each cell, and its E outputs are (x, y, w, h, objectness,
classes). Source: Redmon and Farhadi, arXiv 1804.02767, as in MGCA's code for detection
(github.com/HKU-MedAI/MGCA, mgca/utils/yolo_loss.py).

Deviation: MGCA counts an assigned anchor with IoU <= 0.5 also as background, so the loss pulls one
output towards 1 and 0; `published_background` reproduces that. Deviation: MGCA suppresses by an IoU
of boxes one pixel larger on each side; ours has no such pixel. Deviation: boxes are clipped to the
image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from plan_jax.metrics.boxes import box_iou

REFERENCE_SIZE = 416  # side in pixels of the images for which YOLOv3's anchors were selected
ANCHORS = (  # widths and heights of the anchors, coarsest map first
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
MIN_SIDE = 1e-6  # in cells; a padded box has no sides, and their logarithm must stay finite


class Targets(NamedTuple):
    """The targets of one map: which anchors have a box, and where.

    `assigned` anchors have a box, `background` ones count as empty. `offset` is the box's centre as
    fractions of its cell, `log_sides` the logarithms of its sides divided by the anchor's. Both are
    0 where no box is assigned, as are `classes`.
    """

    assigned: Bool[Array, "Y X A"]
    background: Bool[Array, "Y X A"]
    offset: Float[Array, "Y X A 2"]
    log_sides: Float[Array, "Y X A 2"]
    classes: Float[Array, "Y X A C"]


class Detections(NamedTuple):
    """The N best candidates of an image, best score first; `mask` is True for detected boxes."""

    boxes: Float[Array, "N 4"]
    scores: Float[Array, " N"]
    classes: Int[Array, " N"]
    mask: Bool[Array, " N"]


def anchors_for_size(size: tuple[int, int]) -> tuple[Float[Array, "A 2"], ...]:
    """Returns YOLOv3's anchors [A 2] (width, height), scaled to an image of `size` (Y, X)."""
    scale = jnp.array([size[1], size[0]], jnp.float32) / REFERENCE_SIZE
    return tuple(jnp.array(level, jnp.float32) * scale for level in ANCHORS)


def shape_iou(sizes: Float[Array, "R 2"], anchors: Float[Array, "A 2"]) -> Float[Array, "R A"]:
    """Computes the IoU of boxes with anchors of the same corner, each side counted one longer.

    *inter = (min(w, w') + 1) (min(h, h') + 1), union = (w + 1)(h + 1) + (w' + 1)(h' + 1) - inter*,
    sides in cells: MGCA's pixel convention, applied to a grid. It makes small shapes more similar.
    """
    intersection = (jnp.minimum(sizes[:, None], anchors[None]) + 1).prod(-1)
    area_sum = (sizes + 1).prod(-1)[:, None] + (anchors + 1).prod(-1)[None]
    return intersection / (area_sum - intersection)


def assign_targets(
    boxes: Float[Array, "R 4"],
    mask: Bool[Array, " R"],
    classes: Int[Array, " R"],
    anchors: Float[Array, "A 2"],
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    num_classes: int,
    ignore_iou: float = 0.5,
    published_background: bool = False,
) -> Targets:
    """Assigns the true boxes of one image to the anchors of one map.

    A box goes to the cell of its centre and there to the anchor of highest `shape_iou` (the first
    among equals). Among boxes at the same anchor of a cell the last one sets the offset and the
    sides, while the classes of all of them are set. A centre on the far border belongs to the last
    cell.

    Args:
      boxes: the true boxes, padded.
      mask: True where a box is real.
      classes: the class of each box.
      anchors: width and height of the map's anchors, in pixels.
      grid: rows and columns of the map.
      size: rows and columns of the image, in pixels.
      num_classes: the number of classes.
      ignore_iou: anchors of a box's cell with a higher `shape_iou` are not background.
      published_background: counts an assigned anchor as background too, unless its `shape_iou`
        exceeds `ignore_iou`.
    """
    cells = jnp.array([grid[1], grid[0]])
    scale = cells / jnp.array([size[1], size[0]])
    low, high = boxes[:, :2] * scale, boxes[:, 2:] * scale
    centre, sides = (low + high) / 2, jnp.maximum(high - low, MIN_SIDE)
    cell = jnp.clip(jnp.floor(centre), 0, cells - 1)
    ious_RA = shape_iou(sides, anchors * scale)
    best = jnp.argmax(ious_RA, 1)
    x, y = cell.astype(jnp.int32).T
    y = jnp.where(mask, y, grid[0])  # padding lies outside the map: every scatter drops it
    zeros_YXA = jnp.zeros((*grid, len(anchors)), jnp.int32)
    # The last box at an anchor, counted from 1; a maximum does not depend on the scatter's order.
    owner_YXA = zeros_YXA.at[y, x, best].max(1 + jnp.arange(len(boxes)), mode="drop")
    similar = (ious_RA > ignore_iou).astype(jnp.int32)
    ignored = zeros_YXA.at[y, x].max(similar, mode="drop") > 0
    class_targets = jnp.zeros((*zeros_YXA.shape, num_classes))
    class_targets = class_targets.at[y, x, best, classes].max(1.0, mode="drop")
    assigned, owner_YXA = owner_YXA > 0, jnp.maximum(owner_YXA - 1, 0)
    log_sides = jnp.log(sides[owner_YXA] / (anchors * scale))
    return Targets(
        assigned=assigned,
        background=~ignored if published_background else ~(ignored | assigned),
        offset=jnp.where(assigned[..., None], (centre - cell)[owner_YXA], 0.0),
        log_sides=jnp.where(assigned[..., None], log_sides, 0.0),
        classes=class_targets,
    )


def decode_boxes(
    raw: Float[Array, "Y X A E"], anchors: Float[Array, "A 2"], size: tuple[int, int]
) -> tuple[Float[Array, "Y X A 4"], Float[Array, "Y X A"], Int[Array, "Y X A"]]:
    """Returns boxes, objectness (0 to 1) and the likeliest class from one map of an image.

    *centre = (cell + sigmoid(x, y)) stride, sides = anchor exp(w, h)*; boxes are clipped to the
    image of `size` (Y, X).
    """
    raw = raw.astype(jnp.float32)
    rows, columns = raw.shape[:2]
    extent = jnp.array([size[1], size[0]], jnp.float32)
    cell = jnp.stack(jnp.meshgrid(jnp.arange(columns), jnp.arange(rows)), -1)[:, :, None]
    centre = (cell + jax.nn.sigmoid(raw[..., :2])) * extent / jnp.array([columns, rows])
    half_sides = anchors * jnp.exp(raw[..., 2:4]) / 2
    boxes = jnp.concatenate([centre - half_sides, centre + half_sides], -1)
    # An exponential may be infinite; clipped, it is a box as large as the image.
    boxes = jnp.clip(boxes, 0, jnp.tile(extent, 2))
    return boxes, jax.nn.sigmoid(raw[..., 4]), jnp.argmax(raw[..., 5:], -1)


def suppress_non_maxima(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    classes: Int[Array, " N"],
    max_iou: float = 0.5,
) -> Bool[Array, " N"]:
    """Returns a mask of the boxes that remain after non-maximum suppression.

    A box is suppressed if a better remaining box of the same class has an IoU >= `max_iou` with it:
    greedily, by descending score; among equal scores the first box counts as the better one.
    """
    order = jnp.argsort(-scores, stable=True)
    boxes, classes = boxes[order], classes[order]
    conflicts_NN = (box_iou(boxes, boxes) >= max_iou) & (classes[:, None] == classes[None])
    # Row n: the better boxes that would suppress box n.
    conflicts_NN = conflicts_NN & jnp.tri(len(boxes), k=-1, dtype=bool)

    def visit_box(n: Int[Array, ""], remaining: Bool[Array, " N"]) -> Bool[Array, " N"]:
        return remaining.at[n].set(~(conflicts_NN[n] & remaining).any())

    remaining = lax.fori_loop(0, len(boxes), visit_box, jnp.zeros(len(boxes), bool))
    return jnp.zeros_like(remaining).at[order].set(remaining)


def detect(
    maps: tuple[Float[Array, "_ _ A E"], ...],
    anchors: tuple[Float[Array, "A 2"], ...],
    *,
    size: tuple[int, int],
    num_candidates: int = 100,
    min_score: float = 0.5,
    max_iou: float = 0.5,
) -> Detections:
    """Returns the boxes of one image from its maps, after non-maximum suppression.

    Args:
      maps: the outputs of `heads.yolo.Yolo` for one image.
      anchors: those of each map, as `anchors_for_size` returns them.
      size: rows and columns of the image, in pixels.
      num_candidates: only so many boxes of highest objectness enter suppression.
      min_score: boxes of lower objectness are not detected.
      max_iou: that of `suppress_non_maxima`.

    Returns:
      At most `num_candidates` boxes. A NaN score counts as the highest, so it stays visible.
    """
    parts = [decode_boxes(raw, sizes, size) for raw, sizes in zip(maps, anchors, strict=True)]
    boxes = jnp.concatenate([part[0].reshape(-1, 4) for part in parts])
    scores, classes = (jnp.concatenate([part[n].reshape(-1) for part in parts]) for n in (1, 2))
    ranking = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    ranking, indices = lax.top_k(ranking, min(num_candidates, len(scores)))
    boxes, scores, classes = boxes[indices], scores[indices], classes[indices]
    # `~(a < b)`, not `a >= b`: NaN scores pass.
    mask = suppress_non_maxima(boxes, ranking, classes, max_iou) & ~(scores < min_score)
    return Detections(boxes, scores, classes, mask)
