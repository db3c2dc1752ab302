"""Classification: one linear layer on the tower's summary of an image, or the whole tower, fitted.

The protocol is that of MGCA (arXiv 2210.06044) as its code has it (`ssl_finetuner.py`): a
linear layer on the global feature before any head of pre-training (`Stages.pooled`, a ResNet with
its upsampling), fitted to 1, 10 and 100 % of the training labels; the epoch with the lowest
validation loss is tested. `finetune` also fits the tower, BatchNorm in training mode.

Keys, `<share>` 1, 10 or 100 (percent): `<share>/auroc_macro`, `auprc_macro` (average precision),
`f1_macro`, `accuracy`, `ece` (bins of equal width), `n_train`, `<finding>/auroc`.
The headline (AUROC; accuracy for `multiclass`) has a 95 % bootstrap interval over test images,
`..._low`, `..._high`. `multilabel`: F1 and accuracy are means over findings at the thresholds that
maximise F1 on validation, ECE pools all findings. `multiclass`: areas are one against the rest, F1
and accuracy of the likeliest class, ECE of its probability. `chance/<share>/...` knows no image:
AUROC 0.5, AUPRC the share of positives, accuracy of the answer that is more frequent in training,
F1 of calling everything (`multiclass`: the most frequent class).

A finding with one class only in the test set or in the whole training set is in no macro mean;
`<share>/labels_skipped` counts them. `<share>/labels_unseen` counts the others that have one class
only in this share: they are scored all the same, so that shares compare.

Deviation: the validation loss is over all validation labels; MGCA drops its last incomplete batch.
Deviation: no random crops or jitter while fitting; features are computed once where they can be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int, Int8, PyTree
from scipy.special import expit, log_softmax

from plan_jax.heads import head_on_tower
from plan_jax.heads.fit import FittedHead, fit_head, take_examples
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
    TaskContext,
    Tower,
    UserError,
)

TITLE = "Classification"
FITS_HEAD = True
SPLITS = ("train", "val", "test")
POINTS = 200  # of a ROC curve on the page
_OF_A_SHARE = {
    "auroc_macro": (
        "AUROC",
        "How often an image with the finding scores above one without it, mean over findings.",
    ),
    "auprc_macro": (
        "AUPRC",
        "Average precision, mean over findings; chance is the share of positive images.",
    ),
    "accuracy": (
        "accuracy",
        "Share of correct answers; chance gives the answer that is more frequent in training.",
    ),
    "f1_macro": (
        "F1",
        "Harmonic mean of precision and recall, mean over findings; chance calls all positive.",
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
    )
    for key, (label, meaning) in _OF_A_SHARE.items()
} | {
    "{share}/ece": Metric(
        "ECE, {share} % of labels",
        "Expected calibration error: mean distance of predicted probability and true frequency.",
        baselines={"random encoder": "random/{share}/ece"},
        higher_is_better=False,
    ),
    "{share}/{finding}/auroc": Metric(
        "AUROC, {finding}, {share} % of labels",
        "How often an image with the finding scores above one without it.",
        baselines={"random encoder": "random/{share}/{finding}/auroc"},
    ),
}


@dataclass(frozen=True)
class Options:
    """The constants of the protocol; the defaults are MGCA's where it has one.

    `labels` are the findings to predict, () all; `multiclass` needs exactly one of them present in
    each record. `uncertain` says what a label -1 becomes in every split (`binarise_labels`):
    ours is `ignore`, as -1 may also mean unknown, MGCA's `mgca`. `standardise` (ours) brings
    features to mean 0 and deviation 1 by the statistics of the training share, of the tower as it
    comes. `warmup_steps` steps rise linearly; `cosine` then falls to 0 at step `steps`, by default
    the last: BenchX (arXiv 2410.21969) fits everything with 50, `cosine`, 3000 and a gradient norm
    of at most `clip_norm` 1, and rates from 1e-5 up. `clip_norm` 0 is no bound.
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
    steps: int = 0
    clip_norm: float = 0.0
    batch: int = 48
    epochs: int = 50
    patience: int = 10
    bins: int = 15  # Guo et al. (arXiv 1706.04599), table 1
    bootstrap_samples: int = 1000  # ours


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Fit a head to each share of the training records, and score it on the test records.

    `data.findings` names the columns of `Record.labels`; `context.seed` draws shares, parameters,
    batches and intervals. In `context.folder` the fits are kept, so that a stopped call goes on.
    The rows are the ROC curves and the calibration of the largest share.

    Raises:
      UserError: what `check` says, a model without a tower, or features that are not finite.
    """
    check(data, options)
    splits = {split: getattr(data, split) for split in SPLITS}
    findings, folder, seed = data.findings, context.folder, context.seed
    tower = head_on_tower.require_tower(model)
    names = _chosen(options, findings)
    uncertain = "zero" if options.kind == "multiclass" else options.uncertain
    labels = {split: _labels(splits[split], names, findings) for split in SPLITS}
    truth = {split: binarise_labels(labels[split], names, uncertain) for split in SPLITS}
    kept = has_both_classes(*truth["train"]) & has_both_classes(*truth["test"])
    ready, rows = _prepare(tower, splits, truth, options, seed)
    values, lines = {}, []
    about = f"{tower.name}, {names}, {[len(labels[split]) for split in SPLITS]}"
    for fraction in sorted(set(options.fractions)):
        share, chosen = f"{100 * fraction:g}", draw(len(labels["train"]), fraction, seed)
        fit = _fit(
            ready,
            take_examples(rows["train"], chosen),
            rows["val"],
            options,
            f"classification_{share}",
            about,
            seed,
            folder,
        )
        val, test = (
            Predictions(_scores(ready, fit, rows[split], options.kind), *truth[split])
            for split in ("val", "test")
        )
        known = tuple(each[chosen] for each in truth["train"])
        found = _summary(val, test, kept, names, options, seed) | {
            "n_train": float(len(chosen)),
            "labels_skipped": float((~kept).sum()),
            "labels_unseen": float((kept & ~has_both_classes(*known)).sum()),
        }
        values |= {f"{share}/{key}": value for key, value in found.items()}
        beside = _chance(known, test, kept, options)
        values |= {f"chance/{share}/{key}": value for key, value in beside.items()}
        lines = _lines(test, kept, names, options)
    return Result(values, lines)


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that the task predicts."""
    return ("labels",)


