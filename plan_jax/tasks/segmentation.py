"""Segmentation: a decoder fitted on the tower's maps says of each pixel what it belongs to.

Protocol: MGCA (Wang et al., arXiv 2210.06044) by its code, github.com/HKU-MedAI/MGCA
(mgca/models/ssl_segmenter.py, mgca/models/mgca/mgca_segmenter.py): a frozen tower, a U-Net decoder
on the stages of a ResNet and SETR-PUP on the patches of a ViT, focal loss and log of the soft Dice;
the epoch with the lowest validation loss is tested. What is segmented are the option `targets`, all
of them classes of one decoder, a sigmoid each (several classes are ours).

Deviation: BatchNorm of the frozen tower is in evaluation mode; MGCA leaves it in training mode,
which is `frozen_train_norm`. Deviation: no augmentation, so that features are computed once (MGCA
turns by up to 10 degrees and scales by up to 10 %, each image with probability one half).
Deviation: Dice is a mean of images, not of batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8
from scipy.special import logit

from plan_jax.heads import setr, unet
from plan_jax.heads.fit import FittedHead, fit_head, take_examples
from plan_jax.heads.head_on_tower import HeadOnTower, attach_head, require_finite, require_tower
from plan_jax.metrics import intervals, slug
from plan_jax.metrics import masks as mask_metrics
from plan_jax.tasks.grounding_targets import truth_mask
from plan_jax.types import (
    EvalData,
    MaskExample,
    Metric,
    Model,
    Record,
    Result,
    TaskContext,
    Tower,
    UserError,
)

TITLE = "Segmentation"
FITS_HEAD = True
METRICS = {
    f"{{target}}/{key}": Metric(
        f"{label}, {{target}}",
        meaning,
        baselines={
            "random encoder": f"random/{{target}}/{key}",
            "mean mask of training": f"mean_mask/{{target}}/{key}",
        },
        headline=key != "dice_positive",
    )
    for key, label, meaning in (
        (
            "dice",
            "Dice",
            "Overlap of the predicted and the true mask, mean over images; an image without truth "
            "scores 1 if nothing is predicted in it.",
        ),
        (
            "iou",
            "IoU",
            "Intersection over union of the predicted and the true mask, mean over images.",
        ),
        ("dice_positive", "Dice of positive images", "Dice of the images that have a truth."),
    )
}
SPLITS = ("train", "val", "test")
LUNGS, FINDINGS = "lungs", "findings"
PART = 256  # test images whose features and logits are in memory at once


@dataclass(frozen=True)
class Options:
    """Constants of the protocol; the defaults are those of MGCA's RSNA task.

    A target is `lungs` (all anatomy with `lung` in its name), the name of an anatomy, `findings`
    (masks of all phrases, filled boxes where there is no mask: RSNA's convention) or the name of a
    finding. `decoder` is by default `setr` for towers with maps of one size, else `unet`. `balance`
    trains on all images that have any target and as many without (SIIM, where `batch` is 8).
    `max_train_records` images are drawn for training (0: all). `learning_rate` is that of MGCA's
    shell scripts (2e-4 in its code). `focal` is the weight of the focal loss, `bootstrap_samples`
    draws make an interval, and `num_examples` images a target become rows of the page.
    """

    targets: tuple[str, ...] = (FINDINGS,)
    mode: Literal["frozen", "finetune", "frozen_train_norm"] = "frozen"
    decoder: Literal["auto", "unet", "setr"] = "auto"
    unet_widths: tuple[int, ...] = unet.WIDTHS
    setr_widths: tuple[int, ...] = setr.WIDTHS
    focal: float = 10.0
    gamma: float = 2.0
    smooth: float = 1.0
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    batch: int = 16
    epochs: int = 50
    patience: int = 10
    threshold: float = 0.5
    balance: bool = False
    max_train_records: int = 0
    bootstrap_samples: int = 1000
    num_examples: int = 6


class Split(NamedTuple):
    """Images and the masks of every target in them, 0 to 1."""

    images: UInt8[np.ndarray, "N Y X 1"]
    masks: Shaped[np.ndarray, "N Y X K"]


def requirements(options: Options) -> tuple[str, ...]:
    """Returns `anatomy` if the lungs are segmented; `check` looks for the other targets."""
    return ("anatomy",) if LUNGS in options.targets else ()


def check(data: EvalData, options: Options) -> None:
    """See that every target is known, and that the records have its masks.

    An image without boxes or masks of a finding is one without it; anatomy is in every image.

    Raises:
      UserError: there are no targets, or two of one name; a target is neither finding nor anatomy;
        a split has no records; train lacks a target, or one record an anatomy others have.
    """
    targets, findings = options.targets, data.findings
    splits = {split: getattr(data, split) for split in SPLITS}
    if not targets or len({slug(target) for target in targets}) < len(targets):
        raise UserError(f"segmentation.targets is {targets}; name at least one, and each once")
    for split in SPLITS:
        if not len(splits[split]):
            raise UserError(f"task segmentation needs records in {split}, which has none; add some")
    anatomy = {name: 0 for split in SPLITS for one in splits[split] for name in one.anatomy}
    for target in targets:
        if target in anatomy or target == LUNGS:
            _every_record_has(target, splits)
        elif target in (FINDINGS, *findings):
            if not any(mask_of(record, target, findings).any() for record in splits["train"]):
                raise UserError(
                    f"task segmentation needs masks or boxes of {target!r}, and no train record "
                    "has any; give some, or leave it out of segmentation.targets"
                )
        else:
            known = ", ".join(dict.fromkeys([LUNGS, FINDINGS, *findings, *anatomy]))
            raise UserError(f"segmentation.targets names {target!r}; use some of {known}")


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Fit a decoder to `train`, choose its epoch on `val`, and judge the masks it finds in `test`.

    Keys, for each target: `<target>/dice` (an image without truth counts 1 if nothing is found in
    it, else 0), with its 95 % bootstrap interval over images in `.../dice_low`, `.../dice_high`;
    `.../iou` in the same way; `.../dice_positive` over images that have a truth (NaN if none has).
    `mean_mask/<target>/...` is what the mean mask of training scores, the same for every image
    (ours). `n_train`, `n_test`, `epochs`. In `context.folder` the fit is kept, so that a stopped
    call goes on. The rows are the best, some random and the worst images of each target.

    Raises:
      UserError: what `check` says; too few widths for the tower; `max_train_records` leaves no
        mask; the model has no tower, or one whose features are not finite.
    """
    check(data, options)
    findings, folder, seed = data.findings, context.folder, context.seed
    tower = require_tower(model)
    splits = {split: gather(getattr(data, split), options.targets, findings) for split in SPLITS}
    chosen = draw(splits["train"].masks.any((1, 2, 3)), options, seed)
    splits["train"] = take_examples(splits["train"], chosen)
    if not (there := splits["train"].masks.any((0, 1, 2))).all():
        raise UserError(
            f"train has no mask of {options.targets[int(np.argmin(there))]!r} to learn from, with "
            f"segmentation.max_train_records {options.max_train_records}; give more records"
        )
    probe = _attached(tower, splits["train"], options, seed)
    about = f"{tower.name} {options} {tuple(findings)}"
    fit = _fitted(probe, splits, options, about, folder, seed)
    found = _found(probe, fit, splits["test"].images, options.threshold)
    truth = splits["test"].masks > 0.5
    usual = np.broadcast_to(splits["train"].masks.mean(0, dtype=np.float32) > 0.5, truth.shape)
    values, rows = {}, []
    for n, target in enumerate(options.targets):
        scores, dice = _scores(found[..., n], truth[..., n])
        null, _ = _scores(usual[..., n], truth[..., n])
        low, high = intervals.bootstrap(dice, n=options.bootstrap_samples, seed=seed)
        values |= {f"{slug(target)}/{key}": value for key, value in scores.items()}
        values |= {f"{slug(target)}/dice_low": low, f"{slug(target)}/dice_high": high}
        values |= {f"mean_mask/{slug(target)}/{key}": value for key, value in null.items()}
        for i in pick_rows(dice, truth[..., n].any((1, 2)), options.num_examples, seed):
            image, masks = splits["test"].images[i], (truth[i, ..., n], found[i, ..., n])
            rows.append(MaskExample(target, image, *masks, float(dice[i])))
    counts = {"n_train": len(chosen), "n_test": len(truth), "epochs": len(fit.history)}
    return Result(values | {key: float(count) for key, count in counts.items()}, rows)


def mixed_loss(
    logits: Float[Array, "B Y X K"],
    masks: Shaped[Array, "B Y X K"],
    *,
    focal: float = 10.0,
    gamma: float = 2.0,
    smooth: float = 1.0,
) -> Float[Array, ""]:
    """Add the focal loss of pixels and minus the log of the soft Dice of the whole batch.

    *With x logits, p = sigmoid(x), t masks from 0 to 1: focal mean[sigmoid(-x (2t - 1))^gamma
    BCE(x, t)] - mean_K log[(2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)]*, in MGCA's code for
    one class. For 0 or 1 the factor is 1 minus the probability of the truth; between them t pulls
    it to sigmoid(0) (theirs). Masks may be Bool.
    """
    x, t = logits.astype(jnp.float32), masks.astype(jnp.float32)
    weight = jnp.exp(gamma * jax.nn.log_sigmoid(-x * (2 * t - 1)))
    pixels = (weight * optax.sigmoid_binary_cross_entropy(x, t)).mean()
    p = jax.nn.sigmoid(x)
    both, each = ((part).sum((0, 1, 2)) for part in (p * t, p + t))
    return focal * pixels - jnp.log((2 * both + smooth) / (each + smooth)).mean()


def mask_of(record: Record, target: str, findings: Sequence[str]) -> Shaped[np.ndarray, "Y X"]:
    """Draw where a target is in a record: Bool, or 0 to 1 where an anatomy mask is soft.

    What is neither anatomy of the record nor a finding is nowhere.
    """
    if names := _anatomy(record, target):
        masks = [np.asarray(record.anatomy[name]) for name in names]
        kind = bool if all(mask.dtype == bool for mask in masks) else np.float32
        return np.max([mask.astype(kind) for mask in masks], axis=0)
    union = np.zeros(record.image.shape[:2], bool)
    for phrase in record.phrases:
        named = 0 <= phrase.finding < len(findings) and findings[phrase.finding] == target
        if named or target == FINDINGS:
            union |= truth_mask(phrase, union.shape)
    return union


def gather(records: Sequence[Record], targets: Sequence[str], findings: Sequence[str]) -> Split:
    """Stack images, and masks with one channel for each target."""
    masks = [np.stack([mask_of(one, name, findings) for name in targets], -1) for one in records]
    return Split(np.stack([record.image for record in records]), np.stack(masks))


def draw(positive: Bool[np.ndarray, " N"], options: Options, seed: int) -> Int[np.ndarray, " M"]:
    """Choose the rows to train on, in order: balanced first, then limited (MGCA's order).

    >>> few = np.array([True, False, False, False])
    >>> len(draw(few, Options(balance=True), 0)), draw(few, Options(), 0).tolist()
    (2, [0, 1, 2, 3])
    """
    random, chosen = np.random.default_rng(seed), np.arange(len(positive))
    if options.balance:
        absent = random.permutation(chosen[~positive])[: positive.sum()]
        chosen = np.sort(np.concatenate([chosen[positive], absent]))
    if 0 < options.max_train_records < len(chosen):
        chosen = np.sort(random.permutation(chosen)[: options.max_train_records])
    return chosen


def pick_rows(
    dice: Float[np.ndarray, " N"], positive: Bool[np.ndarray, " N"], number: int, seed: int
) -> list[int]:
    """Choose `number` images to show, best first: a third each best, worst and random.

    Only images that have a truth, if there are any.

    >>> pick_rows(np.array([0.1, 0.9, 0.5, 1.0]), np.array([True, True, True, False]), 2, 0)
    [1, 0]
    """
    able = np.flatnonzero(positive) if positive.any() else np.arange(len(dice))
    order = able[np.argsort(-dice[able], kind="stable")]
    if len(order) <= number:
        return order.tolist()
    best = -(-number // 3)
    worst = -(-(number - best) // 2)
    ends = np.r_[np.arange(best), np.arange(len(order) - worst, len(order))]
    middle = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(order)), ends))
    return order[np.sort(np.r_[ends, middle[: number - len(ends)]])].tolist()


