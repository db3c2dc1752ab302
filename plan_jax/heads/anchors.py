"""Boxes for a YOLOv3 head: targets from true boxes, boxes from outputs, and what overlaps them.

Everything has static shapes and runs under jit and vmap. Boxes are (x0, y0, x1, y1) in pixels; a
map has Y rows, X columns and A anchors a cell, and its numbers are (x, y, w, h, objectness,
classes) = E. Source: Redmon and Farhadi, arXiv 1804.02767, as in MGCA's code for detection
(github.com/HKU-MedAI/MGCA, mgca/utils/yolo_loss.py).

Deviation: MGCA counts an assigned anchor with IoU <= 0.5 also as background, so that the loss asks
one number to be 1 and 0; `published` keeps that. Deviation: MGCA suppresses by an IoU of boxes one
pixel larger on each side; ours has no such pixel. Deviation: a box is cut at the image's border.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

SIDE = 416  # the image side in pixels for which YOLOv3's anchors were chosen
ANCHORS = (  # widths and heights of the anchors, coarsest map first
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
_NOTHING = 1e-6  # the side of a padded box: its logarithm has to be finite


class Targets(NamedTuple):
    """What a map should say: `assigned` anchors have a box, `background` ones count as empty.

    `place` is the box's centre as shares of its cell, `size` the logarithms of its sides divided
    by the anchor's; both are 0 where nothing is assigned, as are `classes`.
    """

    assigned: Bool[Array, "Y X A"]
    background: Bool[Array, "Y X A"]
    place: Float[Array, "Y X A 2"]
    size: Float[Array, "Y X A 2"]
    classes: Float[Array, "Y X A C"]


class Detections(NamedTuple):
    """The N best candidates of an image, best score first; `keep` is False for what is no box."""

    boxes: Float[Array, "N 4"]
    scores: Float[Array, " N"]
    classes: Int[Array, " N"]
    keep: Bool[Array, " N"]


def anchors_at(size: tuple[int, int]) -> tuple[Float[Array, "A 2"], ...]:
    """Scale YOLOv3's anchors [A 2] (width, height) to an image of `size` (Y, X) pixels."""
    scale = jnp.array([size[1], size[0]], jnp.float32) / SIDE
    return tuple(jnp.array(level, jnp.float32) * scale for level in ANCHORS)