def check(data: EvalData, options: Options) -> None:
    """See that the records can be classified, before anything is fitted.

    Raises:
      UserError: a split without records or labels, labels that are no findings, a share that is
        none, a count below 1, or (`multiclass`) records that have none or several of the labels.
    """
    findings = data.findings
    names = _chosen(options, findings)
    if not options.fractions or not all(0 < fraction <= 1 for fraction in options.fractions):
        raise UserError(
            f"classification fractions are {options.fractions}; give shares above 0, at most 1"
        )
    for name in ("batch", "epochs", "patience", "bins", "bootstrap_samples"):
        if getattr(options, name) < 1:
            raise UserError(f"classification {name} is {getattr(options, name)}; use at least 1")
    for split in SPLITS:
        if not len(getattr(data, split)):
            raise UserError(f"task classification has no records in split {split}; give it some")
        labels = _labels(getattr(data, split), names, findings)
        if not (labels >= 0).any():
            raise UserError(
                f"task classification needs labels, and split {split} has none; leave the task out"
            )
        wrong = int(((labels == 1).sum(1) != 1).sum())
        if options.kind == "multiclass" and wrong:
            raise UserError(
                f"multiclass needs one of {', '.join(names)} in each record, and {wrong} of "
                f"{len(labels)} in split {split} have none or several; use multilabel"
            )


def draw(count: int, fraction: float, seed: int) -> Int[np.ndarray, " N"]:
    """Draw a share of `count` rows without replacement, at least one, in their order.

    Shares of one seed are nested: the rows of the 1 % are among those of the 10 %.
    """
    number = max(1, round(fraction * count))
    return np.sort(np.random.default_rng(seed).permutation(count)[:number])


def optimiser(options: Options, steps: int) -> optax.GradientTransformation:
    """Make AdamW of all parameters (biases too, as torch's), for `steps` in all."""
    rise, last = options.warmup_steps, options.steps or steps
    rate: Any = options.learning_rate
    if options.schedule == "cosine":
        begin = 0.0 if rise else rate
        rate = optax.warmup_cosine_decay_schedule(begin, rate, rise, max(last, rise + 1))
    elif rise:
        rate = optax.linear_schedule(0.0, rate, rise)
    bound = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    return optax.chain(bound, optax.adamw(rate, 0.9, 0.999, weight_decay=options.weight_decay))