def _anatomy(record: Record, target: str) -> list[str]:
    """List the anatomy of a record that a target consists of."""
    if target == LUNGS:
        return [name for name in record.anatomy if "lung" in name.lower()]
    return [target] if target in record.anatomy else []


def _every_record_has(target: str, splits: Mapping[str, Sequence[Record]]) -> None:
    """See that all records have a mask of an anatomy."""
    if not any(_anatomy(record, target) for record in splits["train"]):
        raise UserError(
            f"task segmentation needs masks of {target!r}, and no train record has one; give "
            "some, or leave it out of segmentation.targets"
        )
    for split in SPLITS:
        for n, record in enumerate(splits[split]):
            if not _anatomy(record, target):
                raise UserError(
                    f"record {n} of {split} (patient {record.patient_id!r}) has no mask of "
                    f"{target!r}, which others have; leave out the record, or the target"
                )


def _decoder(tower: Tower, images: np.ndarray, classes: int, options: Options) -> nn.Module:
    """Choose the decoder that suits the tower's maps."""
    stages = jax.eval_shape(lambda v, x: tower.apply(v, x, False, True)[0], tower.variables, images)
    kind = options.decoder
    if kind == "auto":
        kind = "unet" if len({one.shape[1:3] for one in stages.maps}) > 1 else "setr"
    size = images.shape[1:3]
    if kind == "setr":
        return setr.SETR(classes, size, tuple(options.setr_widths))
    return unet.UNet(classes, size, tuple(options.unet_widths))


