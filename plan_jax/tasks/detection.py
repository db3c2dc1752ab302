"""Detection: a YOLOv3 head on the maps of the image tower, fitted to boxes.

The protocol is MGCA's (Wang et al., arXiv 2210.06044), by its code, github.com/HKU-MedAI/MGCA
(mgca/models/ssl_detector.py, mgca/models/mgca/mgca_detector.py): a frozen ResNet-50 at 224 pixels,
no augmentation, anchors of YOLOv3; RSNA's boxes are one class. The head and its loss are in
`heads/yolo.py`, targets and suppression in `heads/anchors.py`, the formulas in `metrics/boxes.py`.

Keys of the metrics:

- `map_strict`, with its 95 % bootstrap interval over images in `map_strict_low`, `map_strict_high`
  (a little too high for few images: repeated images flatter the precision); `map_mgca`; `coco/ap`,
  `coco/ap50`, `coco/ap75`.
- `prior/map_strict`, where every image is assigned the most typical boxes of training (ours).
- `n_train`, `n_test`, `epochs`; `boxes_dropped`, those of all splits, see `true_boxes`.
- With `classes="each"`: `<finding>/ap50` of the findings with boxes in `test`, their number in
  `findings_scored` and that of the others in `findings_skipped`.

Deviation: BatchNorm of the frozen tower is in evaluation mode; `frozen_train_norm` is MGCA's.
Deviation: MGCA scores only images with a true and a detected box, at an objectness >= 0.5; that is
`map_mgca`. The other metrics are over all images and boxes of objectness >= `min_score`. Deviation:
the epoch is selected by `map_strict`, not by `map_mgca`; while it is 0, by the validation loss, so
that patience does not run out before the first detection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from plan_jax.heads import yolo
from plan_jax.heads.anchors import anchors_for_size, detect, suppress_non_maxima
from plan_jax.heads.examples import (
    ExampleFunction,
    Images,
    count_examples,
    map_chunks,
    open_images,
    share_batches,
    take_examples,
)
from plan_jax.heads.fit import compile_loss, fit_head, mean_loss
from plan_jax.heads.head_on_tower import HeadOnTower, Mode, attach_head, require_tower
from plan_jax.heads.pyramid import last_three_sizes
from plan_jax.metrics import boxes as box_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.metrics.boxes import DetectedBoxes, TrueBoxes
from plan_jax.types import (
    BoxExample,
    EvalData,
    Metric,
    Model,
    Phrase,
    Record,
    Result,
    TaskContext,
    Tower,
    UserError,
    check_options,
    read_annotations,
    select_records,
)

TITLE = "Detection"
FITS_HEAD = True
METRICS = {
    "map_strict": Metric(
        "mAP .40:.75, strict",
        "Average precision, mean over IoU thresholds .40 to .75, over all images.",
        baselines={"random encoder": "random/map_strict", "typical boxes": "prior/map_strict"},
        headline=True,
    ),
    "map_mgca": Metric(
        "mAP .40:.75, as MGCA counts",
        "The same over the images with a true box and a detected box of objectness 0.5 or more.",
        baselines={"random encoder": "random/map_mgca"},
        undefined="no image with a true box has a detected one of objectness 0.5 or more",
        headline=True,
    ),
    "coco/ap": Metric(
        "AP at IoU .50:.95",
        "Average precision by pycocotools, mean over IoU thresholds .50 to .95.",
        baselines={"random encoder": "random/coco/ap"},
    ),
    "coco/ap50": Metric(
        "AP at IoU .5",
        "Average precision by pycocotools; a detection is correct from an IoU of .5.",
        baselines={"random encoder": "random/coco/ap50"},
        headline=True,
    ),
    "coco/ap75": Metric(
        "AP at IoU .75",
        "Average precision by pycocotools; a detection is correct from an IoU of .75.",
        baselines={"random encoder": "random/coco/ap75"},
    ),
    "{finding}/ap50": Metric(
        "AP at IoU .5, {finding}",
        "Average precision of the boxes of one finding.",
        baselines={"random encoder": "random/{finding}/ap50"},
        undefined="no evaluated image has a box of it",
    ),
}
SPLITS = ("train", "val", "test")
CHUNK_SIZE = 512  # images whose maps are in memory at once
PRIOR_CANDIDATES, PRIOR_BOXES = 1000, 10  # training boxes the baseline compares, and keeps (ours)


@dataclass(frozen=True)
class Options:
    """The constants of the protocol; those not marked as ours are MGCA's.

    Attributes:
      classes: all findings are one class (`any`, as RSNA) or each is its own (`each`, ours).
      mode: what is fitted, see `heads.head_on_tower`.
      widths: channels of YOLOv3's 1x1 convolutions, coarsest map first.
      average: that of `heads.yolo.yolo_loss`.
      published_background: that of `heads.anchors.assign_targets`.
      learning_rate: of AdamW.
      weight_decay: of AdamW.
      batch: examples in a batch.
      epochs: the largest number of epochs.
      patience: epochs without a better validation score after which the fit stops.
      select_by: the validation score that selects the epoch (ours: `map_strict`). `loss` is the
        fastest: it decodes no boxes.
      mgca_min_score: objectness from which a box counts in `map_mgca`.
      min_score: objectness from which a box is detected (ours).
      nms_iou: IoU from which a worse box of the same class is suppressed.
      num_candidates: so many best boxes of an image enter suppression (ours).
      max_train_records: so many records are drawn for training; 0 for all.
      bootstrap_samples: resamples of an interval.
      num_examples: images on the page.
    """

    classes: Literal["any", "each"] = "any"
    mode: Mode = "frozen"
    widths: tuple[int, int, int] = (512, 256, 128)
    average: Literal["cells", "objects"] = "cells"
    published_background: bool = False
    learning_rate: float = 5e-4
    weight_decay: float = 1e-6
    batch: int = 16
    epochs: int = 50
    patience: int = 10
    select_by: Literal["map_strict", "map_mgca", "loss"] = "map_strict"
    mgca_min_score: float = 0.5
    min_score: float = 0.01
    nms_iou: float = 0.5
    num_candidates: int = 100
    max_train_records: int = 0
    bootstrap_samples: int = 1000
    num_examples: int = 6

    def __post_init__(self) -> None:
        non_negative = (
            "learning_rate",
            "weight_decay",
            "mgca_min_score",
            "min_score",
            "nms_iou",
            "max_train_records",
            "num_examples",
        )
        positive = ("batch", "epochs", "patience", "num_candidates")
        minima = dict.fromkeys(non_negative, 0) | dict.fromkeys(positive, 1)
        minima["bootstrap_samples"] = 2
        check_options("detection", self, minima)
        if len(self.widths) != 3:
            raise UserError(
                f"config.eval.detection.widths is {self.widths}; give three widths, coarsest map "
                "first"
            )


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that has its boxes."""
    return ("phrases",)