def _chosen(options: Options, findings: Sequence[str]) -> tuple[str, ...]:
    """Name the findings to predict."""
    if not findings:
        raise UserError(
            "task classification needs labels, and the dataset has no findings; leave the task out"
        )
    if strange := [name for name in options.labels if name not in findings]:
        raise UserError(
            f"classification labels {', '.join(strange)} are not in the data; use some of "
            f"{', '.join(findings)}"
        )
    names = tuple(options.labels) or tuple(findings)
    if options.kind == "multiclass" and len(names) < 2:
        raise UserError(f"multiclass has the one label {names[0]}; give two, or use multilabel")
    return names


def _labels(
    records: Sequence[Record], names: Sequence[str], findings: Sequence[str]
) -> Int8[np.ndarray, "N F"]:
    """Stack the chosen labels; a record that has none is unknown throughout."""
    unknown = np.full(len(findings), -1, np.int8)
    rows = np.stack([r.labels if len(r.labels) else unknown for r in records]).astype(np.int8)
    return rows[:, [list(findings).index(name) for name in names]]


def _prepare(
    tower: Tower,
    splits: Mapping[str, Sequence[Record]],
    truth: Mapping[str, tuple],
    options: Options,
    seed: int,
) -> tuple[head_on_tower.HeadOnTower, dict[str, dict[str, PyTree]]]:
    """Put the head on the tower and turn the records into rows, features computed if they can."""
    images = {split: np.stack([r.image for r in splits[split]]) for split in SPLITS}
    labels = {split: {"labels": truth[split][0], "mask": truth[split][1]} for split in SPLITS}
    two = np.arange(2) % len(images["train"])
    ready = head_on_tower.attach_head(
        tower,
        Linear(truth["train"][0].shape[1]),
        LOSSES[options.kind],
        take_examples({"image": images["train"], **labels["train"]}, two),
        select_features=lambda s: s.pooled,
        mode="finetune" if options.mode == "finetune" else "frozen",
        native=False,
        seed=seed,
    )
    return ready, {split: ready.examples(images[split]) | labels[split] for split in SPLITS}


