"""Classification: a linear layer on the image tower, alone or with the tower, fitted to labels.

The protocol is MGCA's (arXiv 2210.06044), by its code (`ssl_finetuner.py`): a linear layer on the
global feature before any projection head (`Stages.pooled`; a ResNet with its upsampling), fitted to
1, 10 and 100 % of the training labels; the epoch with the lowest validation loss is tested. The
mode `finetune` also fits the tower, with BatchNorm in training mode.

Keys of the metrics, `<share>` being the percentage of the training labels:

- `<share>/auroc_macro`, `auprc_macro` (average precision), `f1_macro`, `accuracy`, `ece` (bins of
  equal width), `n_train`, `<finding>/auroc`.
- The headline (AUROC; accuracy for `multiclass`) has a 95 % bootstrap interval over test images in
  `..._low`, `..._high`.
- `multilabel`: F1 and accuracy are means over findings, at the thresholds with the best F1 on
  validation; ECE pools all findings. `multiclass`: AUROC and AUPRC are one class against the rest,
  F1 and accuracy those of the likeliest class, ECE that of its probability.
- `chance/<share>/...` is a classifier that sees no image: AUROC 0.5, AUPRC the share of positives,
  accuracy of the answer that is more frequent in training, F1 of predicting every finding
  (`multiclass`: the most frequent class).
- `<share>/labels_skipped` counts the findings with one class only in the test set or in the whole
  training set, which enter no mean. `<share>/labels_unseen` counts those of the others that have
  one class only in this share: they are scored all the same, so that shares compare.

Deviation: the validation loss is over all validation labels; MGCA drops its last incomplete batch.
- `augment` fits the head to augmented copies of the training images, as MGCA's code does: preset
  `chexpert_moco` for CheXpert, `mgca` for RSNA and COVIDx.

Deviation: with `augment` each image has `augment_copies` draws instead of one in every epoch, so
that the features of a frozen tower are computed once. The default has no augmentation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int, PyTree
from scipy.special import expit, log_softmax

from plan_jax.heads.examples import open_images, read_examples, take_examples
from plan_jax.heads.fit import FitResult, fit_head
from plan_jax.heads.head_on_tower import HeadOnTower, attach_head, require_tower
from plan_jax.heads.linear import LOSSES, Linear, feature_statistics
from plan_jax.metrics import classification as classification_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.metrics.classification import (
    Predictions,
    binarise_labels,
    has_both_classes,
    macro_mean,
    per_finding,
)
from plan_jax.types import (
    Curve,
    EvalData,
    Metric,
    Model,
    Record,
    Result,
    StoredRecords,
    TaskContext,
    Tower,
    UserError,
    check_options,
    read_column,
)

TITLE = "Classification"
FITS_HEAD = True
_SHARE_METRICS = {
    "auroc_macro": (
        "AUROC",
        "Probability that an image with the finding scores above one without it, mean over "
        "findings; chance is 0.5.",
    ),
    "auprc_macro": (
        "AUPRC",
        "Average precision, mean over findings; chance is the share of positive images.",
    ),
    "accuracy": (
        "accuracy",
        "Share of correct answers; chance is the answer that is more frequent in training.",
    ),
    "f1_macro": (
        "F1",
        "Harmonic mean of precision and recall, mean over findings; chance predicts every finding "
        "in every image.",
    ),
}
METRICS = {
    f"{{share}}/{key}": Metric(
        f"{label}, {{share}} % of labels",
        meaning,
        baselines={
            "random encoder": f"random/{{share}}/{key}",
            "chance": f"chance/{{share}}/{key}",
        },
        headline=key != "f1_macro",
        undefined="no finding has labels of both classes in train and in the evaluated split",
    )
    for key, (label, meaning) in _SHARE_METRICS.items()
} | {
    "{share}/ece": Metric(
        "ECE, {share} % of labels",
        "Expected calibration error: mean distance of the predicted probability from the observed "
        "rate.",
        baselines={"random encoder": "random/{share}/ece"},
        higher_is_better=False,
    ),
    "{share}/{finding}/auroc": Metric(
        "AUROC, {finding}, {share} % of labels",
        "Probability that an image with the finding scores above one without it.",
        baselines={"random encoder": "random/{share}/{finding}/auroc"},
        undefined="its labels in train or in the evaluated split are all 0 or all 1",
    ),
}
SPLITS = ("train", "val", "test")
MAX_CURVE_POINTS = 200  # of a ROC curve on the page


@dataclass(frozen=True)
class Options:
    """The constants of the protocol; the defaults are MGCA's where it has one.

    BenchX (arXiv 2410.21969) fits with `mode` finetune, `schedule` cosine, `warmup_steps` 50,
    `decay_steps` 3000, `clip_norm` 1 and learning rates from 1e-5 up.

    Attributes:
      mode: fit the linear layer alone, or the tower as well.
      kind: findings that may occur together, or exactly one of them in each record.
      labels: the findings to predict; () for all.
      fractions: shares of the training records to fit to.
      uncertain: what a label -1 becomes in every split, see `metrics.classification`. Ours is
        `ignore`, as -1 may also mean unknown; MGCA's is `mgca`.
      standardise: scale features to mean 0 and deviation 1, by the statistics of the training share
        under the initial tower (ours).
      learning_rate: of AdamW.
      weight_decay: of AdamW, on all parameters.
      schedule: constant, or a cosine that falls to 0.
      warmup_steps: the learning rate rises linearly over so many steps.
      decay_steps: the step at which the cosine reaches 0; 0 for the last one.
      clip_norm: the largest norm of the gradient; 0 for no bound.
      augment: a preset of `data.augmentation` for the training images; labels of two sides follow.
      augment_copies: draws of each image; an epoch visits all of them (ours).
      batch: examples in a batch.
      epochs: the largest number of epochs.
      patience: epochs without a lower validation loss after which the fit stops.
      bins: of the calibration error.
      bootstrap_samples: resamples of an interval (ours).
    """

    mode: Literal["linear", "finetune"] = "linear"
    kind: Literal["multilabel", "multiclass"] = "multilabel"
    labels: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    uncertain: Literal["ignore", "zero", "one", "mgca"] = "ignore"
    standardise: bool = False
    learning_rate: float = 5e-4
    weight_decay: float = 1e-6
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    clip_norm: float = 0.0
    augment: Literal["", "convirt", "mgca", "chexpert_moco"] = ""
    augment_copies: int = 4
    batch: int = 48
    epochs: int = 50
    patience: int = 10
    bins: int = 15  # Guo et al. (arXiv 1706.04599), table 1
    bootstrap_samples: int = 1000

    def __post_init__(self) -> None:
        non_negative = ("learning_rate", "weight_decay", "warmup_steps", "decay_steps", "clip_norm")
        positive = ("augment_copies", "batch", "epochs", "patience", "bins")
        minima = dict.fromkeys(non_negative, 0) | dict.fromkeys(positive, 1)
        minima["bootstrap_samples"] = 2
        check_options("classification", self, minima)
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise UserError(
                f"config.eval.classification.fractions is {self.fractions}; use numbers above 0, "
                "at most 1"
            )


class Labels(NamedTuple):
    """The binary labels of a split, and a mask of where they are known."""

    labels: Bool[np.ndarray, "N F"]
    mask: Bool[np.ndarray, "N F"]


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that is predicted."""
    return ("labels",)