def check(data: EvalData, options: Options) -> None:
    """Raises UserError if no record of a split has a box to detect."""
    for split in SPLITS:
        records = read_annotations(getattr(data, split))
        if not any(len(true_boxes(r, options, data.findings)[0].boxes) for r in records):
            raise UserError(
                f"task detection needs boxes or masks of phrases, and split {split} has none; add "
                "some, or leave detection out of config.eval.tasks"
            )


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Fits a head to `data.train`, selects its epoch on `data.val`, and scores its test boxes.

    Raises:
      UserError: see `check`; `max_train_records` leaves no box; the model has no tower, or one
        whose features are not finite.
    """
    check(data, options)
    seed = context.seed
    records = {split: getattr(data, split) for split in SPLITS}
    records["train"] = draw_records(records["train"], options.max_train_records, seed)
    truth: dict[str, list[TrueBoxes]] = {}
    num_dropped = 0
    for split in SPLITS:
        annotated = read_annotations(records[split])
        pairs = [true_boxes(record, options, data.findings) for record in annotated]
        truth[split] = [boxes for boxes, _ in pairs]
        num_dropped += sum(dropped for _, dropped in pairs)
    if not any(len(boxes.boxes) for boxes in truth["train"]):
        raise UserError(
            f"config.eval.detection.max_train_records {options.max_train_records} leaves no box to "
            "learn from; use more records"
        )
    tower = require_tower(model)
    images = {split: open_images(records[split]) for split in SPLITS}
    attached = _attach_yolo(tower, images["train"], data.findings, options, seed)
    max_boxes = max(len(x.boxes) for split in ("train", "val") for x in truth[split])
    train, val = (
        attached.examples(images[split]) | pad_boxes(truth[split], max_boxes)
        for split in ("train", "val")
    )
    rows, columns = images["test"].shape[1:3]
    detect_boxes = _detector(attached, (rows, columns), options)
    fit_result = fit_head(
        attached.loss,
        attached.params,
        attached.stats,
        train,
        val,
        optax.adamw(options.learning_rate, weight_decay=options.weight_decay),
        batch=options.batch,
        epochs=options.epochs,
        patience=options.patience,
        seed=seed,
        name="detection",
        option="config.eval.detection.learning_rate",
        score=_selection_score(attached, detect_boxes, val, truth["val"], options),
        description=f"{tower.name} {options} {tuple(data.findings)}",
        folder=context.folder,
        check_stop=context.check_stop,
    )
    detected = detect_boxes(fit_result.params, fit_result.stats, attached.examples(images["test"]))
    baseline = [typical_boxes(truth["train"], options.nms_iou)] * len(detected)
    metrics = _box_scores(detected, truth["test"], options, seed) | {
        "prior/map_strict": box_metrics.map_strict(baseline, truth["test"]),
        "n_train": float(len(records["train"])),
        "n_test": float(len(records["test"])),
        "epochs": float(len(fit_result.history)),
        "boxes_dropped": float(num_dropped),
    }
    if options.classes == "each":
        metrics |= _finding_scores(detected, truth["test"], data.findings)
    examples = _select_examples(images["test"], detected, truth["test"], options.num_examples, seed)
    return Result(metrics, examples)


def true_boxes(record: Record, options: Options, findings: Sequence[str]) -> tuple[TrueBoxes, int]:
    """Returns the boxes of a record's phrases, clipped to its image, and how many are dropped.

    A phrase without boxes has the one around its mask (one, also around several parts). Equal boxes
    of one class, from phrases of the same meaning, count once. Boxes outside of the image or
    without an area are dropped, and, where each finding is a class, those of a phrase without a
    finding.
    """
    rows, columns = record.image.shape[:2]
    num_classes = _count_classes(options, findings)
    unique: dict[tuple, None] = {}
    num_dropped = 0
    for phrase in record.phrases:
        k = phrase.finding if options.classes == "each" else 0
        for box in phrase.boxes or _box_around_mask(phrase):
            x0, x1 = (float(np.clip(x, 0, columns)) for x in box[::2])
            y0, y1 = (float(np.clip(y, 0, rows)) for y in box[1::2])
            if x0 < x1 and y0 < y1 and 0 <= k < num_classes:
                unique[x0, y0, x1, y1, k] = None
            else:
                num_dropped += 1
    table = np.array(list(unique), np.float32).reshape(-1, 5)
    return TrueBoxes(table[:, :4], table[:, 4].astype(np.int32)), num_dropped


def pad_boxes(truth: Sequence[TrueBoxes], max_boxes: int) -> dict[str, np.ndarray]:
    """Returns arrays of one size: `boxes` [N R 4], `mask` [N R] and `classes` [N R].

    `mask` is True where a box is real.
    """
    shape = (len(truth), max_boxes)
    boxes, classes = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    for n, target in enumerate(truth):
        count = len(target.boxes)
        boxes[n, :count], classes[n, :count] = target.boxes, target.classes
        mask[n, :count] = True
    return {"boxes": boxes, "mask": mask, "classes": classes}


def typical_boxes(truth: Sequence[TrueBoxes], nms_iou: float = 0.5) -> DetectedBoxes:
    """Returns the most typical training boxes: what a detector can know without an image (ours).

    Each training box (at most `PRIOR_CANDIDATES`, evenly spaced) scores the share of them that are
    of its class and overlap it by half. After suppression the best `PRIOR_BOXES` remain.
    """
    boxes = np.concatenate([target.boxes for target in truth])
    classes = np.concatenate([target.classes for target in truth])
    num_candidates = min(len(boxes), PRIOR_CANDIDATES)
    indices = np.linspace(0, len(boxes) - 1, num_candidates).astype(int)
    boxes, classes = boxes[indices], classes[indices]
    corners = boxes.astype(np.float64)
    ious = np.asarray(box_metrics.box_iou(corners, corners))
    similar = (ious >= 0.5) & (classes[:, None] == classes)
    scores = similar.mean(1).astype(np.float32)
    suppress = jax.jit(partial(suppress_non_maxima, max_iou=nms_iou))
    remaining = np.flatnonzero(np.asarray(suppress(boxes, scores, classes)))
    best = remaining[np.argsort(-scores[remaining], kind="stable")[:PRIOR_BOXES]]
    return DetectedBoxes(boxes[best], scores[best], classes[best])


def draw_records(records: Sequence[Record], max_records: int, seed: int) -> Sequence[Record]:
    """Returns `max_records` random records in their order; all if it is 0 or there are fewer."""
    if not 0 < max_records < len(records):
        return records
    indices = np.random.default_rng(seed).permutation(len(records))[:max_records]
    return select_records(records, np.sort(indices).tolist())


def _count_classes(options: Options, findings: Sequence[str]) -> int:
    return len(findings) if options.classes == "each" else 1


def _box_around_mask(phrase: Phrase) -> tuple[tuple[float, ...], ...]:
    """Returns the box around a phrase's mask, if it has one; without area if the mask is empty."""
    if phrase.mask is None:
        return ()
    rows, columns = (np.flatnonzero(np.asarray(phrase.mask, bool).any(axis)) for axis in (1, 0))
    if not len(rows):
        return ((0.0, 0.0, 0.0, 0.0),)
    return ((float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0),)


