"""Detection: a YOLOv3 head finds the findings' boxes in what the tower sees.

Protocol: MGCA (Wang et al., arXiv 2210.06044) by its code, github.com/HKU-MedAI/MGCA
(mgca/models/ssl_detector.py, mgca/models/mgca/mgca_detector.py): a frozen ResNet-50 at 224 pixels,
no augmentation, anchors of YOLOv3; RSNA's boxes are one class. The head and its loss are in
`heads/yolo.py`, targets and suppression in `heads/boxes.py`, the metrics in `box_metrics.py`.

Deviation: BatchNorm of the frozen tower is in evaluation mode; `frozen_train_norm` is MGCA's.
Deviation: MGCA scores only images with a true box and a box found, boxes of objectness >= 0.5; that
is `map_mgca`, and the rest is over all images and boxes of objectness >= `score_floor`. Deviation:
training is judged by `map_strict`, not by `map_mgca`, and while it is 0 by the validation loss, so
that patience does not run out before the first box is found.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
import optax
from jaxtyping import PyTree, UInt8

from plan_jax.heads import yolo
from plan_jax.heads.anchors import anchors_for_size, detect, suppress_non_maxima
from plan_jax.heads.fit import fit_head, take_examples
from plan_jax.heads.head_on_tower import HeadOnTower, attach_head, map_chunks, require_tower
from plan_jax.heads.pyramid import last_three_sizes
from plan_jax.metrics import boxes as box_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.metrics.boxes import DetectedBoxes, TrueBoxes, map_mgca, map_strict
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
)

TITLE = "Detection"
FITS_HEAD = True
METRICS = {
    "map_strict": Metric(
        "mAP .40:.75, strict",
        "Average precision, mean over IoU thresholds .40 to .75, over all images.",
        baselines={"random encoder": "random/map_strict", "usual boxes": "prior/map_strict"},
        headline=True,
    ),
    "map_mgca": Metric(
        "mAP .40:.75, as MGCA counts",
        "The same over images with a true box and a predicted box of objectness 0.5 or more.",
        baselines={"random encoder": "random/map_mgca"},
        headline=True,
    ),
    "coco/ap": Metric(
        "AP at IoU .50:.95",
        "Average precision by pycocotools, mean over IoU thresholds .50 to .95.",
        baselines={"random encoder": "random/coco/ap"},
    ),
    "coco/ap50": Metric(
        "AP at IoU .5",
        "Average precision by pycocotools; a box counts if it overlaps a true one by half.",
        baselines={"random encoder": "random/coco/ap50"},
        headline=True,
    ),
    "coco/ap75": Metric(
        "AP at IoU .75",
        "Average precision by pycocotools; a box counts if it overlaps a true one by 3/4.",
        baselines={"random encoder": "random/coco/ap75"},
    ),
    "{finding}/ap50": Metric(
        "AP at IoU .5, {finding}",
        "Average precision of the boxes of one finding.",
        baselines={"random encoder": "random/{finding}/ap50"},
    ),
}
PART = 512  # images whose maps are in memory at once
PRIOR_BOXES, PRIOR_FOUND = 1000, 10  # boxes of training the null looks at, and gives (ours)


@dataclass(frozen=True)
class Options:
    """Constants of the protocol; those without a source here are MGCA's.

    `classes`: all findings are one class (`any`, as RSNA) or each is its own (`each`, ours).
    `widths` are those of YOLOv3's 1x1 convolutions, coarsest map first. `average` and
    `published_background` are those of `heads.yolo.yolo_loss`. `judge` chooses the epoch (`loss` is
    cheap: it draws no boxes). Boxes enter suppression by IoU >= `suppress` if they are among the
      `candidates` (ours) best of an image with objectness >= `score_floor` (ours).
      `max_train_records` images are drawn for training (0: all); `bootstrap_samples` draws make an
      interval; `num_examples` images become rows of the page.
    """

    classes: Literal["any", "each"] = "any"
    mode: Literal["frozen", "finetune", "frozen_train_norm"] = "frozen"
    widths: tuple[int, int, int] = (512, 256, 128)
    average: Literal["cells", "objects"] = "cells"
    published_background: bool = False
    learning_rate: float = 5e-4
    weight_decay: float = 1e-6
    batch: int = 16
    epochs: int = 50
    patience: int = 10
    judge: Literal["map_strict", "map_mgca", "loss"] = "map_strict"
    score_mgca: float = 0.5
    score_floor: float = 0.01
    suppress: float = 0.5
    candidates: int = 100
    max_train_records: int = 0
    bootstrap_samples: int = 1000
    num_examples: int = 6


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that holds its boxes."""
    return ("phrases",)