def _attached(tower: Tower, train: Split, options: Options, seed: int) -> HeadOnTower:
    head = _decoder(tower, train.images[:2], train.masks.shape[-1], options)

    def criterion(logits: Float[Array, "B Y X K"], rows: Mapping[str, Any]) -> Float[Array, ""]:
        weights = {"focal": options.focal, "gamma": options.gamma, "smooth": options.smooth}
        return mixed_loss(logits, rows["mask"], **weights)

    used = slice(-1, None) if isinstance(head, setr.SETR) else slice(None)
    return attach_head(
        tower,
        head,
        criterion,
        {"image": train.images[:2]},
        mode=options.mode,
        seed=seed,
        select_features=lambda stages: unet.last_of_each_size(stages.maps)[used],
    )


def _fitted(
    probe: HeadOnTower,
    data: Mapping[str, Split],
    options: Options,
    about: str,
    folder: Path | None,
    seed: int,
) -> FittedHead:
    train, val = (
        probe.examples(data[split].images) | {"mask": data[split].masks}
        for split in ("train", "val")
    )
    return fit_head(
        probe.loss,
        probe.params,
        probe.stats,
        train,
        val,
        optax.adamw(options.learning_rate, weight_decay=options.weight_decay),
        batch=options.batch,
        epochs=options.epochs,
        patience=options.patience,
        seed=seed,
        name="segmentation",
        description=about,
        folder=folder,
    )


def _found(probe: HeadOnTower, fit: FittedHead, images: np.ndarray, threshold: float) -> np.ndarray:
    """See in images [N Y X 1] the masks [N Y X K]."""
    parts = []
    for start in range(0, len(images), PART):
        rows = probe.examples(images[start : start + PART])
        parts.append(require_finite(probe.predict(fit.params, fit.stats, rows)) > logit(threshold))
    return np.concatenate(parts)


def _scores(
    found: Bool[np.ndarray, "N Y X"], truth: Bool[np.ndarray, "N Y X"]
) -> tuple[dict[str, float], Float[np.ndarray, " N"]]:
    """Give the means over images, and the Dice of each."""
    pair = [masks.reshape(len(masks), -1) for masks in (found, truth)]
    each = {name: getattr(mask_metrics, name)(*pair) for name in ("dice", "iou", "dice_positive")}
    return {name: mask_metrics.nan_mean(values) for name, values in each.items()}, each["dice"]