def check(data: EvalData, options: Options) -> None:
    """Checks that every split can be classified, before a head is fitted.

    Raises:
      UserError: a split has no records or no labels; the options name labels that are not findings
        of the data; records cannot be augmented; or, with `multiclass`, records have none or
        several of the labels.
    """
    names = _label_names(options, data.findings)
    if options.augment:
        _train_records(data, options, seed=0)
    for split in SPLITS:
        records = getattr(data, split)
        if not len(records):
            raise UserError(f"task classification has no records in split {split}; add some")
        labels = _stack_labels(records, names, data.findings)
        if not (labels >= 0).any():
            raise UserError(
                f"task classification needs labels, and split {split} has none; add labels, or "
                "leave classification out of config.eval.tasks"
            )
        invalid = int(((labels == 1).sum(1) != 1).sum())
        if options.kind == "multiclass" and invalid:
            raise UserError(
                "config.eval.classification.kind multiclass needs exactly one of "
                f"{', '.join(names)} in each "
                f"record, and {invalid} of {len(labels)} in split {split} have none or several; "
                "use multilabel"
            )


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Fits a head to each share of the training records, and scores it on the test records.

    `context.seed` selects shares, initial parameters, batches and resamples. The examples are the
    ROC curves and the calibration of the largest share.

    Raises:
      UserError: see `check`; the model has no tower, or one whose features are not finite.
    """
    check(data, options)
    tower = require_tower(model)
    names = _label_names(options, data.findings)
    labels = {
        split: _read_labels(getattr(data, split), names, data.findings, options) for split in SPLITS
    }
    scored = has_both_classes(*labels["train"]) & has_both_classes(*labels["test"])
    attached, examples = _attach_linear(tower, data, names, labels, options, context.seed)
    copies = options.augment_copies if options.augment else 1
    # What identifies a fit besides its options and examples.
    description = f"{tower.name}, {names}, {[len(labels[split].mask) for split in SPLITS]}"
    metrics: dict[str, float] = {}
    curves: list[Curve] = []
    for fraction in sorted(set(options.fractions)):
        share = f"{100 * fraction:g}"
        indices = draw_share(len(labels["train"].mask), fraction, context.seed)
        train, count = examples["train"], len(labels["train"].mask)
        if len(indices) < count:  # a copy of all features would cost memory
            rows = indices + count * np.arange(copies)[:, None]
            train = take_examples(train, rows.reshape(-1))
        name = f"classification_{share}"
        fit_result = _fit_share(
            attached, train, examples["val"], options, context, name, description
        )
        val, test = (
            Predictions(_score(attached, fit_result, examples[split], options.kind), *labels[split])
            for split in ("val", "test")
        )
        share_labels = Labels(*take_examples(labels["train"], indices))
        values = _test_metrics(val, test, scored, names, options, context.seed) | {
            "n_train": float(len(indices)),
            "labels_skipped": float((~scored).sum()),
            "labels_unseen": float((scored & ~has_both_classes(*share_labels)).sum()),
        }
        chance_values = _chance_metrics(share_labels, test, scored, options)
        metrics |= {f"{share}/{key}": value for key, value in values.items()}
        metrics |= {f"chance/{share}/{key}": value for key, value in chance_values.items()}
        curves = _curves(test, scored, names, options)
    return Result(metrics, curves)


def draw_share(count: int, fraction: float, seed: int) -> Int[np.ndarray, " N"]:
    """Returns the indices of a random share of `count` examples, at least one, in order.

    Shares of one seed are nested: the examples of 1 % are among those of 10 %.
    """
    size = max(1, round(fraction * count))
    return np.sort(np.random.default_rng(seed).permutation(count)[:size])


def build_optimiser(options: Options, steps: int) -> optax.GradientTransformation:
    """Builds AdamW for a fit of `steps`; biases are decayed too, as by torch's."""
    warmup_steps, decay_steps = options.warmup_steps, options.decay_steps or steps
    schedule: Any = options.learning_rate
    if options.schedule == "cosine":
        # Without warm-up the first step already has the full rate.
        initial = 0.0 if warmup_steps else options.learning_rate
        schedule = optax.warmup_cosine_decay_schedule(
            initial, options.learning_rate, warmup_steps, max(decay_steps, warmup_steps + 1)
        )
    elif warmup_steps:
        schedule = optax.linear_schedule(0.0, options.learning_rate, warmup_steps)
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    return optax.chain(clip, optax.adamw(schedule, 0.9, 0.999, weight_decay=options.weight_decay))