def check(data: EvalData, options: Options) -> None:
    """See that there is something to find in every split, and that the head can be made.

    Raises:
      UserError: a split has no box, or `widths` are not three.
    """
    if len(options.widths) != 3:
        raise UserError(f"widths of detection are {options.widths}; give three, coarsest first")
    for split in ("train", "val", "test"):
        records = getattr(data, split)
        given = (true_boxes(record, options, data.findings)[0] for record in records)
        if not any(len(truth.boxes) for truth in given):
            raise UserError(
                f"task detection needs boxes or masks of phrases, and the {split} split has none;"
                " give some, or leave the task out"
            )


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Fit a head to `train`, choose its epoch on `val`, and judge the boxes it finds in `test`.

    Keys: `map_strict`, with its 95 % bootstrap interval over images in `map_strict_low`, `.._high`
    (a little too high for some ten images: the same found twice in a row flatters precision);
    `map_mgca`; `coco/ap`, `coco/ap50`, `coco/ap75`; `prior/map_strict`, where every image is given
    the usual boxes of training (ours); `n_train`, `n_test`, `epochs`; `boxes_dropped` of all
    splits. With `each`, `<finding>/ap50` of findings with boxes in `test`, and their number in
    `findings_scored`, of the others in `findings_skipped`.

    Raises:
      UserError: there is nothing to find, or to learn from.
    """
    check(data, options)
    findings, folder, seed = data.findings, context.folder, context.seed
    splits = {name: list(getattr(data, name)) for name in ("train", "val", "test")}
    splits["train"] = _drawn(splits["train"], options.max_train_records, seed)
    pairs = {
        name: [true_boxes(r, options, findings) for r in some] for name, some in splits.items()
    }
    truth = {name: [one for one, _ in some] for name, some in pairs.items()}
    if not any(len(one.boxes) for one in truth["train"]):
        raise UserError(
            f"max_train_records {options.max_train_records} leaves no box to learn; give more"
        )
    tower = require_tower(model)
    images = {name: np.stack([r.image for r in some]) for name, some in splits.items()}
    room = max(len(one.boxes) for name in ("train", "val") for one in truth[name])
    probe = _attached(tower, images["train"], _classes(options, findings), options, seed)
    rows = {
        name: probe.examples(images[name]) | padded(truth[name], room) for name in ("train", "val")
    }
    find = _finder(probe, images["test"].shape[1:3], options)
    fit = fit_head(
        probe.loss,
        probe.params,
        probe.stats,
        rows["train"],
        rows["val"],
        optax.adamw(options.learning_rate, weight_decay=options.weight_decay),
        batch=options.batch,
        epochs=options.epochs,
        patience=options.patience,
        seed=seed,
        name="detection",
        score=_judge(probe, find, rows["val"], truth["val"], options),
        description=f"{tower.name} {options} {tuple(findings)}",
        folder=folder,
    )
    found = find(fit.params, fit.stats, probe.examples(images["test"]))
    values = _scores(found, truth["test"], options, seed)
    null = [prior(truth["train"], options.suppress)] * len(found)
    values |= {
        "prior/map_strict": map_strict(null, truth["test"]),
        "n_train": float(len(splits["train"])),
        "n_test": float(len(splits["test"])),
        "epochs": float(len(fit.history)),
        "boxes_dropped": float(sum(lost for some in pairs.values() for _, lost in some)),
    }
    if options.classes == "each":
        values |= _each(found, truth["test"], findings)
    rows = _shown(images["test"], found, truth["test"], options.num_examples, seed)
    return Result(values, rows)


def true_boxes(record: Record, options: Options, findings: Sequence[str]) -> tuple[TrueBoxes, int]:
    """List the boxes of a record's phrases, cut at its borders, and count those that are dropped.

    A phrase without boxes has that of its mask (one, also around several parts). A box twice of
    one class, of phrases that say the same, is one. Dropped are boxes wholly outside of the image
    or without area, and, where each finding is a class, those of a phrase without a finding.
    """
    rows, columns = record.image.shape[:2]
    number = _classes(options, findings)
    kept: dict[tuple, None] = {}
    dropped = 0
    for phrase in record.phrases:
        kind = phrase.finding if options.classes == "each" else 0
        for box in phrase.boxes or _around(phrase):
            x0, x1 = (float(np.clip(x, 0, columns)) for x in box[::2])
            y0, y1 = (float(np.clip(y, 0, rows)) for y in box[1::2])
            if x0 < x1 and y0 < y1 and 0 <= kind < number:
                kept[x0, y0, x1, y1, kind] = None
            else:
                dropped += 1
    table = np.array(list(kept), np.float32).reshape(-1, 5)
    return TrueBoxes(table[:, :4], table[:, 4].astype(np.int32)), dropped


def padded(truth: Sequence[TrueBoxes], room: int) -> dict[str, np.ndarray]:
    """Put boxes into arrays of one size: `boxes` [N R 4], `mask` [N R] and `classes` [N R]."""
    number = len(truth)
    boxes, kinds = np.zeros((number, room, 4), np.float32), np.zeros((number, room), np.int32)
    real = np.zeros((number, room), bool)
    for n, one in enumerate(truth):
        boxes[n, : len(one.boxes)], kinds[n, : len(one.boxes)] = one.boxes, one.classes
        real[n, : len(one.boxes)] = True
    return {"boxes": boxes, "mask": real, "classes": kinds}


def prior(truth: Sequence[TrueBoxes], suppress: float = 0.5) -> DetectedBoxes:
    """Give the usual boxes of training images: what a detector knows that sees no image (ours).

    Every training box (of `PRIOR_BOXES` at even distances) scores by the share of them that are
    of its class and overlap it by half; after suppression the best `PRIOR_FOUND` are left.
    """
    boxes = np.concatenate([one.boxes for one in truth])
    kinds = np.concatenate([one.classes for one in truth])
    chosen = np.linspace(0, len(boxes) - 1, min(len(boxes), PRIOR_BOXES)).astype(int)
    boxes, kinds = boxes[chosen], kinds[chosen]
    corners = boxes.astype(np.float64)
    near = (box_metrics.box_iou(corners, corners) >= 0.5) & (kinds[:, None] == kinds)
    score = near.mean(1).astype(np.float32)
    keep = np.flatnonzero(
        np.asarray(jax.jit(partial(suppress_non_maxima, max_iou=suppress))(boxes, score, kinds))
    )
    best = keep[np.argsort(-score[keep], kind="stable")[:PRIOR_FOUND]]
    return DetectedBoxes(boxes[best], score[best], kinds[best])


def _classes(options: Options, findings: Sequence[str]) -> int:
    return len(findings) if options.classes == "each" else 1


def _around(phrase: Phrase) -> tuple[tuple[float, ...], ...]:
    """Give the box around a phrase's mask, if it has one; without area if the mask is empty."""
    if phrase.mask is None:
        return ()
    rows, columns = (np.flatnonzero(np.asarray(phrase.mask, bool).any(axis)) for axis in (1, 0))
    if not len(rows):
        return ((0.0, 0.0, 0.0, 0.0),)
    return ((float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0),)