def _attach_yolo(
    tower: Tower,
    images: Images,
    findings: Sequence[str],
    options: Options,
    seed: int,
) -> HeadOnTower:
    rows, columns = images.shape[1:3]

    def criterion(outputs: tuple, examples: Mapping[str, Any]) -> Float[Array, ""]:
        return yolo.yolo_loss(
            outputs,
            examples["boxes"],
            examples["mask"],
            examples["classes"],
            size=(rows, columns),
            average=options.average,
            published_background=options.published_background,
        )

    return attach_head(
        tower,
        yolo.Yolo(_count_classes(options, findings), options.widths),
        criterion,
        {"image": images[:2]},
        select_features=lambda stages: last_three_sizes(stages.maps),
        mode=options.mode,
        seed=seed,
    )


def _detector(
    attached: HeadOnTower, size: tuple[int, int], options: Options
) -> Callable[..., list[DetectedBoxes]]:
    """Returns a function from parameters, statistics and examples to the boxes of each image."""
    detect_image = partial(
        detect,
        anchors=anchors_for_size(size),
        size=size,
        num_candidates=options.num_candidates,
        min_score=options.min_score,
        max_iou=options.nms_iou,
    )
    detect_batch = ExampleFunction(lambda _, maps: jax.vmap(detect_image)(maps)).bind(())

    def detect_boxes(
        params: PyTree, stats: PyTree, examples: Mapping[str, PyTree]
    ) -> list[DetectedBoxes]:
        def detect_rows(rows: Int[np.ndarray, " B"]) -> list[np.ndarray]:
            maps = attached.predict(params, stats, take_examples(examples, rows))
            return list(map_chunks(detect_batch, maps))

        # The maps of all images would not fit into memory.
        batches = share_batches(detect_rows, count_examples(examples), CHUNK_SIZE)
        return [
            DetectedBoxes(boxes[mask], scores[mask], classes[mask])
            for batch in batches
            for boxes, scores, classes, mask in zip(*batch, strict=True)
        ]

    return detect_boxes