def _label_names(options: Options, findings: Sequence[str]) -> tuple[str, ...]:
    """Returns the findings to predict.

    Raises:
      UserError: the data have no findings, the options name unknown ones, or `multiclass` has one.
    """
    if not findings:
        raise UserError(
            "task classification needs labels, and the dataset has no findings; leave "
            "classification out of config.eval.tasks"
        )
    if unknown := [name for name in options.labels if name not in findings]:
        raise UserError(
            f"config.eval.classification.labels {', '.join(unknown)} are not findings of the data; "
            f"choose from {', '.join(findings)}"
        )
    names = tuple(options.labels) or tuple(findings)
    if options.kind == "multiclass" and len(names) < 2:
        raise UserError(
            f"config.eval.classification.kind multiclass has the single label {names[0]}; give "
            "two, or use multilabel"
        )
    return names


def _stack_labels(
    records: Sequence[Record], names: Sequence[str], findings: Sequence[str]
) -> Int[np.ndarray, "N F"]:
    """Returns the labels to predict, -1 throughout for a record without labels."""
    unknown = np.full(len(findings), -1, np.int8)
    rows = read_column(records, "labels")
    table = np.stack([row if len(row) else unknown for row in rows]).astype(np.int8)
    return table[:, [list(findings).index(name) for name in names]]


