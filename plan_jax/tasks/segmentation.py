"""Segmentation: a decoder on the maps of the image tower, fitted to masks.

The protocol is MGCA's (Wang et al., arXiv 2210.06044), by its code, github.com/HKU-MedAI/MGCA
(mgca/models/ssl_segmenter.py, mgca/models/mgca/mgca_segmenter.py): a frozen tower, a U-Net decoder
on the stages of a ResNet and SETR-PUP on the patches of a ViT, focal loss and log of the soft Dice;
the epoch with the lowest validation loss is tested. The option `targets` names what is segmented;
all targets are classes of one decoder, with a sigmoid each (several classes are ours).

Keys of the metrics, for each target:

- `<target>/dice` (an image without a true mask scores 1 if its predicted mask is empty, else 0),
  with its 95 % bootstrap interval over images in `<target>/dice_low`, `<target>/dice_high`;
  `<target>/iou` with the same convention; `<target>/dice_positive` over the images that have a true
  mask (NaN if none has).
- `mean_mask/<target>/...` is the mean mask of training, the same for every image (ours).
- `n_train`, `n_test` and `epochs` are counts.

Deviation: BatchNorm of the frozen tower is in evaluation mode; MGCA leaves it in training mode,
which is `frozen_train_norm`. Deviation: no augmentation, so that features are computed once (MGCA
turns by up to 10 degrees and scales by up to 10 %, each image with probability one half).
Deviation: Dice is a mean of images, not of batches.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped
from scipy.special import logit

from plan_jax.heads import setr, unet
from plan_jax.heads.examples import (
    Images,
    StoredRows,
    list_batches,
    open_images,
    read_batches,
    share_batches,
    take_examples,
)
from plan_jax.heads.fit import FitResult, fit_head
from plan_jax.heads.head_on_tower import (
    HeadOnTower,
    Mode,
    attach_head,
    require_finite,
    require_tower,
)
from plan_jax.heads.pyramid import last_of_each_size
from plan_jax.metrics import intervals, slug
from plan_jax.metrics import masks as mask_metrics
from plan_jax.tasks.grounding_targets import compress_mask, expand_mask, truth_mask
from plan_jax.types import (
    EvalData,
    MaskExample,
    Metric,
    Model,
    Record,
    Result,
    StoredRecords,
    TaskContext,
    Tower,
    UserError,
    check_options,
    read_annotations,
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
        undefined="no evaluated image has a mask of it",
    )
    for key, label, meaning in (
        (
            "dice",
            "Dice",
            "Overlap of predicted and true mask, mean over images; an image without a true mask "
            "scores 1 if its predicted mask is empty, else 0.",
        ),
        (
            "iou",
            "IoU",
            "Intersection over union of predicted and true mask, mean over images; an image "
            "without a true mask scores 1 if its predicted mask is empty, else 0.",
        ),
        (
            "dice_positive",
            "Dice of positive images",
            "Overlap of predicted and true mask, mean over the images that have a true mask.",
        ),
    )
}
SPLITS = ("train", "val", "test")
LUNGS, FINDINGS = "lungs", "findings"
CHUNK_SIZE = 256  # test images whose features and logits are in memory at once
MASK_METRICS = {
    "dice": mask_metrics.dice,
    "iou": mask_metrics.iou,
    "dice_positive": mask_metrics.dice_positive,
}


@dataclass(frozen=True)
class Options:
    """The constants of the protocol; the defaults are those of MGCA's RSNA task.

    Attributes:
      targets: what is segmented. A target is `lungs` (all anatomy with `lung` in its name), the
        name of an anatomy, `findings` (masks of all phrases, filled boxes where there is no mask:
        RSNA's convention) or the name of a finding.
      mode: what is fitted, see `heads.head_on_tower`.
      decoder: `auto` is `setr` for towers whose maps have one size, else `unet`.
      unet_widths: channels of the U-Net's blocks, deepest first.
      setr_widths: channels of SETR's blocks.
      focal_weight: weight of the focal loss.
      gamma: exponent of the focal loss.
      smooth: added to both sides of the soft Dice.
      learning_rate: of AdamW; that of MGCA's shell scripts (2e-4 in its code).
      weight_decay: of AdamW.
      batch: examples in a batch.
      epochs: the largest number of epochs.
      patience: epochs without a lower validation loss after which the fit stops.
      threshold: the probability from which a pixel belongs to the mask.
      balance: train on all images that have any target and as many without (SIIM, where `batch` is
        8).
      max_train_records: so many records are drawn for training; 0 for all.
      bootstrap_samples: resamples of an interval.
      num_examples: images of each target on the page.
    """

    targets: tuple[str, ...] = (FINDINGS,)
    mode: Mode = "frozen"
    decoder: Literal["auto", "unet", "setr"] = "auto"
    unet_widths: tuple[int, ...] = unet.WIDTHS
    setr_widths: tuple[int, ...] = setr.WIDTHS
    focal_weight: float = 10.0
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

    def __post_init__(self) -> None:
        non_negative = (
            "focal_weight",
            "gamma",
            "smooth",
            "learning_rate",
            "weight_decay",
            "max_train_records",
            "num_examples",
        )
        positive = ("batch", "epochs", "patience")
        minima = dict.fromkeys(non_negative, 0) | dict.fromkeys(positive, 1)
        minima["bootstrap_samples"] = 2
        check_options("segmentation", self, minima)
        if not 0 < self.threshold < 1:
            raise UserError(
                f"config.eval.segmentation.threshold is {self.threshold}; use a number between 0 "
                "and 1"
            )
        if not self.targets or len({slug(name) for name in self.targets}) < len(self.targets):
            raise UserError(
                f"config.eval.segmentation.targets is {self.targets}; name at least one target, "
                "and each once"
            )


Masks = Shaped[np.ndarray, "N Y X K"] | StoredRows


class MaskSplit(NamedTuple):
    """Images, and the masks of every target in them, 0 to 1."""

    images: Images
    masks: Masks


def requirements(options: Options) -> tuple[str, ...]:
    """Returns `anatomy` if the lungs are a target; `check` looks for the other targets."""
    return ("anatomy",) if LUNGS in options.targets else ()


def check(data: EvalData, options: Options) -> None:
    """Checks that every target is known, and that the records have its masks.

    A finding without boxes or masks is absent from an image; anatomy is present in every image.

    Raises:
      UserError: a target is neither a finding nor an anatomy; a split has no records; no training
        record has a target; or one record lacks an anatomy that others have.
    """
    for split in SPLITS:
        if not len(getattr(data, split)):
            raise UserError(f"task segmentation has no records in split {split}; add some")
    anatomy = {split: _list_anatomy(getattr(data, split)) for split in SPLITS}
    names = dict.fromkeys(name for split in SPLITS for row in anatomy[split] for name in row)
    for target in options.targets:
        if target in names or target == LUNGS:
            _check_anatomy(target, data, anatomy)
        elif target in (FINDINGS, *data.findings):
            annotated = read_annotations(data.train)
            if not any(target_mask(r, target, data.findings).any() for r in annotated):
                raise UserError(
                    f"task segmentation needs masks or boxes of {target!r}, and no training record "
                    f"has any; add some, or drop {target!r} from config.eval.segmentation.targets"
                )
        else:
            choices = ", ".join(dict.fromkeys([LUNGS, FINDINGS, *data.findings, *names]))
            raise UserError(
                f"config.eval.segmentation.targets names {target!r}; choose from {choices}"
            )


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Fits a decoder to `data.train`, selects its epoch on `data.val`, and scores its test masks.

    The examples are the best, some random and the worst images of each target.

    Raises:
      UserError: see `check`; there are too few widths for the tower; `max_train_records` leaves no
        mask; the model has no tower, or one whose features are not finite.
    """
    check(data, options)
    tower, seed = require_tower(model), context.seed
    splits = {
        split: open_masks(getattr(data, split), options.targets, data.findings) for split in SPLITS
    }
    has_target = np.zeros(len(splits["train"].images), bool)
    if options.balance:
        has_target = _find_positives(splits["train"].masks)
    splits["train"] = take_examples(splits["train"], draw_training(has_target, options, seed))
    train, test = splits["train"], splits["test"]
    mean_masks = _mean_masks(train.masks)
    is_present = mean_masks.any((0, 1))
    if not is_present.all():
        raise UserError(
            f"no training record has a mask of {options.targets[int(np.argmin(is_present))]!r} "
            f"with config.eval.segmentation.max_train_records {options.max_train_records}; use "
            "more records"
        )
    attached = _attach_decoder(tower, train, options, seed)
    description = f"{tower.name} {options} {tuple(data.findings)}"
    fit_result = _fit_decoder(attached, splits, options, description, context)
    predict = partial(_predict_masks, attached, fit_result, threshold=options.threshold)
    scores, has_mask = _score_masks(predict, test, mean_masks > 0.5)
    metrics: dict[str, float] = {}
    examples = []
    for k, target in enumerate(options.targets):
        key, dice = slug(target), scores["dice"][0, :, k]
        for name, (values, baseline) in scores.items():
            metrics[f"{key}/{name}"] = mask_metrics.nan_mean(values[:, k])
            metrics[f"mean_mask/{key}/{name}"] = mask_metrics.nan_mean(baseline[:, k])
        low, high = intervals.bootstrap(dice, n=options.bootstrap_samples, seed=seed)
        metrics |= {f"{key}/dice_low": low, f"{key}/dice_high": high}
        for i in select_examples(dice, has_mask[:, k], options.num_examples, seed):
            image, truth = test.images[i], test.masks[i] > 0.5
            predicted = predict(test.images[i : i + 1])[0]
            pair = truth[..., k], predicted[..., k]
            examples.append(MaskExample(target, image, *pair, float(dice[i])))
    counts = {
        "n_train": len(train.images),
        "n_test": len(has_mask),
        "epochs": len(fit_result.history),
    }
    return Result(metrics | {key: float(count) for key, count in counts.items()}, examples)


def mixed_loss(
    logits: Float[Array, "B Y X K"],
    masks: Shaped[Array, "B Y X K"],
    *,
    focal_weight: float = 10.0,
    gamma: float = 2.0,
    smooth: float = 1.0,
) -> Float[Array, ""]:
    """Computes the focal loss of pixels, minus the log of the soft Dice of the whole batch.

    *focal_weight mean[sigmoid(-x (2t - 1))^gamma BCE(x, t)]
    - mean_K log[(2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth)]*, with x the logits,
    p = sigmoid(x), t the masks from 0 to 1 and BCE the binary cross-entropy; in MGCA's code for one
    class. For t of 0 or 1 the factor of BCE is 1 minus the probability of the truth; between them t
    pulls it to sigmoid(0) (theirs). Masks may be Bool.
    """
    x, t = logits.astype(jnp.float32), masks.astype(jnp.float32)
    # The power as an exponential: finite, with its gradient, also where the sigmoid underflows.
    modulation = jnp.exp(gamma * jax.nn.log_sigmoid(-x * (2 * t - 1)))
    focal = (modulation * optax.sigmoid_binary_cross_entropy(x, t)).mean()
    p = jax.nn.sigmoid(x)
    intersection, total = (part.sum((0, 1, 2)) for part in (p * t, p + t))
    soft_dice = (2 * intersection + smooth) / (total + smooth)
    return focal_weight * focal - jnp.log(soft_dice).mean()


def target_mask(record: Record, target: str, findings: Sequence[str]) -> Shaped[np.ndarray, "Y X"]:
    """Returns where a target is in a record: Bool, or 0 to 1 where an anatomy mask is soft.

    A target that is neither an anatomy of the record nor a finding has an empty mask.
    """
    if names := _select_anatomy(record.anatomy, target):
        masks = [np.asarray(record.anatomy[name]) for name in names]
        dtype = bool if all(mask.dtype == bool for mask in masks) else np.float32
        return np.max([mask.astype(dtype) for mask in masks], axis=0)
    size = record.image.shape[0], record.image.shape[1]
    union = np.zeros(size, bool)
    for phrase in record.phrases:
        is_finding = 0 <= phrase.finding < len(findings) and findings[phrase.finding] == target
        if is_finding or target == FINDINGS:
            union |= truth_mask(phrase, size)
    return union


def open_masks(
    records: Sequence[Record], targets: Sequence[str], findings: Sequence[str]
) -> MaskSplit:
    """Returns the images, and the masks with one channel for each target; see `open_images`.

    The masks of stored records are read once, and held compressed.
    """

    def stack_masks(record: Record) -> Shaped[np.ndarray, "Y X K"]:
        return np.stack([target_mask(record, target, findings) for target in targets], -1)

    images = open_images(records)
    if not isinstance(records, StoredRecords):
        return MaskSplit(images, np.stack([stack_masks(record) for record in records]))
    shape = (*records.shape, len(targets))
    rows = [compress_mask(stack_masks(record)) for record in read_annotations(records)]
    masks = StoredRows(
        lambda index: expand_mask(rows[index], shape),
        range(len(rows)),
        shape,
        bool,
        records.identify,
    )
    return MaskSplit(images, masks)


def draw_training(
    positive: Bool[np.ndarray, " N"], options: Options, seed: int
) -> Int[np.ndarray, " M"]:
    """Returns the indices of the examples to train on: balanced first, then limited (as MGCA).

    >>> positive = np.array([True, False, False, False])
    >>> len(draw_training(positive, Options(balance=True), 0))
    2
    >>> draw_training(positive, Options(), 0).tolist()
    [0, 1, 2, 3]
    """
    random, indices = np.random.default_rng(seed), np.arange(len(positive))
    if options.balance:
        negatives = random.permutation(indices[~positive])[: positive.sum()]
        indices = np.sort(np.concatenate([indices[positive], negatives]))
    if 0 < options.max_train_records < len(indices):
        indices = np.sort(random.permutation(indices)[: options.max_train_records])
    return indices


def select_examples(
    dice: Float[np.ndarray, " N"], positive: Bool[np.ndarray, " N"], count: int, seed: int
) -> list[int]:
    """Returns `count` images for the page, best first: a third each best, random and worst.

    Only images with a true mask are selected, if there are any.

    >>> positive = np.array([True, True, True, False])
    >>> select_examples(np.array([0.1, 0.9, 0.5, 1.0]), positive, 2, 0)
    [1, 0]
    """
    candidates = np.flatnonzero(positive) if positive.any() else np.arange(len(dice))
    ranking = candidates[np.argsort(-dice[candidates], kind="stable")]
    if len(ranking) <= count:
        return ranking.tolist()
    num_best = -(-count // 3)
    num_worst = -(-(count - num_best) // 2)
    ends = np.r_[np.arange(num_best), np.arange(len(ranking) - num_worst, len(ranking))]
    middle = np.setdiff1d(np.arange(len(ranking)), ends)
    middle = np.random.default_rng(seed).permutation(middle)[: count - len(ends)]
    return ranking[np.sort(np.r_[ends, middle])].tolist()


def _select_anatomy(names: Collection[str], target: str) -> list[str]:
    """Returns the anatomy of a record that a target consists of, of the names of all of it."""
    if target == LUNGS:
        return [name for name in names if "lung" in name.lower()]
    return [target] if target in names else []


def _list_anatomy(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Returns the names of the anatomy of each record."""
    # Few different tuples, so that equal ones are held once.
    unique: dict[tuple[str, ...], tuple[str, ...]] = {}
    names = (tuple(record.anatomy) for record in read_annotations(records))
    return [unique.setdefault(row, row) for row in names]


def _check_anatomy(
    target: str, data: EvalData, anatomy: Mapping[str, Sequence[Sequence[str]]]
) -> None:
    """Raises UserError unless every record has a mask of an anatomy."""
    if not any(_select_anatomy(names, target) for names in anatomy["train"]):
        raise UserError(
            f"task segmentation needs masks of {target!r}, and no training record has one; add "
            f"some, or drop {target!r} from config.eval.segmentation.targets"
        )
    for split in SPLITS:
        for n, names in enumerate(anatomy[split]):
            if not _select_anatomy(names, target):
                patient = getattr(data, split)[n].patient_id
                raise UserError(
                    f"record {n} of split {split} (patient {patient!r}) has no mask of "
                    f"{target!r}, and others have; add the mask, or remove the record or the target"
                )


def _build_decoder(tower: Tower, images: np.ndarray, classes: int, options: Options) -> nn.Module:
    """Builds the decoder of the options, or the one that suits the tower's maps."""
    stages = jax.eval_shape(lambda v, x: tower.apply(v, x, False, True)[0], tower.variables, images)
    decoder = options.decoder
    if decoder == "auto":
        decoder = "unet" if len({x.shape[1:3] for x in stages.maps}) > 1 else "setr"
    size = images.shape[1:3]
    if decoder == "setr":
        return setr.SETR(classes, size, tuple(options.setr_widths))
    return unet.UNet(classes, size, tuple(options.unet_widths))


def _attach_decoder(tower: Tower, train: MaskSplit, options: Options, seed: int) -> HeadOnTower:
    decoder = _build_decoder(tower, train.images[:2], train.masks.shape[-1], options)

    def criterion(logits: Float[Array, "B Y X K"], examples: Mapping[str, Any]) -> Float[Array, ""]:
        return mixed_loss(
            logits,
            examples["mask"],
            focal_weight=options.focal_weight,
            gamma=options.gamma,
            smooth=options.smooth,
        )

    # SETR reads the last map only; caching the others would cost memory.
    used = slice(-1, None) if isinstance(decoder, setr.SETR) else slice(None)
    return attach_head(
        tower,
        decoder,
        criterion,
        {"image": train.images[:2]},
        select_features=lambda stages: last_of_each_size(stages.maps)[used],
        mode=options.mode,
        seed=seed,
    )


def _fit_decoder(
    attached: HeadOnTower,
    splits: Mapping[str, MaskSplit],
    options: Options,
    description: str,
    context: TaskContext,
) -> FitResult:
    train, val = (
        attached.examples(splits[split].images) | {"mask": splits[split].masks}
        for split in ("train", "val")
    )
    return fit_head(
        attached.loss,
        attached.params,
        attached.stats,
        train,
        val,
        optax.adamw(options.learning_rate, weight_decay=options.weight_decay),
        batch=options.batch,
        epochs=options.epochs,
        patience=options.patience,
        seed=context.seed,
        name="segmentation",
        option="config.eval.segmentation.learning_rate",
        description=description,
        folder=context.folder,
        check_stop=context.check_stop,
    )


def _find_positives(masks: Masks) -> Bool[np.ndarray, " N"]:
    """Returns which images have any target."""
    batches = list_batches(len(masks), CHUNK_SIZE)
    return np.concatenate([part.any((1, 2, 3)) for part in read_batches(masks, batches)])


def _mean_masks(masks: Masks) -> Float[np.ndarray, "Y X K"]:
    """Returns the mean mask of each target; its pixels are 0 only where all masks are."""
    total = np.zeros(masks.shape[1:], np.float32)
    for part in read_batches(masks, list_batches(len(masks), CHUNK_SIZE)):
        total += part.sum(0, dtype=np.float32)
    return total / np.float32(len(masks))


def _predict_masks(
    attached: HeadOnTower, fit_result: FitResult, images: Images, *, threshold: float
) -> Bool[np.ndarray, "N Y X K"]:
    examples = attached.examples(images)
    logits = require_finite(attached.predict(fit_result.params, fit_result.stats, examples))
    # Logits are compared with the threshold's: their sigmoid would only cost time.
    return logits > logit(threshold)


def _score_masks(
    predict: Callable[[Images], Bool[np.ndarray, "N Y X K"]],
    test: MaskSplit,
    baseline: Bool[np.ndarray, "Y X K"],
) -> tuple[dict[str, Float[np.ndarray, "2 N K"]], Bool[np.ndarray, "N K"]]:
    """Returns the scores of the predicted masks and of one baseline, and which images have a mask.

    Images are predicted and scored in chunks, so that memory does not grow with their number.
    """

    def score(indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        chunk = take_examples(test, indices)
        truth = np.asarray(chunk.masks) > 0.5
        scores: dict[str, np.ndarray] = {"has_mask": np.asarray(truth.any((1, 2)))}
        pair = predict(chunk.images), np.broadcast_to(baseline, truth.shape)
        for name, metric in MASK_METRICS.items():
            values = [
                [metric(_flatten(masks, k), _flatten(truth, k)) for k in range(truth.shape[-1])]
                for masks in pair
            ]
            scores[name] = np.moveaxis(np.asarray(values), 1, 2)
        return scores

    parts = share_batches(score, len(test.images), CHUNK_SIZE)
    scores = {name: np.concatenate([part[name] for part in parts], axis=1) for name in MASK_METRICS}
    return scores, np.concatenate([part["has_mask"] for part in parts])


def _flatten(masks: Bool[np.ndarray, "N Y X K"], k: int) -> Bool[np.ndarray, "N P"]:
    return masks[..., k].reshape(len(masks), -1)