def _selection_score(
    attached: HeadOnTower,
    detect_boxes: Callable[..., list[DetectedBoxes]],
    examples: Mapping[str, PyTree],
    truth: Sequence[TrueBoxes],
    options: Options,
) -> Callable[[PyTree, PyTree], float] | None:
    """Returns the validation score: mean average precision, and minus the loss while it is 0.

    None, the default of `fit_head`, is minus the loss.
    """
    if options.select_by == "loss":
        return None
    evaluate_loss = compile_loss(attached.loss)

    def score(params: PyTree, stats: PyTree) -> float:
        detected = detect_boxes(params, stats, examples)
        if options.select_by == "map_strict":
            value = box_metrics.map_strict(detected, truth)
        else:
            value = box_metrics.map_mgca(detected, truth, min_score=options.mgca_min_score)
        # A loss is positive, so its negative ranks below any epoch that detects something.
        if value > 0:
            return value
        return -mean_loss(evaluate_loss, params, stats, examples, options.batch)

    return score


def _box_scores(
    detected: Sequence[DetectedBoxes], truth: Sequence[TrueBoxes], options: Options, seed: int
) -> dict[str, float]:
    matches, num_images = box_metrics.match_detections(detected, truth), len(truth)

    def resampled_map(indices: np.ndarray) -> float:
        image_counts = np.bincount(indices, minlength=num_images).astype(float)
        return box_metrics.mean_average_precision(matches, image_counts)

    images = np.arange(num_images)
    low, high = intervals.bootstrap(images, resampled_map, options.bootstrap_samples, seed)
    ap, ap50, ap75 = box_metrics.coco_map(detected, truth)
    return {
        "map_strict": box_metrics.mean_average_precision(matches),
        "map_strict_low": low,
        "map_strict_high": high,
        "map_mgca": box_metrics.map_mgca(detected, truth, min_score=options.mgca_min_score),
        "coco/ap": ap,
        "coco/ap50": ap50,
        "coco/ap75": ap75,
    }