def overlap(a: Float[Array, "N 4"], b: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Give the IoU of every box of `a` with every box of `b`: 0 to 1, 0 where neither has area.

    >>> overlap(jnp.array([[0.0, 0, 2, 2]]), jnp.array([[1.0, 0, 3, 2], [5, 5, 6, 6]])).round(3)
    Array([[0.333, 0.   ]], dtype=float32)
    """
    sides = jnp.minimum(a[:, None, 2:], b[None, :, 2:]) - jnp.maximum(
        a[:, None, :2], b[None, :, :2]
    )
    both = jnp.maximum(sides, 0).prod(-1)
    area_a, area_b = ((jnp.maximum(x[:, 2:] - x[:, :2], 0)).prod(-1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - both
    return jnp.where(union > 0, both / jnp.where(union > 0, union, 1.0), 0.0)


def shape_overlap(sizes: Float[Array, "R 2"], anchors: Float[Array, "A 2"]) -> Float[Array, "R A"]:
    """Give the IoU of boxes with anchors of the same corner, each side counted one longer.

    *inter = (min(w, w') + 1) (min(h, h') + 1), union = (w + 1)(h + 1) + (w' + 1)(h' + 1) - inter*,
    sides in cells: MGCA's pixel convention, applied to a grid. It makes small shapes more alike.
    """
    both = (jnp.minimum(sizes[:, None], anchors[None]) + 1).prod(-1)
    areas = (sizes + 1).prod(-1)[:, None] + (anchors + 1).prod(-1)[None]
    return both / (areas - both)


def assign(
    boxes: Float[Array, "R 4"],
    real: Bool[Array, " R"],
    classes: Int[Array, " R"],
    anchors: Float[Array, "A 2"],
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    count: int,
    ignore: float = 0.5,
    published: bool = False,
) -> Targets:
    """Assign the `real` boxes of an image of `size` (Y, X) pixels to the anchors of one map.

    A box goes to the cell of its centre and there to the anchor of best `shape_overlap` (the first
    of equals); anchors there that overlap more than `ignore` are no background, nor is what is
    assigned (unless `published`). Of boxes at the same anchor of a cell the last one gives place
    and size, while the `count` classes of all of them are set. A centre on the far border belongs
    to the last cell.
    """
    cells = jnp.array([grid[1], grid[0]])
    scale = cells / jnp.array([size[1], size[0]])
    low, high = boxes[:, :2] * scale, boxes[:, 2:] * scale
    centre, sides = (low + high) / 2, jnp.maximum(high - low, _NOTHING)
    corner = jnp.clip(jnp.floor(centre), 0, cells - 1)
    alike = shape_overlap(sides, anchors * scale)
    best = jnp.argmax(alike, 1)
    x, y = corner.astype(jnp.int32).T
    y = jnp.where(real, y, grid[0])  # off the map: dropped by every scatter below
    empty = jnp.zeros((*grid, len(anchors)), jnp.int32)
    last = empty.at[y, x, best].max(1 + jnp.arange(len(boxes)), mode="drop")
    close = empty.at[y, x].max((alike > ignore).astype(jnp.int32), mode="drop") > 0
    named = jnp.zeros((*empty.shape, count)).at[y, x, best, classes].max(1.0, mode="drop")
    assigned, owner = last > 0, jnp.maximum(last - 1, 0)
    ratio = jnp.log(sides[owner] / (anchors * scale))
    return Targets(
        assigned=assigned,
        background=~close if published else ~(close | assigned),
        place=jnp.where(assigned[..., None], (centre - corner)[owner], 0.0),
        size=jnp.where(assigned[..., None], ratio, 0.0),
        classes=named,
    )


def decode(
    raw: Float[Array, "Y X A E"], anchors: Float[Array, "A 2"], size: tuple[int, int]
) -> tuple[Float[Array, "Y X A 4"], Float[Array, "Y X A"], Int[Array, "Y X A"]]:
    """Read boxes, objectness (0 to 1) and the likeliest class out of one map of an image.

    *centre = (cell + sigmoid(x, y)) stride, sides = anchor exp(w, h)*; boxes are cut at the
    borders of the image of `size` (Y, X).
    """
    raw = raw.astype(jnp.float32)
    rows, columns = raw.shape[:2]
    pixels = jnp.array([size[1], size[0]], jnp.float32)
    corner = jnp.stack(jnp.meshgrid(jnp.arange(columns), jnp.arange(rows)), -1)[:, :, None]
    centre = (corner + jax.nn.sigmoid(raw[..., :2])) * pixels / jnp.array([columns, rows])
    half = anchors * jnp.exp(raw[..., 2:4]) / 2
    boxes = jnp.concatenate([centre - half, centre + half], -1)
    boxes = jnp.clip(boxes, 0, jnp.tile(pixels, 2))
    return boxes, jax.nn.sigmoid(raw[..., 4]), jnp.argmax(raw[..., 5:], -1)


def nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    classes: Int[Array, " N"],
    limit: float = 0.5,
) -> Bool[Array, " N"]:
    """Say which boxes stay: no better kept box of the same class has an IoU >= `limit` with them.

    Greedy by descending score; of equal scores the first box counts as the better one.
    """
    order = jnp.argsort(-scores, stable=True)
    ordered, kinds = boxes[order], classes[order]
    clash = (overlap(ordered, ordered) >= limit) & (kinds[:, None] == kinds[None])
    clash = clash & jnp.tri(len(boxes), k=-1, dtype=bool)

    def step(n: Int[Array, ""], keep: Bool[Array, " N"]) -> Bool[Array, " N"]:
        return keep.at[n].set(~(clash[n] & keep).any())

    keep = lax.fori_loop(0, len(boxes), step, jnp.zeros(len(boxes), bool))
    return jnp.zeros_like(keep).at[order].set(keep)


def detect(
    maps: tuple[Float[Array, "_ _ A E"], ...],
    anchors: tuple[Float[Array, "A 2"], ...],
    *,
    size: tuple[int, int],
    candidates: int = 100,
    floor: float = 0.5,
    limit: float = 0.5,
) -> Detections:
    """Give the boxes that the maps of one image say, after `nms`: at most `candidates`.

    Only the `candidates` of highest objectness, of those with `floor` or more, enter `nms`. A NaN
    counts as the highest, so that it stays visible.
    """
    parts = [decode(raw, shape, size) for raw, shape in zip(maps, anchors, strict=True)]
    boxes = jnp.concatenate([part[0].reshape(-1, 4) for part in parts])
    scores, classes = (jnp.concatenate([p[n].reshape(-1) for p in parts]) for n in (1, 2))
    ranked = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    ranked, chosen = lax.top_k(ranked, min(candidates, len(scores)))
    boxes, scores, classes = boxes[chosen], scores[chosen], classes[chosen]
    keep = nms(boxes, ranked, classes, limit) & ~(scores < floor)
    return Detections(boxes, scores, classes, keep)