def _drawn(records: list[Record], limit: int, seed: int) -> list[Record]:
    """Draw `limit` records, in their order (0, or more than there are: all)."""
    if not 0 < limit < len(records):
        return records
    chosen = np.random.default_rng(seed).permutation(len(records))[:limit]
    return [records[n] for n in np.sort(chosen)]


def _attached(
    tower: Tower, images: UInt8[np.ndarray, "N Y X 1"], count: int, options: Options, seed: int
) -> HeadOnTower:
    def criterion(outputs: tuple, rows: Mapping[str, Any]) -> jax.Array:
        return yolo.yolo_loss(
            outputs,
            rows["boxes"],
            rows["mask"],
            rows["classes"],
            size=images.shape[1:3],
            average=options.average,
            published_background=options.published_background,
        )

    return attach_head(
        tower,
        yolo.Yolo(count, options.widths),
        criterion,
        {"image": images[:2]},
        select_features=lambda stages: last_three_sizes(stages.maps),
        mode=options.mode,
        seed=seed,
    )


def _finder(
    probe: HeadOnTower, size: tuple[int, int], options: Options
) -> Callable[..., list[DetectedBoxes]]:
    """Make the function from parameters and rows to the boxes found in each of them."""
    one = partial(
        detect,
        anchors=anchors_for_size(size),
        size=size,
        num_candidates=options.candidates,
        min_score=options.score_floor,
        max_iou=options.suppress,
    )
    many = jax.jit(jax.vmap(one))

    def find(params: PyTree, stats: PyTree, rows: Mapping[str, PyTree]) -> list[DetectedBoxes]:
        found = []
        number = len(jax.tree.leaves(rows)[0])
        for start in range(0, number, PART):
            some = take_examples(rows, np.arange(start, min(start + PART, number)))
            seen = map_chunks(many, probe.predict(params, stats, some))
            for boxes, scores, kinds, keep in zip(*seen, strict=True):
                found.append(DetectedBoxes(boxes[keep], scores[keep], kinds[keep]))
        return found

    return find