def _fit(
    ready: head_on_tower.HeadOnTower,
    train: dict[str, PyTree],
    val: dict[str, PyTree],
    options: Options,
    name: str,
    about: str,
    seed: int,
    folder: Path | None,
) -> FittedHead:
    """Fit the head to the rows of a share."""
    stats, count = ready.stats, len(train["labels"])
    if options.standardise:
        seen = head_on_tower.map_chunks(
            lambda rows: ready.features(ready.params, ready.stats, rows), train
        )
        stats = stats | {"head": feature_statistics(seen)}
    steps, loss = options.epochs * (count // min(options.batch, count)), LOSSES[options.kind]
    about += repr(replace(options, fractions=(), bootstrap_samples=0, bins=1))
    return fit_head(
        ready.loss,
        ready.params,
        stats,
        train,
        val,
        optimiser(options, steps),
        batch=options.batch,
        epochs=options.epochs,
        patience=options.patience,
        seed=seed,
        score=lambda p, s: -float(loss(jnp.asarray(ready.predict(p, s, val)), val)),
        name=name,
        description=about,
        folder=folder,
    )


def _scores(
    ready: head_on_tower.HeadOnTower, fit: FittedHead, rows: dict, kind: str
) -> Float[np.ndarray, "N F"]:
    """Give logits (multilabel) or log-probabilities (multiclass): neither saturates into ties."""
    logits = np.asarray(ready.predict(fit.params, fit.stats, rows), np.float64)
    return log_softmax(logits, axis=1) if kind == "multiclass" else logits


def _summary(
    val: Predictions,
    test: Predictions,
    kept: Bool[np.ndarray, " F"],
    names: Sequence[str],
    options: Options,
    seed: int,
) -> dict[str, float]:
    """Score a head on the test set, with thresholds from validation."""
    columns = np.flatnonzero(kept).tolist()
    areas = per_finding(classification_metrics.auroc, test, columns)
    values = {f"{slug(names[i])}/auroc": area for i, area in zip(columns, areas, strict=True)}
    values["auroc_macro"] = macro_mean(areas)
    values["auprc_macro"] = macro_mean(
        per_finding(classification_metrics.average_precision, test, columns)
    )
    values["ece"] = classification_metrics.expected_calibration_error(
        *_said(test, options), options.bins
    )
    if options.kind == "multiclass":
        values |= _likeliest(test, kept)
        hits = (classification_metrics.vote_shares(test.scores) * test.labels).sum(1)
        name, ends = "accuracy", intervals.bootstrap(hits, None, options.bootstrap_samples, seed)
    else:
        limits = per_finding(classification_metrics.best_threshold, val, columns)
        values["f1_macro"] = macro_mean(
            per_finding(classification_metrics.f1, test, columns, limits)
        )
        values["accuracy"] = macro_mean(
            per_finding(classification_metrics.accuracy, test, columns, limits)
        )
        packed = np.stack([x[:, kept].astype(float) for x in test], 2)
        name, ends = (
            "auroc_macro",
            intervals.bootstrap(packed, _resampled, options.bootstrap_samples, seed),
        )
    return values | {f"{name}_low": ends[0], f"{name}_high": ends[1]}


def _resampled(rows: Float[np.ndarray, "N F 3"]) -> float:
    """Give the macro AUROC of drawn images, over the findings that have both classes among them."""
    said = Predictions(rows[..., 0], rows[..., 1] == 1, rows[..., 2] == 1)
    both = np.flatnonzero(has_both_classes(said.labels, said.mask)).tolist()
    return macro_mean(per_finding(classification_metrics.auroc, said, both))


def _said(test: Predictions, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Give the probabilities whose calibration is judged, and whether they came true: [N], [N]."""
    if options.kind == "multilabel":
        return expit(test.scores[test.mask]), test.labels[test.mask]
    top = np.arange(len(test.scores)), test.scores.argmax(1)
    return np.exp(test.scores[top]), test.labels[top]


def _chance(
    known: tuple[np.ndarray, ...], test: Predictions, kept: Bool[np.ndarray, " F"], options: Options
) -> dict[str, float]:
    """Score what knows the training share's labels and no image: the level beside each number."""
    columns = np.flatnonzero(kept).tolist()
    share = (known[0] & known[1]).sum(0) / np.maximum(known[1].sum(0), 1)
    same = test._replace(scores=np.tile(share, (len(test.scores), 1)))
    positive = per_finding(lambda _, labels: float(labels.mean()), same, columns)
    values = {"auroc_macro": 0.5, "auprc_macro": macro_mean(positive)}
    if options.kind == "multiclass":
        return values | _likeliest(same, kept)
    everything = per_finding(classification_metrics.f1, same, columns, [0.0] * len(columns))
    more = per_finding(classification_metrics.accuracy, same, columns)
    return values | {"f1_macro": macro_mean(everything), "accuracy": macro_mean(more)}


def _likeliest(said: Predictions, kept: Bool[np.ndarray, " F"]) -> dict[str, float]:
    """Score each image's likeliest class."""
    f1 = classification_metrics.macro_f1(said.scores, said.labels & kept)
    return {"f1_macro": f1, "accuracy": classification_metrics.accuracy(said.scores, said.labels)}


def _lines(
    test: Predictions, kept: Bool[np.ndarray, " F"], names: Sequence[str], options: Options
) -> list[Curve]:
    """Give ROC curves (thinned to `POINTS` points) and the reliability diagram for the page."""
    columns, rows = np.flatnonzero(kept).tolist(), []
    curves = per_finding(classification_metrics.roc_curve, test, columns)
    for i, (x, y) in zip(columns, curves, strict=True):
        some = np.unique(np.linspace(0, len(x) - 1, min(POINTS, len(x))).round().astype(int))
        rows.append(Curve("roc", names[i], x[some], y[some]))
    said, happened, count = classification_metrics.calibration(*_said(test, options), options.bins)
    return [*rows, Curve("calibration", "all findings", said[count > 0], happened[count > 0])]