def _read_labels(
    records: Sequence[Record], names: Sequence[str], findings: Sequence[str], options: Options
) -> Labels:
    # One class is present in each record, so an uncertain label is another class: absent.
    policy = "zero" if options.kind == "multiclass" else options.uncertain
    return Labels(*binarise_labels(_stack_labels(records, names, findings), names, policy))


def _train_records(data: EvalData, options: Options, seed: int) -> Sequence[Record]:
    """Returns the records to fit to: those of the split, or augmented copies of them.

    Raises:
      UserError: the records are not on disk, or a finding of one side has no counterpart.
    """
    if not options.augment:
        return data.train
    if not isinstance(data.train, StoredRecords):
        raise UserError(
            f"config.eval.classification.augment is {options.augment!r}, and the records are in "
            "memory; open them as a dataset, or set it to ''"
        )
    return data.train.augment(options.augment, options.augment_copies, seed)


def _attach_linear(
    tower: Tower,
    data: EvalData,
    names: Sequence[str],
    labels: Mapping[str, Labels],
    options: Options,
    seed: int,
) -> tuple[HeadOnTower, dict[str, dict[str, PyTree]]]:
    """Attaches the linear layer, and returns the examples of each split with it."""
    records = {"train": _train_records(data, options, seed), "val": data.val, "test": data.test}
    images = {split: open_images(records[split]) for split in SPLITS}
    targets = {split: labels[split]._asdict() for split in SPLITS}
    if options.augment:  # one row for each copy
        augmented = _read_labels(records["train"], names, data.findings, options)
        targets["train"] = augmented._asdict()
    two = np.arange(2) % len(images["train"])  # a split may have a single record
    attached = attach_head(
        tower,
        Linear(labels["train"].mask.shape[1]),
        LOSSES[options.kind],
        read_examples({"image": images["train"], **targets["train"]}, two),
        select_features=lambda stages: stages.pooled,
        mode="finetune" if options.mode == "finetune" else "frozen",
        native=False,
        seed=seed,
    )
    return attached, {split: attached.examples(images[split]) | targets[split] for split in SPLITS}