def _judge(
    probe: HeadOnTower,
    find: Callable,
    rows: Mapping[str, PyTree],
    truth: Sequence[TrueBoxes],
    options: Options,
) -> Callable[[PyTree, PyTree], float] | None:
    """Make what chooses the epoch: the mean average precision; while it is 0, minus the loss."""
    if options.judge == "loss":
        return None
    measured = jax.jit(lambda p, s, some: probe.loss(p, s, some, jax.random.key(0), False)[0])
    starts = range(0, len(truth), options.batch)
    parts = [np.arange(n, min(n + options.batch, len(truth))) for n in starts]

    def judge(params: PyTree, stats: PyTree) -> float:
        found = find(params, stats, rows)
        strict = options.judge == "map_strict"
        value = (
            map_strict(found, truth)
            if strict
            else map_mgca(found, truth, min_score=options.score_mgca)
        )
        if value > 0:
            return value
        losses = [len(n) * float(measured(params, stats, take_examples(rows, n))) for n in parts]
        return -sum(losses) / len(truth)

    return judge


def _scores(
    found: Sequence[DetectedBoxes], truth: Sequence[TrueBoxes], options: Options, seed: int
) -> dict[str, float]:
    matches, number = box_metrics.match_detections(found, truth), len(truth)

    def redrawn(drawn: np.ndarray) -> float:
        times = np.bincount(drawn, minlength=number).astype(float)
        return box_metrics.mean_average_precision(matches, times)

    low, high = intervals.bootstrap(np.arange(number), redrawn, options.bootstrap_samples, seed)
    whole, half, strict = box_metrics.coco_map(found, truth)
    return {
        "map_strict": box_metrics.mean_average_precision(matches),
        "map_strict_low": low,
        "map_strict_high": high,
        "map_mgca": map_mgca(found, truth, min_score=options.score_mgca),
        "coco/ap": whole,
        "coco/ap50": half,
        "coco/ap75": strict,
    }


def _each(
    found: Sequence[DetectedBoxes], truth: Sequence[TrueBoxes], findings: Sequence[str]
) -> dict[str, float]:
    table = box_metrics.average_precision_table(box_metrics.match_detections(found, truth, (0.5,)))
    known = {
        f"{slug(findings[k])}/ap50": float(value)
        for k, (value,) in enumerate(table)
        if not np.isnan(value)
    }
    scored, skipped = float(len(known)), float(len(findings) - len(known))
    return known | {"findings_scored": scored, "findings_skipped": skipped}


def _shown(
    images: UInt8[np.ndarray, "N Y X 1"],
    found: Sequence[DetectedBoxes],
    truth: Sequence[TrueBoxes],
    number: int,
    seed: int,
    most: int = 5,
) -> list[BoxExample]:
    """Draw images with true boxes, and order them by the best score in each."""
    able = [n for n, one in enumerate(truth) if len(one.boxes)]
    chosen = np.random.default_rng(seed).permutation(able)[:number]
    rows = []
    for n in chosen:
        best = np.argsort(-found[n].scores, kind="stable")[:most]
        rows.append(
            BoxExample(images[n], truth[n].boxes, found[n].boxes[best], found[n].scores[best])
        )
    return sorted(rows, key=lambda row: -max(row.scores, default=0.0))
