"""Metrics of detected boxes: IoU, matching, and the average precision of COCO, RSNA and MGCA.

Boxes are (x0, y0, x1, y1) in any one unit; x1 and y1 are not included. Average precision is COCO's
(Lin et al., arXiv 1405.0312): detections of all images in the order of their scores, each matched
to the true box of its image and class with which it overlaps most; precision at 101 levels of
recall, made monotone. Equal scores keep the order of the images, and within an image the order of
its detections. A class without true boxes has no average precision (NaN) and does not enter a mean.
A NaN score makes the average precision of its class NaN, and with it the mean.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

IOU_THRESHOLDS = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)  # RSNA's challenge, MGCA
RECALL_LEVELS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class DetectedBoxes:
    """The boxes that a model detects in one image."""

    boxes: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, " N"]
    classes: Int[np.ndarray, " N"]


@dataclass(frozen=True)
class TrueBoxes:
    """The true boxes of one image."""

    boxes: Float[np.ndarray, "R 4"]
    classes: Int[np.ndarray, " R"]


@dataclass(frozen=True)
class Matches:
    """All N detections of a test set, best score first, matched at each of T thresholds.

    `hits` is True where a detection is matched to a true box; `true_counts` are the numbers of true
    boxes of each of I images and K classes.
    """

    images: Int[np.ndarray, " N"]
    classes: Int[np.ndarray, " N"]
    scores: Float[np.ndarray, " N"]
    hits: Bool[np.ndarray, "N T"]
    true_counts: Int[np.ndarray, "I K"]


def box_iou(
    first: Float[np.ndarray, "N 4"] | Float[Array, "N 4"],
    second: Float[np.ndarray, "M 4"] | Float[Array, "M 4"],
) -> Float[np.ndarray, "N M"] | Float[Array, "N M"]:
    """Computes the intersection over union of each box of `first` with each box of `second`.

    *IoU = |A and B| / |A or B|*, 0 to 1; 0 where neither box has an area. Both arguments are arrays
    of one library, numpy or JAX (also under jit), and so is the result.

    >>> first, second = np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [2, 0, 4, 2]])
    >>> box_iou(first, second).round(3).tolist()
    [[0.333, 0.0]]
    """
    xp = first.__array_namespace__()
    upper = xp.minimum(first[:, None, 2:], second[None, :, 2:])
    lower = xp.maximum(first[:, None, :2], second[None, :, :2])
    intersection = xp.prod(xp.maximum(upper - lower, 0), axis=-1)
    areas = [xp.prod(xp.maximum(x[:, 2:] - x[:, :2], 0), axis=-1) for x in (first, second)]
    union = areas[0][:, None] + areas[1][None] - intersection
    # The inner `where` keeps 0 / 0 out of the values, and out of the gradients under JAX.
    return xp.where(union > 0, intersection / xp.where(union > 0, union, 1.0), 0.0)


def match_greedily(ious: Float[np.ndarray, "N R"], threshold: float) -> Bool[np.ndarray, " N"]:
    """Returns which of N detections, best score first, are matched to one of R true boxes.

    A detection takes the true box of highest IoU, of `threshold` or more, that no better detection
    has taken; among equal IoUs the last box (COCO's rule).

    >>> match_greedily(np.array([[0.6, 0.0], [0.9, 0.5], [0.8, 0.2]]), 0.5).tolist()
    [True, True, False]
    """
    free, hits = np.ones(ious.shape[1], bool), np.zeros(len(ious), bool)
    for n, row in enumerate(ious):
        # Reversed, since argmax returns the first of equals and COCO takes the last.
        candidates = np.where(free, row, -1.0)[::-1]
        if len(candidates) and candidates.max() >= threshold:
            hits[n] = True
            free[len(candidates) - 1 - int(np.argmax(candidates))] = False
    return hits


def match_detections(
    detected: Sequence[DetectedBoxes],
    truth: Sequence[TrueBoxes],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> Matches:
    """Matches the detections of each image to its true boxes, once for each IoU threshold.

    `detected` and `truth` have one item for each image; an image without boxes has an empty item.

    Raises:
      ValueError: they differ in length.
    """
    class_ids = [boxes.classes for boxes in detected] + [target.classes for target in truth]
    num_classes = 1 + max((int(ids.max()) for ids in class_ids if len(ids)), default=0)
    true_counts = np.zeros((len(truth), num_classes), int)
    # An empty first part: a test set may have no images at all.
    parts = [
        (np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros((0, len(thresholds)), bool))
    ]
    for image, (boxes, target) in enumerate(zip(detected, truth, strict=True)):
        true_counts[image] = np.bincount(target.classes, minlength=num_classes)
        order = np.argsort(-boxes.scores, kind="stable")
        # In float64, since COCO's thresholds are compared with exact ratios such as 0.5.
        corners, classes = boxes.boxes[order].astype(np.float64), boxes.classes[order]
        hits = np.zeros((len(order), len(thresholds)), bool)
        for k in np.intersect1d(classes, target.classes):
            true_corners = target.boxes[target.classes == k].astype(np.float64)
            ious = np.asarray(box_iou(corners[classes == k], true_corners))
            # As in pycocotools: a threshold of 1 must not fail because of rounding.
            columns = [match_greedily(ious, min(t, 1 - 1e-10)) for t in thresholds]
            hits[classes == k] = np.stack(columns, 1)
        scores = boxes.scores[order].astype(float)
        parts.append((np.full(len(order), image), classes, scores, hits))
    images, classes, scores, hits = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(-scores, kind="stable")
    return Matches(images[order], classes[order], scores[order], hits[order], true_counts)


def interpolated_precision(
    hits: Shaped[np.ndarray, " N"],
    positives: int | float,
    weights: Float[np.ndarray, " N"] | None = None,
) -> float:
    """Computes the mean precision at recall 0, 0.01, .., 1 of one class at one IoU threshold.

    *AP = mean over r of max {precision(n): recall(n) >= r}*, 0 for a recall that is not reached.

    Args:
      hits: which detections of all images are matched, best score first.
      positives: the number of true boxes.
      weights: how many times each detection counts; once if None.

    Returns:
      A number from 0 to 1; NaN without true boxes, 0 without detections.

    >>> round(interpolated_precision(np.array([True, False, True]), 2), 4)
    0.835
    """
    if not positives:
        return float("nan")
    weights = np.ones(len(hits)) if weights is None else weights
    true_positives, predicted = np.cumsum(weights * hits), np.cumsum(weights)
    # Leading detections may weigh 0 in a bootstrap; the spacing keeps 0 / 0 out, as in COCO.
    precision = true_positives / np.maximum(predicted, np.spacing(1))
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(true_positives / positives, RECALL_LEVELS, side="left")
    return float(np.append(monotone, 0.0)[index].mean())


def average_precision_table(
    matches: Matches, image_counts: Float[np.ndarray, " I"] | None = None
) -> Float[np.ndarray, "K T"]:
    """Computes the average precision of each class at each threshold; NaN without true boxes.

    Image i counts `image_counts[i]` times, once if None. With the counts of a bootstrap sample this
    is the table of the sampled images, without matching them again.
    """
    if image_counts is None:
        image_counts = np.ones(len(matches.true_counts))
    positives, weights = image_counts @ matches.true_counts, image_counts[matches.images]
    table = np.full((len(positives), matches.hits.shape[1]), np.nan)
    for k, count in enumerate(positives):
        rows = matches.classes == k
        if not np.isnan(matches.scores[rows]).any():
            columns = matches.hits[rows].T
            table[k] = [interpolated_precision(x, float(count), weights[rows]) for x in columns]
    return table


def mean_average_precision(
    matches: Matches, image_counts: Float[np.ndarray, " I"] | None = None
) -> float:
    """Computes the mean of `average_precision_table` over thresholds and classes with true boxes.

    NaN if no class has any.
    """
    counts = matches.true_counts if image_counts is None else matches.true_counts[image_counts > 0]
    table = average_precision_table(matches, image_counts)[counts.any(0)]
    return float(table.mean()) if table.size else float("nan")


def map_strict(
    detected: Sequence[DetectedBoxes],
    truth: Sequence[TrueBoxes],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> float:
    """Computes the mean average precision over ALL images, classes and thresholds: 0 to 1.

    An image without detections lowers the recall and a box in a healthy image the precision. NaN if
    no image has a true box.
    """
    return mean_average_precision(match_detections(detected, truth, thresholds))


def map_mgca(
    detected: Sequence[DetectedBoxes],
    truth: Sequence[TrueBoxes],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
    min_score: float = 0.5,
) -> float:
    """Computes the mean average precision as MGCA's code counts it (mgca/models/ssl_detector.py).

    Only images with a true box AND a detection of score >= `min_score` enter, and only such
    detections: neither an image without detections nor a box in a healthy image lowers the number.
    0.0 if no image is left.
    """
    confident = []
    for image in detected:
        rows = ~(image.scores < min_score)  # written so that a NaN score stays visible
        confident.append(DetectedBoxes(image.boxes[rows], image.scores[rows], image.classes[rows]))
    pairs = [
        (boxes, target)
        for boxes, target in zip(confident, truth, strict=True)
        if len(boxes.boxes) and len(target.boxes)
    ]
    remaining, targets = [boxes for boxes, _ in pairs], [target for _, target in pairs]
    return map_strict(remaining, targets, thresholds) if pairs else 0.0


def coco_map(
    detected: Sequence[DetectedBoxes], truth: Sequence[TrueBoxes]
) -> tuple[float, float, float]:
    """Computes AP@[.50:.05:.95], AP50 and AP75 of all images by pycocotools, without its printing.

    Areas of all sizes and all detections count (COCO keeps the best 100 of an image). NaN if no
    image has a true box, or if a score is NaN.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    any_nan = any(np.isnan(image.scores).any() for image in detected)
    if any_nan or not any(len(target.boxes) for target in truth):
        return math.nan, math.nan, math.nan
    class_ids = {int(k) for boxes in detected for k in boxes.classes}
    class_ids |= {int(k) for target in truth for k in target.classes}
    dataset = {
        "images": [{"id": i} for i in range(len(truth))],
        "categories": [{"id": k} for k in sorted(class_ids)],
        "annotations": _coco_annotations(truth, iscrowd=0),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        true_set, detected_set = COCO(), COCO()
        true_set.dataset = dataset
        detected_set.dataset = dataset | {"annotations": _coco_annotations(detected)}
        true_set.createIndex()
        detected_set.createIndex()
        evaluation = COCOeval(true_set, detected_set, "bbox")
        evaluation.params.maxDets = [max(len(image.boxes) for image in detected) or 1]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    # Axes: thresholds, recall levels, classes; -1 marks a class without true boxes.
    precision = evaluation.eval["precision"][..., 0, 0]
    overall, at_50, at_75 = (
        float(part[part > -1].mean()) for part in (precision, precision[:1], precision[5:6])
    )
    return overall, at_50, at_75


def _coco_annotations(items: Sequence[DetectedBoxes | TrueBoxes], **fields: int) -> list[dict]:
    """Returns the boxes of all images as COCO annotations, each with the further `fields`."""
    annotations: list[dict] = []
    for image, item in enumerate(items):
        scores = getattr(item, "scores", np.zeros(len(item.boxes)))
        for box, k, score in zip(item.boxes.astype(float), item.classes, scores, strict=True):
            x0, y0, x1, y1 = box.tolist()
            width, height = x1 - x0, y1 - y0
            annotations.append(
                {
                    "id": len(annotations) + 1,  # from 1: pycocotools reads id 0 as "no match"
                    "image_id": image,
                    "category_id": int(k),
                    "bbox": [x0, y0, width, height],
                    "area": width * height,
                    "score": float(score),
                    **fields,
                }
            )
    return annotations