def _fit_share(
    attached: HeadOnTower,
    train: dict[str, PyTree],
    val: dict[str, PyTree],
    options: Options,
    context: TaskContext,
    name: str,
    description: str,
) -> FitResult:
    """Fits the head to the examples of a share."""
    stats, count = attached.stats, len(train["labels"])
    if options.standardise:
        # Those of a frozen tower have been computed.
        features = train.get("features")
        if features is None:
            features = attached.compute_features(attached.params, attached.stats, train)
        stats = stats | {"head": feature_statistics(features)}
    steps = options.epochs * (count // min(options.batch, count))
    loss = LOSSES[options.kind]
    # These options do not change the fit, so changing them must not repeat it.
    description += repr(replace(options, fractions=(1.0,), bootstrap_samples=2, bins=1))
    return fit_head(
        attached.loss,
        attached.params,
        stats,
        train,
        val,
        build_optimiser(options, steps),
        batch=options.batch,
        epochs=options.epochs,
        patience=options.patience,
        seed=context.seed,
        # Over all labels at once: the mean of batches would weigh labels by how many are known.
        score=lambda p, s: -float(loss(jnp.asarray(attached.predict(p, s, val)), val)),
        name=name,
        option="config.eval.classification.learning_rate",
        description=description,
        folder=context.folder,
        check_stop=context.check_stop,
    )


def _score(
    attached: HeadOnTower, fit_result: FitResult, examples: dict, kind: str
) -> Float[np.ndarray, "N F"]:
    """Returns logits (multilabel) or log-probabilities (multiclass).

    Probabilities would saturate at 1, and distinct logits become ties.
    """
    logits = np.asarray(attached.predict(fit_result.params, fit_result.stats, examples), np.float64)
    return log_softmax(logits, axis=1) if kind == "multiclass" else logits


def _test_metrics(
    val: Predictions,
    test: Predictions,
    scored: Bool[np.ndarray, " F"],
    names: Sequence[str],
    options: Options,
    seed: int,
) -> dict[str, float]:
    """Computes the metrics of the test set, at thresholds from validation."""
    columns = np.flatnonzero(scored).tolist()
    areas = per_finding(classification_metrics.auroc, test, columns)
    values = dict.fromkeys((f"{slug(name)}/auroc" for name in names), float("nan"))
    values |= {f"{slug(names[i])}/auroc": area for i, area in zip(columns, areas, strict=True)}
    values["auroc_macro"] = macro_mean(areas)
    values["auprc_macro"] = macro_mean(
        per_finding(classification_metrics.average_precision, test, columns)
    )
    values["ece"] = classification_metrics.expected_calibration_error(
        *_probabilities(test, options), options.bins
    )
    samples = options.bootstrap_samples
    if options.kind == "multiclass":
        values |= _multiclass_decisions(test, scored)
        hits = (classification_metrics.vote_shares(test.scores) * test.labels).sum(1)
        headline, interval = "accuracy", intervals.bootstrap(hits, None, samples, seed)
    else:
        thresholds = per_finding(classification_metrics.best_threshold, val, columns)
        values["f1_macro"] = macro_mean(
            per_finding(classification_metrics.f1, test, columns, thresholds)
        )
        values["accuracy"] = macro_mean(
            per_finding(classification_metrics.accuracy, test, columns, thresholds)
        )
        labels = np.where(test.mask, test.labels, -1.0)
        table = np.stack([test.scores, labels], 1)[..., scored]
        headline = "auroc_macro"
        interval = intervals.bootstrap_metric(table, "auroc", samples, seed)
    return values | {f"{headline}_low": interval[0], f"{headline}_high": interval[1]}


def _probabilities(
    test: Predictions, options: Options
) -> tuple[Float[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Returns the probabilities to calibrate, and whether each came true."""
    if options.kind == "multilabel":
        return expit(test.scores[test.mask]), test.labels[test.mask]
    likeliest = np.arange(len(test.scores)), test.scores.argmax(1)
    return np.exp(test.scores[likeliest]), test.labels[likeliest]


def _chance_metrics(
    train: Labels, test: Predictions, scored: Bool[np.ndarray, " F"], options: Options
) -> dict[str, float]:
    """Computes the metrics of a classifier that knows the training labels and sees no image."""
    columns = np.flatnonzero(scored).tolist()
    rates = (train.labels & train.mask).sum(0) / np.maximum(train.mask.sum(0), 1)
    constant = test._replace(scores=np.tile(rates, (len(test.scores), 1)))
    positives = per_finding(lambda _, labels: float(labels.mean()), constant, columns)
    values = {"auroc_macro": 0.5, "auprc_macro": macro_mean(positives)}
    if options.kind == "multiclass":
        return values | _multiclass_decisions(constant, scored)
    # A threshold of 0 predicts every finding; that of 0.5 the more frequent answer.
    zeros = [0.0] * len(columns)
    f1_values = per_finding(classification_metrics.f1, constant, columns, zeros)
    accuracies = per_finding(classification_metrics.accuracy, constant, columns)
    return values | {"f1_macro": macro_mean(f1_values), "accuracy": macro_mean(accuracies)}


def _multiclass_decisions(
    predictions: Predictions, scored: Bool[np.ndarray, " F"]
) -> dict[str, float]:
    """Computes F1 and accuracy of each image's likeliest class."""
    scores, labels = predictions.scores, predictions.labels
    return {
        "f1_macro": classification_metrics.macro_f1(scores, labels & scored),
        "accuracy": classification_metrics.accuracy(scores, labels),
    }


def _curves(
    test: Predictions, scored: Bool[np.ndarray, " F"], names: Sequence[str], options: Options
) -> list[Curve]:
    """Returns the ROC curves, thinned out for the page, and the reliability diagram."""
    columns, curves = np.flatnonzero(scored).tolist(), []
    roc_curves = per_finding(classification_metrics.roc_curve, test, columns)
    for i, (fpr, tpr) in zip(columns, roc_curves, strict=True):
        num_points = min(MAX_CURVE_POINTS, len(fpr))
        indices = np.unique(np.linspace(0, len(fpr) - 1, num_points).round().astype(int))
        curves.append(Curve("roc", names[i], fpr[indices], tpr[indices]))
    probability, rate, count = classification_metrics.calibration(
        *_probabilities(test, options), options.bins
    )
    # Empty bins have no point.
    filled = count > 0
    return [*curves, Curve("calibration", "all findings", probability[filled], rate[filled])]