def _finding_scores(
    detected: Sequence[DetectedBoxes], truth: Sequence[TrueBoxes], findings: Sequence[str]
) -> dict[str, float]:
    """Computes AP at an IoU of 0.5 of each finding that has true boxes, and counts findings."""
    matches = box_metrics.match_detections(detected, truth, (0.5,))
    table = box_metrics.average_precision_table(matches)
    values = {
        f"{slug(finding)}/ap50": float(table[k, 0]) if k < len(table) else float("nan")
        for k, finding in enumerate(findings)
    }
    num_scored = float(np.isfinite(list(values.values())).sum())
    num_skipped = len(findings) - num_scored
    return values | {"findings_scored": num_scored, "findings_skipped": num_skipped}


def _select_examples(
    images: Images,
    detected: Sequence[DetectedBoxes],
    truth: Sequence[TrueBoxes],
    count: int,
    seed: int,
    max_boxes: int = 5,
) -> list[BoxExample]:
    """Returns random images with true boxes, ordered by the best score in each."""
    candidates = [n for n, target in enumerate(truth) if len(target.boxes)]
    examples = []
    for n in np.random.default_rng(seed).permutation(candidates)[:count]:
        best = np.argsort(-detected[n].scores, kind="stable")[:max_boxes]
        boxes, scores = detected[n].boxes[best], detected[n].scores[best]
        examples.append(BoxExample(images[n], truth[n].boxes, boxes, scores))
    return sorted(examples, key=lambda example: -max(example.scores, default=0.0))
