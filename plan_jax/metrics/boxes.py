"""The formulas by which found boxes are judged: pure numpy, apart from any harness.

Boxes are (x0, y0, x1, y1), x1 and y1 not included, in any one unit. Average precision is COCO's
(Lin et al., arXiv 1405.0312): detections of all images in the order of their scores, each taking
the truth of its image and class with which it overlaps most; precision at 101 levels of recall,
made monotone. Equal scores keep the order of images, and in an image that in which they are given.
A class without any truth has no average precision (NaN) and does not enter a mean. A score that is
NaN makes that of its class NaN, and the mean.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

THRESHOLDS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)  # RSNA's challenge, MGCA
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Found:
    """The boxes that a model found in one image."""

    boxes: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, " N"]
    classes: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class Truth:
    """The true boxes of one image."""

    boxes: Float[np.ndarray, "R 4"]
    classes: Int[np.ndarray, " R"]


@dataclass(frozen=True)
class Matches:
    """All N detections, best score first, and which hit a truth at each of T thresholds.

    `truths` counts the true boxes of each of I images and K classes.
    """

    image: Int[np.ndarray, " N"]
    kind: Int[np.ndarray, " N"]
    score: Float[np.ndarray, " N"]
    hit: Bool[np.ndarray, "N T"]
    truths: Int[np.ndarray, "I K"]


def iou(a: Float[np.ndarray, "N 4"], b: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "N M"]:
    """Give the overlap of every box of `a` with every box of `b`.

    *IoU = |A and B| / |A or B|*, 0 to 1; 0 where neither has area.

    >>> iou(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [2, 0, 4, 2]])).round(3).tolist()
    [[0.333, 0.0]]
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    both = np.maximum(sides, 0).prod(-1)
    area_a, area_b = (np.maximum(x[:, 2:] - x[:, :2], 0).prod(-1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - both
    return np.where(union > 0, both / np.where(union > 0, union, 1), 0.0)


def take_greedily(overlap: Float[np.ndarray, "N R"], threshold: float) -> Bool[np.ndarray, " N"]:
    """Say which of N detections, best first, get one of R truths.

    Each takes the truth of highest overlap, of `threshold` or more, that no better detection has
    taken; of equal overlaps the last truth (COCO's rule).

    >>> take_greedily(np.array([[0.6, 0.0], [0.9, 0.5], [0.8, 0.2]]), 0.5).tolist()
    [True, True, False]
    """
    free, hit = np.ones(overlap.shape[1], bool), np.zeros(len(overlap), bool)
    for n, row in enumerate(overlap):
        able = np.where(free, row, -1.0)[::-1]
        if len(able) and able.max() >= threshold:
            hit[n] = True
            free[len(able) - 1 - int(np.argmax(able))] = False
    return hit


def match(
    found: Sequence[Found], truth: Sequence[Truth], thresholds: Sequence[float] = THRESHOLDS
) -> Matches:
    """Match the detections of each image with its truths, once for each IoU threshold.

    `found` and `truth` are one item an image; an image without boxes has an item of length 0.

    Raises:
      ValueError: they are not of one length.
    """
    kinds = [x.classes for x in (*found, *truth)]
    number = 1 + max((int(k.max()) for k in kinds if len(k)), default=0)
    truths = np.zeros((len(truth), number), int)
    parts = [
        (np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros((0, len(thresholds)), bool))
    ]
    for image, (seen, real) in enumerate(zip(found, truth, strict=True)):
        truths[image] = np.bincount(real.classes, minlength=number)
        order = np.argsort(-seen.scores, kind="stable")
        boxes, kind = seen.boxes[order], seen.classes[order]
        hit = np.zeros((len(order), len(thresholds)), bool)
        for k in np.intersect1d(kind, real.classes):
            overlap = iou(boxes[kind == k], real.boxes[real.classes == k])
            columns = [take_greedily(overlap, min(t, 1 - 1e-10)) for t in thresholds]
            hit[kind == k] = np.stack(columns, 1)
        parts.append((np.full(len(order), image), kind, seen.scores[order].astype(float), hit))
    image, kind, score, hit = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.argsort(-score, kind="stable")
    return Matches(image[order], kind[order], score[order], hit[order], truths)


def average_precision(
    hit: Shaped[np.ndarray, " N"],
    positives: int | float,
    weight: Float[np.ndarray, " N"] | None = None,
) -> float:
    """Give the mean precision at recall 0, 0.01, .., 1 of one class at one IoU threshold.

    *AP = mean over r of max {precision(n): recall(n) >= r}*, 0 for a recall that is not reached.
    `hit` are the detections of all images, best score first; `positives` counts the true boxes;
    detection n counts `weight[n]` times. NaN without positives, 0 without detections.

    >>> round(average_precision(np.array([True, False, True]), 2), 4)
    0.835
    """
    if not positives:
        return float("nan")
    weight = np.ones(len(hit)) if weight is None else weight
    true, all_found = np.cumsum(weight * hit), np.cumsum(weight)
    precision = true / np.maximum(all_found, np.spacing(1))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(true / positives, RECALLS, side="left")
    return float(np.append(best, 0.0)[place].mean())


def precision_table(
    matches: Matches, times: Float[np.ndarray, " I"] | None = None
) -> Float[np.ndarray, "K T"]:
    """Give the average precision of every class at every threshold: NaN for a class not there.

    Image i counts `times[i]` times: with the counts of a bootstrap's draw that is the table of the
    images drawn, for the price of two sums.
    """
    times = np.ones(len(matches.truths)) if times is None else times
    positives, weight = times @ matches.truths, times[matches.image]
    table = np.full((len(positives), matches.hit.shape[1]), np.nan)
    for k, count in enumerate(positives):
        mine = matches.kind == k
        hits, weights = matches.hit[mine], weight[mine]
        if not np.isnan(matches.score[mine]).any():
            table[k] = [average_precision(hit, float(count), weights) for hit in hits.T]
    return table


def mean_precision(matches: Matches, times: Float[np.ndarray, " I"] | None = None) -> float:
    """Average the `precision_table` over thresholds and classes with truth; NaN if none has."""
    there = (matches.truths if times is None else matches.truths[times > 0]).any(0)
    table = precision_table(matches, times)[there]
    return float(table.mean()) if table.size else float("nan")


def map_strict(
    found: Sequence[Found], truth: Sequence[Truth], thresholds: Sequence[float] = THRESHOLDS
) -> float:
    """Give the mean average precision over ALL images, classes and thresholds: 0 to 1.

    A missed image lowers the recall and a box in a healthy one the precision. NaN if no image has
    a true box.
    """
    return mean_precision(match(found, truth, thresholds))


def map_mgca(
    found: Sequence[Found],
    truth: Sequence[Truth],
    thresholds: Sequence[float] = THRESHOLDS,
    floor: float = 0.5,
) -> float:
    """Give the mean average precision as MGCA's code counts it (mgca/models/ssl_detector.py).

    Only images with a true box AND a detection of score >= `floor` enter, and only such
    detections: neither a missed image nor a box in a healthy one costs anything. 0.0 if no image
    is left.
    """
    sure = [
        Found(seen.boxes[high], seen.scores[high], seen.classes[high])
        for seen in found
        for high in [~(seen.scores < floor)]
    ]
    kept = [
        i for i, (a, b) in enumerate(zip(sure, truth, strict=True)) if len(a.boxes) and len(b.boxes)
    ]
    if not kept:
        return 0.0
    return map_strict([sure[i] for i in kept], [truth[i] for i in kept], thresholds)


def coco_map(found: Sequence[Found], truth: Sequence[Truth]) -> tuple[float, float, float]:
    """Give AP@[.50:.05:.95], AP50 and AP75 of all images by pycocotools, without its printing.

    Areas of all sizes and all detections count (COCO keeps the best 100 of an image). NaN if no
    image has a true box.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    broken = any(np.isnan(seen.scores).any() for seen in found)
    if broken or not any(len(real.boxes) for real in truth):
        return (float("nan"),) * 3
    kinds = {int(k) for x in (*found, *truth) for k in x.classes}
    data = {
        "images": [{"id": i} for i in range(len(truth))],
        "categories": [{"id": k} for k in sorted(kinds)],
        "annotations": _rows(truth, iscrowd=0),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truths, guesses = COCO(), COCO()
        truths.dataset = data
        guesses.dataset = data | {"annotations": _rows(found)}
        truths.createIndex()
        guesses.createIndex()
        judge = COCOeval(truths, guesses, "bbox")
        judge.params.maxDets = [max(len(seen.boxes) for seen in found) or 1]
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.evaluate()
        judge.accumulate()
    table = judge.eval["precision"][..., 0, 0]  # [thresholds, recalls, classes], -1: no truth
    parts = (table, table[:1], table[5:6])
    return tuple(float(part[part > -1].mean()) for part in parts)


def _rows(items: Sequence[Found] | Sequence[Truth], **more: int) -> list[dict]:
    """Write the boxes of images as COCO's rows; ids begin with 1, as 0 would mean no match."""
    rows = []
    for image, item in enumerate(items):
        scores = getattr(item, "scores", np.zeros(len(item.boxes)))
        for box, kind, score in zip(item.boxes.astype(float), item.classes, scores, strict=True):
            x0, y0, x1, y1 = box.tolist()
            sides = [x0, y0, x1 - x0, y1 - y0]
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": image,
                    "category_id": int(kind),
                    "bbox": sides,
                    "area": sides[2] * sides[3],
                    "score": float(score),
                    **more,
                }
            )
    return rows
