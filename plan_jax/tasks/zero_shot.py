"""Zero-shot classification: an image is compared with prompts for and against each finding.

`Options.scoring` maps the similarities to the positive prompts P and negative prompts N to a score:

- `contrast`: mean over P minus mean over N. BioViL (arXiv 2204.09817) contrasts prompts in this
  way.
- `max`: the maximum over P, then standardised over the evaluated images, finding by finding
  (GLoRIA, ICCV 2021, `zero_shot_classification`). It never reads N, and it needs more than one
  image: it is transductive.
- `pair`: softmax of the two raw cosines, *e^p / (e^p + e^n)*, without a temperature, mean over
  pairs (CheXzero, Nature BME 2022). Prompts are paired in order; where P and N differ in length,
  each is paired with each (ours).

`Options.ensemble`: `embeddings` averages the texts of a side before they are compared, not
normalised before and normalised after (BioViL); `scores` averages similarities.

`Options.kind`: `multilabel` decides each finding on its own. `multiclass` predicts the finding with
the highest score, over records with exactly one of the findings and none unknown. Findings in
`Options.absent` are no classes; a record that has one of them, or may have it, is left out.

Keys of the metrics:

- `auroc_macro`: mean over findings, with a 95 % bootstrap interval over images in
  `auroc_macro_low`, `auroc_macro_high`. `auprc_macro`. `<finding>/auroc`, `<finding>/auprc`.
- `chance/auroc_macro` is 0.5, `chance/auprc_macro` the mean share of positives. `findings_scored`
  and `findings_skipped` count the findings with both classes among the records, and the others.
- With validation records: `f1_macro`, `accuracy_macro`, `<finding>/f1`, `<finding>/accuracy`, at
  the threshold with the best F1 on those records; `max` standardises them by themselves.
  `all_positive/f1_macro` and `majority/accuracy_macro` give every image the same answer. Findings
  without both classes there are omitted and counted in `findings_without_threshold`.
- For `multiclass`, which has no threshold: `accuracy` (`accuracy_low`, `accuracy_high`), `f1_macro`
  and `<class>/f1` over the classes that occur, where tied classes share the answer.
  `chance/accuracy` (1 / classes), `majority/accuracy`, `majority/f1_macro`. `n` records,
  `left_out`.

Keys without a prefix use the model's global similarity, or its first kind if it has no global one;
other kinds are under `local/`, `both/`. `pair` and `embeddings` are defined for the global kind
only.

Deviation: a constant column of scores is 0 after standardisation (GLoRIA's code divides by 0).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit

from plan_jax.heads.examples import (
    Images,
    open_images,
    pad_examples,
    share_batches,
    take_examples,
)
from plan_jax.metrics import classification as classification_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.types import (
    EvalData,
    ExampleScores,
    Features,
    Metric,
    Model,
    Record,
    Result,
    TaskContext,
    UserError,
    check_options,
    read_column,
    select_records,
)

TITLE = "Zero-shot classification"
FITS_HEAD = False
PRIMARY_KIND = "global"
IMAGE_BLOCK = 512  # images whose features are in memory at once

Prompts = Sequence[str]
PromptPair = tuple[Prompts, Prompts]  # for and against a finding
Scoring = Literal["contrast", "max", "pair"]
Kind = Literal["multilabel", "multiclass"]
Ensemble = Literal["scores", "embeddings"]

_ONE_CLASS = "the known labels in the evaluated split are all 0 or all 1"
_NO_CLASSES = "no finding has known labels of both classes in the evaluated split"
_AUROC = "How often an image with the finding scores above one without it, by prompts alone."
_MEANS = {
    "auroc_macro": (
        "AUROC",
        f"{_AUROC} Mean over findings; 0.5 is chance.",
        {"chance": "chance/auroc_macro"},
    ),
    "auprc_macro": (
        "AUPRC",
        "Average precision, mean over findings.",
        {"chance": "chance/auprc_macro"},
    ),
    "accuracy": (
        "accuracy",
        "Share of images whose class has the highest score.",
        {"chance": "chance/accuracy", "most frequent class": "majority/accuracy"},
    ),
    "f1_macro": (
        "F1",
        "Harmonic mean of precision and recall, mean over findings or classes.",
        {"all positive": "all_positive/f1_macro", "most frequent class": "majority/f1_macro"},
    ),
    "accuracy_macro": (
        "accuracy, mean over findings",
        "Share of correct answers at the threshold of validation.",
        {"most frequent answer": "majority/accuracy_macro"},
    ),
}


def _describe_mean(key: str, similarity: str = "") -> dict[str, Metric]:
    """Returns the catalogue entry of a mean, for the primary or for another similarity."""
    label, meaning, nulls = _MEANS[key]
    prefix, suffix = (f"{similarity}/", f", {similarity} similarity") if similarity else ("", "")
    is_headline = not similarity and key in ("auroc_macro", "f1_macro")
    # A threshold comes from validation.
    undefined = _NO_CLASSES + (" and in val" if key in ("f1_macro", "accuracy_macro") else "")
    metric = Metric(
        f"{label}{suffix}", meaning, baselines=nulls, headline=is_headline, undefined=undefined
    )
    return {f"{prefix}{key}": metric}


METRICS = {
    **_describe_mean("auroc_macro"),
    **_describe_mean("auprc_macro"),
    **_describe_mean("accuracy"),
    **_describe_mean("f1_macro"),
    **_describe_mean("accuracy_macro"),
    # By name, since `{similarity}/accuracy` would match the keys of `{finding}/accuracy`.
    **_describe_mean("accuracy", "global"),
    **_describe_mean("accuracy", "local"),
    **_describe_mean("accuracy", "both"),
    **_describe_mean("auroc_macro", "{similarity}"),
    **_describe_mean("auprc_macro", "{similarity}"),
    **_describe_mean("f1_macro", "{similarity}"),
    **_describe_mean("accuracy_macro", "{similarity}"),
    "{finding}/auroc": Metric("AUROC, {finding}", _AUROC, undefined=_ONE_CLASS),
    "{finding}/auprc": Metric("AUPRC, {finding}", "Average precision.", undefined=_ONE_CLASS),
    "{finding}/f1": Metric("F1, {finding}", "Harmonic mean of precision and recall."),
    "{finding}/accuracy": Metric("accuracy, {finding}", "Share of correct answers."),
}


@dataclass(frozen=True)
class Options:
    """How prompts become scores, and scores decisions; the module's docstring has the choices.

    Attributes:
      scoring: from similarities to a score.
      kind: each finding on its own, or one class for each image.
      ensemble: what is averaged over the prompts of a side.
      labels: the findings to score, of those that have prompts; () for all.
      absent: for `multiclass`, the findings that must be 0 in a record. CheXpert 5x200 asks it of
        the eight that are neither one of its classes nor "No Finding".
      validate: choose thresholds on the split `val`, for F1 and accuracy.
      bootstrap_samples: number of resamples of an interval.

    Raises:
      UserError: if a choice is unknown or a number out of its range.
    """

    scoring: Scoring = "contrast"
    kind: Kind = "multilabel"
    ensemble: Ensemble = "scores"
    labels: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    validate: bool = False
    bootstrap_samples: int = 1000

    def __post_init__(self) -> None:
        check_options("zero_shot", self, {"bootstrap_samples": 2})
        if self.absent and self.kind != "multiclass":
            raise UserError(
                f"config.eval.zero_shot.absent is {self.absent}, which kind {self.kind} does not "
                "read; set kind to multiclass, or absent to ()"
            )


def requirements(options: Options) -> tuple[str, ...]:
    """Returns the field of a record that is predicted."""
    return ("labels",)


def check(data: EvalData, options: Options) -> None:
    """Raises UserError if the prompts do not fit the findings of the data or the options."""
    _select_prompts(data.prompts, data.findings, options)


def evaluate(model: Model, data: EvalData, options: Options, context: TaskContext) -> Result:
    """Returns the metrics of all findings that have prompts; see the module's docstring.

    A finding has the prompts with the same `slug`: "Pleural Effusion" those of "pleural effusion".
    `Record.labels` holds 1 present, 0 absent, -1 unknown (omitted) in the order of
    `data.findings`.

    Raises:
      UserError: see `check`; or the options do not fit the model or the records.
    """
    names, prompts = _select_prompts(data.prompts, data.findings, options)
    # Findings without prompts are ignored, also as classes of `multiclass`.
    columns = [data.findings.index(name) for name in names]
    records = data.test
    all_labels = np.stack(read_column(records, "labels"))
    labels = all_labels[:, columns]
    metrics: dict[str, float] = {"chance/auroc_macro": 0.5}
    if options.kind == "multiclass":
        names_absent = _find_findings("absent", options.absent, data.findings)
        absent = [data.findings.index(name) for name in names_absent]
        is_usable = classification_metrics.has_single_class(labels, all_labels[:, absent])
        if not is_usable.any():
            without = f" and none of {', '.join(options.absent)}" if absent else ""
            raise UserError(
                f"none of {len(labels)} records has exactly one of {', '.join(names)}{without}; use"
                " config.eval.zero_shot.kind multilabel, or fewer findings in absent"
            )
        records = select_records(records, np.flatnonzero(is_usable).tolist())
        labels = labels[is_usable]
        metrics |= {"n": float(is_usable.sum()), "left_out": float((~is_usable).sum())}
    scores_of_kind = _score_findings(model, records, prompts, options)
    val_scores_of_kind, val_labels = {}, None
    if options.validate and options.kind == "multilabel" and data.validation:
        val_scores_of_kind = _score_findings(model, data.validation, prompts, options)
        val_labels = np.stack(read_column(data.validation, "labels"))[:, columns]
    primary = PRIMARY_KIND if PRIMARY_KIND in scores_of_kind else next(iter(scores_of_kind))
    samples, seed = options.bootstrap_samples, context.seed
    for kind, scores in scores_of_kind.items():
        is_primary = kind == primary
        part = _areas(scores, labels, names)
        if is_primary:
            part |= _chance_and_interval(scores, labels, samples, seed)
        if options.kind == "multiclass":
            part |= _class_decisions(scores, labels, names)
            if is_primary:
                part |= _class_nulls_and_interval(scores, labels, samples, seed)
        if val_labels is not None:
            part |= _threshold_decisions(
                scores, labels, val_scores_of_kind[kind], val_labels, names, nulls=is_primary
            )
        prefix = "" if is_primary else f"{kind}/"
        metrics |= {f"{prefix}{key}": value for key, value in part.items()}
    # The labels identify an image well enough: the same findings in the same order.
    table = np.stack([scores_of_kind[primary], labels], axis=1)
    examples = [f"{row} {names} {label.tolist()}" for row, label in enumerate(labels)]
    return Result(metrics, scores={"auroc_macro": ExampleScores(examples, table, "auroc")})


# Prompts and records -----------------------------------------------------------------------------


def _select_prompts(
    prompts: Mapping[str, PromptPair], findings: Sequence[str], options: Options
) -> tuple[list[str], list[PromptPair]]:
    """Returns the findings that have prompts, and their prompts.

    The negative prompts are empty for `max`, so that they are not encoded in vain.
    """
    prompts_of_slug = {slug(name): pair for name, pair in prompts.items()}
    absent = _find_findings("absent", options.absent, findings)
    labels = _find_findings("labels", options.labels, findings) or findings
    names = [name for name in labels if slug(name) in prompts_of_slug and name not in absent]
    if not names:
        raise UserError(
            f"prompts for {', '.join(prompts) or 'nothing'} name none of the data's findings "
            f"({', '.join(findings) or 'none'}); use their names"
        )
    pairs = [prompts_of_slug[slug(name)] for name in names]
    num_sides = 1 if options.scoring == "max" else 2
    for name, pair in zip(names, pairs, strict=True):
        if not all(pair[:num_sides]):
            raise UserError(f"prompts of {name} are empty on one side; give at least one each")
    if options.kind == "multiclass" and len(names) == 1:
        raise UserError(f"kind multiclass has the one class {names[0]}; give prompts of two")
    return names, [(pair[0], pair[1] if num_sides == 2 else ()) for pair in pairs]


def _find_findings(option: str, names: Sequence[str], findings: Sequence[str]) -> list[str]:
    """Returns the data's findings that an option names, in its order.

    Raises:
      UserError: the data have no such finding.
    """
    finding_of_slug = {slug(name): name for name in findings}
    for name in names:
        if slug(name) not in finding_of_slug:
            raise UserError(
                f"config.eval.zero_shot.{option} has {name!r}, which is none of the data's findings"
                f" ({', '.join(findings)}); add its column, or leave it out"
            )
    return [finding_of_slug[slug(name)] for name in names]


# Scores ------------------------------------------------------------------------------------------


def _score_findings(
    model: Model, records: Sequence[Record], prompts: Sequence[PromptPair], options: Options
) -> dict[str, Float[np.ndarray, "I F"]]:
    """Computes the score of each finding in each image, for each kind of similarity.

    Raises:
      UserError: if the options need a global similarity that the model does not have, or `max` has
        one image only.
    """
    if options.scoring == "max" and len(records) < 2:
        raise UserError(
            f"scoring max compares images and got {len(records)}; give more or use contrast"
        )
    sides = [side for pair in prompts for side in pair]  # for, against, for, against, ...
    counts = [len(side) for side in sides]
    texts = model.encode_text([text for side in sides for text in side])
    if options.ensemble == "embeddings":
        texts = _average_embeddings(texts, counts)
        counts = [min(count, 1) for count in counts]
    tables = _compare(model, open_images(records), texts)
    if options.scoring == "pair" or options.ensemble == "embeddings":
        if PRIMARY_KIND not in tables:
            raise UserError(
                f"scoring {options.scoring} with ensemble {options.ensemble} needs a global "
                f"similarity, and {model.name} has {', '.join(tables)}; use contrast and scores"
            )
        tables = {PRIMARY_KIND: tables[PRIMARY_KIND]}
    ends = np.cumsum(counts)  # of the columns of each side
    scores_of_kind = {}
    for kind, table in tables.items():
        parts = np.split(np.asarray(table, np.float64), ends[:-1], axis=1)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        scores = np.stack([_score_pair(*pair, options.scoring) for pair in pairs], axis=1)
        scores_of_kind[kind] = _standardise(scores) if options.scoring == "max" else scores
    return scores_of_kind


def _compare(model: Model, images: Images, texts: Features) -> dict[str, np.ndarray]:
    """Returns the similarities [I T] of images and texts, and keeps no features of the images."""

    def compare(indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        # A single block is all images, which need no copy.
        is_single = len(indices) == len(images)
        features = model.encode_image(images if is_single else take_examples(images, indices))
        if len(images) > IMAGE_BLOCK:  # for blocks of one size, which are compiled once
            features = pad_examples(features, IMAGE_BLOCK)
        tables = model.similarity(features, texts)
        return {kind: np.asarray(table)[: len(indices)] for kind, table in tables.items()}

    blocks = share_batches(compare, len(images), IMAGE_BLOCK)
    return {kind: np.concatenate([tables[kind] for tables in blocks]) for kind in blocks[0]}


def _score_pair(
    positive: Float[np.ndarray, "I P"], negative: Float[np.ndarray, "I N"], scoring: str
) -> Float[np.ndarray, " I"]:
    """Returns one score of the similarities to the prompts of a finding."""
    if scoring == "max":
        return positive.max(1)
    if scoring == "contrast":
        return positive.mean(1) - negative.mean(1)
    if positive.shape[1] != negative.shape[1]:
        positive, negative = positive[:, :, None], negative[:, None, :]
    # A softmax over two values is the logistic function of their difference.
    return expit(positive - negative).reshape(len(positive), -1).mean(1)


def _standardise(scores: Float[np.ndarray, "I F"]) -> Float[np.ndarray, "I F"]:
    """Returns columns of mean 0 and standard deviation 1; a constant column becomes 0."""
    is_constant = scores.max(0) == scores.min(0)
    deviation = np.where(is_constant, 1, scores.std(0))
    return np.where(is_constant, 0, scores - scores.mean(0)) / deviation


def _average_embeddings(texts: Features, counts: Sequence[int]) -> Features:
    """Returns one text for each run of `counts` texts: the first, with the mean `pooled`.

    Only `pooled` is averaged: words of different texts do not correspond to each other.
    """
    lengths = np.array([count for count in counts if count])
    starts = np.cumsum(lengths) - lengths
    total = np.add.reduceat(np.asarray(texts.pooled, np.float32), starts)
    mean = total / lengths.astype(np.float32)[:, None]
    return jax.tree.map(lambda leaf: leaf[starts], texts).replace(pooled=mean)


# Metrics -----------------------------------------------------------------------------------------


def _areas(
    scores: Float[np.ndarray, "I F"], labels: Int[np.ndarray, "I F"], names: Sequence[str]
) -> dict[str, float]:
    """Returns the areas under both curves, by finding and as means.

    They are NaN for a finding with one class, which the means leave out.
    """
    metrics = {}
    measures = {
        "auroc": classification_metrics.auroc,
        "auprc": classification_metrics.average_precision,
    }
    for key, measure in measures.items():
        areas = _by_finding(measure, scores, labels)
        for name, area in zip(names, areas, strict=True):
            metrics[f"{slug(name)}/{key}"] = float("nan") if area is None else area
        metrics[f"{key}_macro"] = _mean_or_nan(areas)
    return metrics


def _chance_and_interval(
    scores: Float[np.ndarray, "I F"], labels: Int[np.ndarray, "I F"], samples: int, seed: int
) -> dict[str, float]:
    """Returns the interval of the mean AUROC, the AUPRC of chance, and the numbers of findings."""
    table = np.stack([scores, labels], axis=1)
    low, high = intervals.bootstrap_metric(table, "auroc", samples, seed)
    shares = _by_finding(lambda _, positive: float(positive.mean()), scores, labels)
    num_scored = sum(share is not None for share in shares)
    return {
        "auroc_macro_low": low,
        "auroc_macro_high": high,
        "chance/auprc_macro": _mean_or_nan(shares),
        "findings_scored": float(num_scored),
        "findings_skipped": float(len(shares) - num_scored),
    }


def _threshold_decisions(
    scores: Float[np.ndarray, "I F"],
    labels: Int[np.ndarray, "I F"],
    val_scores: Float[np.ndarray, "V F"],
    val_labels: Int[np.ndarray, "V F"],
    names: Sequence[str],
    nulls: bool,
) -> dict[str, float]:
    """Returns F1 and accuracy at the threshold with the best F1 on the validation scores."""
    thresholds = _by_finding(classification_metrics.best_threshold, val_scores, val_labels)
    metrics: dict[str, float] = {}
    rows = []
    for name, score, label, threshold in zip(names, scores.T, labels.T, thresholds, strict=True):
        known = label >= 0
        truth = label[known] == 1
        if threshold is None or truth.all() or not truth.any():
            continue
        f1 = classification_metrics.f1(score[known], truth, threshold)
        accuracy = classification_metrics.accuracy(score[known], truth, threshold)
        metrics |= {f"{slug(name)}/f1": f1, f"{slug(name)}/accuracy": accuracy}
        share = float(truth.mean())
        # Calling every image positive has recall 1 and precision `share`.
        rows.append((f1, accuracy, 2 * share / (1 + share), max(share, 1 - share)))
    f1, accuracy, all_positive, majority = np.array(rows or [(np.nan,) * 4]).mean(0).tolist()
    metrics |= {"f1_macro": f1, "accuracy_macro": accuracy}
    if nulls:
        metrics |= {"all_positive/f1_macro": all_positive, "majority/accuracy_macro": majority}
        metrics["findings_without_threshold"] = float(thresholds.count(None))
    return metrics


def _class_decisions(
    scores: Float[np.ndarray, "I F"], labels: Int[np.ndarray, "I F"], names: Sequence[str]
) -> dict[str, float]:
    """Returns accuracy and F1 of the class with the highest score; ties share the answer."""
    truth = labels == 1
    metrics = {
        "accuracy": float(_vote_for_truth(scores, truth).mean()),
        "f1_macro": classification_metrics.macro_f1(scores, truth),
    }
    for column in np.flatnonzero(truth.any(0)).tolist():
        # The mean of `macro_f1` is over the classes that occur, here this one alone.
        single = truth & (np.arange(len(names)) == column)
        metrics[f"{slug(names[column])}/f1"] = classification_metrics.macro_f1(scores, single)
    return metrics


def _class_nulls_and_interval(
    scores: Float[np.ndarray, "I F"], labels: Int[np.ndarray, "I F"], samples: int, seed: int
) -> dict[str, float]:
    """Returns the interval of the accuracy, and what chance and the most frequent class reach."""
    truth = labels == 1
    low, high = intervals.bootstrap(_vote_for_truth(scores, truth), None, samples, seed)
    share, num_occurring = float(truth.mean(0).max()), int(truth.any(0).sum())
    return {
        "accuracy_low": low,
        "accuracy_high": high,
        "chance/accuracy": 1 / truth.shape[1],
        "majority/accuracy": share,
        # All other classes that occur have F1 0.
        "majority/f1_macro": 2 * share / (1 + share) / num_occurring,
    }


def _vote_for_truth(
    scores: Float[np.ndarray, "I F"], truth: Bool[np.ndarray, "I F"]
) -> Float[np.ndarray, " I"]:
    """Returns the share of each image's answer that goes to its class: 1 or 0 without ties."""
    return (classification_metrics.vote_shares(scores) * truth).sum(1)


def _by_finding(
    measure: Callable[[np.ndarray, np.ndarray], float],
    scores: Float[np.ndarray, "I F"],
    labels: Float[np.ndarray, "I F"] | Int[np.ndarray, "I F"],
) -> list[float | None]:
    """Returns a measure of each finding over the images with a known label; None for one class."""
    values: list[float | None] = []
    # Column by column, since each finding is unknown in other images.
    for score, label in zip(scores.T, labels.T, strict=True):
        known = label >= 0
        positive = label[known] == 1
        has_one_class = positive.all() or not positive.any()
        values.append(None if has_one_class else measure(score[known], positive))
    return values


def _mean_or_nan(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
