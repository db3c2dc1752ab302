"""Zero-shot classification: a finding is present if its image is nearer to `yes` than `no`.

`Options.scoring` makes one score of the similarities to the positive prompts P and negative N:
`contrast`: mean over P minus mean over N (BioViL, arXiv 2204.09817, contrasts prompts so);
`max`: the highest over P, then z-scored over the images given, finding by finding (GLoRIA, ICCV
2021, `zero_shot_classification`); it never reads N and needs more than one image (transductive);
`pair`: softmax of the two raw cosines, `e^p / (e^p + e^n)`, no temperature, averaged over pairs
(CheXzero, Nature BME 2022); prompts are paired in order, and each with each where P and N are not
of one length (ours). `Options.ensemble`: `embeddings` averages the texts of a side before they are
compared, not normalised before and normalised after (BioViL); `scores` averages similarities.
`Options.kind`: `multilabel` asks every finding by itself; `multiclass` takes the finding with the
highest score, over records with exactly one of them and none unknown.

Keys: `auroc_macro`, the mean over findings, with a 95 % bootstrap interval over images in
`auroc_macro_low`, `..._high`; `auprc_macro`; `<finding>/auroc`, `<finding>/auprc`. Names without
prefix are the model's global similarity (its first kind, if it has no global one), other kinds
stand under `local/`, `both/`; `pair` and `embeddings` are defined for the global one only.
`chance/auroc_macro` is 0.5, `chance/auprc_macro` the mean share of positives; `findings_scored` and
`findings_skipped` count the findings with both classes among the records and those without.
With validation records: `f1_macro`, `accuracy_macro`, `<finding>/f1`, `<finding>/accuracy`, at the
threshold with the best F1 on those, which `max` z-scores by themselves; `all_positive/f1_macro` and
`majority/accuracy_macro` say the same of every image; findings without both classes there are left
out and counted in `findings_without_threshold`.
For `multiclass`, which has no threshold: `accuracy` (`accuracy_low`, `..._high`), `f1_macro` and
`<class>/f1` over the classes that occur, where classes that tie share the answer;
`chance/accuracy` (1 / classes), `majority/accuracy`, `majority/f1_macro`; records `n`, `left_out`.

Deviation: a column of scores that is constant is 0 after z-scoring (GLoRIA's code divides by 0).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit

from plan_jax.metrics import classification as classification_metrics
from plan_jax.metrics import intervals, slug
from plan_jax.types import Features, Model, Record, UserError

HEADLINE = "global"
Prompts = Mapping[str, tuple[Sequence[str], Sequence[str]]]
CHOICES = {
    "scoring": ("contrast", "max", "pair"),
    "kind": ("multilabel", "multiclass"),
    "ensemble": ("scores", "embeddings"),
}


@dataclass(frozen=True)
class Options:
    """How prompts become scores, and scores answers; what each choice means stands above.

    `validate`: whether the caller is to give validation records, for F1 and accuracy.
    """

    scoring: Literal["contrast", "max", "pair"] = "contrast"
    kind: Literal["multilabel", "multiclass"] = "multilabel"
    ensemble: Literal["scores", "embeddings"] = "scores"
    validate: bool = False


def evaluate(
    model: Model,
    records: Sequence[Record],
    prompts: Prompts,
    *,
    findings: Sequence[str],
    options: Options | None = None,
    validation: Sequence[Record] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Classify every finding that has prompts; the keys stand above.

    A finding has the prompts of its `slug`: "Pleural Effusion" those of "pleural effusion".
    `records[i].labels` holds 1 present, 0 absent, -1 unknown (left out) in the order of `findings`;
    thresholds are chosen on `validation`, and without it there are none; `samples` are drawn for
    the intervals.

    Raises:
        UserError: if prompts name no finding of the data, or one lacks prompts of a side; if the
            options do not fit the model or the records.
    """
    options = options or Options()
    names, sides = _asked(prompts, findings, options)
    columns = [list(findings).index(name) for name in names]
    labels = np.stack([record.labels for record in records])[:, columns]
    values: dict[str, float] = {"chance/auroc_macro": 0.5}
    if options.kind == "multiclass":
        kept = _exclusive(labels, names)
        records, labels = [records[i] for i in np.flatnonzero(kept)], labels[kept]
        values |= {"n": float(kept.sum()), "left_out": float((~kept).sum())}
    tables = _scores(model, records, sides, options)
    tuned, tuned_labels = {}, None
    if validation and options.kind == "multilabel":
        tuned = _scores(model, validation, sides, options)
        tuned_labels = np.stack([record.labels for record in validation])[:, columns]
    headline = HEADLINE if HEADLINE in tables else next(iter(tables))
    for kind, scores in tables.items():
        first = kind == headline
        part = _ranking(scores, labels, names)
        if first:
            part |= _beside(scores, labels, samples, seed)
        if options.kind == "multiclass":
            part |= _classes(scores, labels, names, samples, seed, first)
        if tuned_labels is not None:
            part |= _thresholded(scores, labels, tuned[kind], tuned_labels, names, first)
        values |= {("" if first else f"{kind}/") + key: value for key, value in part.items()}
    return values


def _exclusive(labels: Int[np.ndarray, "I F"], names: Sequence[str]) -> Bool[np.ndarray, " I"]:
    """Say which records have exactly one of the classes, and none of them unknown."""
    kept = ((labels == 1).sum(1) == 1) & (labels >= 0).all(1)
    if not kept.any():
        raise UserError(
            f"none of {len(labels)} records has exactly one of {', '.join(names)}; ask for kind "
            "multilabel"
        )
    return kept


def _asked(
    prompts: Prompts, findings: Sequence[str], options: Options
) -> tuple[list[str], list[tuple[Sequence[str], Sequence[str]]]]:
    """List the findings that are asked, and the prompts of each, having checked the options."""
    for name, known in CHOICES.items():
        if (given := getattr(options, name)) not in known:
            raise UserError(f"{name} is {given!r}; use {', '.join(known)}")
    table = {slug(name): sides for name, sides in prompts.items()}
    names = [name for name in findings if slug(name) in table]
    if not names:
        raise UserError(
            f"prompts for {', '.join(prompts) or 'nothing'} name none of the data's findings "
            f"({', '.join(findings) or 'none'}); use their names"
        )
    sides = [table[slug(name)] for name in names]
    needed = 1 if options.scoring == "max" else 2
    if empty := [name for name, some in zip(names, sides, strict=True) if not all(some[:needed])]:
        raise UserError(f"prompts of {empty[0]} are empty on one side; give at least one each")
    if options.kind == "multiclass" and len(names) == 1:
        raise UserError(f"kind multiclass has the one class {names[0]}; give prompts of two")
    return names, [(some[0], some[1] if needed == 2 else ()) for some in sides]


def _scores(
    model: Model,
    records: Sequence[Record],
    sides: Sequence[tuple[Sequence[str], Sequence[str]]],
    options: Options,
) -> dict[str, Float[np.ndarray, "I F"]]:
    """Score each finding in each image, for every kind of similarity the options are defined for.

    Raises:
        UserError: if there is no such kind, or `max` has one image only.
    """
    if options.scoring == "max" and len(records) < 2:
        raise UserError(
            f"scoring max compares images and got {len(records)}; give more or use contrast"
        )
    counts = [len(side) for pair in sides for side in pair]
    read = model.encode_text([text for pair in sides for side in pair for text in side])
    if options.ensemble == "embeddings":
        read, counts = _averaged(read, counts), [min(count, 1) for count in counts]
    kinds = model.similarity(
        model.encode_image(np.stack([record.image for record in records])), read
    )
    if options.scoring == "pair" or options.ensemble == "embeddings":
        if HEADLINE not in kinds:
            raise UserError(
                f"scoring {options.scoring} with ensemble {options.ensemble} needs a global "
                f"similarity, and {model.name} has {', '.join(kinds)}; use contrast and scores"
            )
        kinds = {HEADLINE: kinds[HEADLINE]}
    ends = np.cumsum(counts)
    made = {}
    for kind, table in kinds.items():
        parts = np.split(np.asarray(table, np.float64), ends[:-1], axis=1)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        made[kind] = np.stack([_score(*pair, options.scoring) for pair in pairs], 1)
        if options.scoring == "max":
            made[kind] = _standard(made[kind])
    return made


def _score(
    yes: Float[np.ndarray, "I P"], no: Float[np.ndarray, "I N"], scoring: str
) -> Float[np.ndarray, " I"]:
    """Make one score of the similarities to the prompts of a finding."""
    if scoring == "max":
        return yes.max(1)
    if scoring == "contrast":
        return yes.mean(1) - no.mean(1)
    if yes.shape[1] != no.shape[1]:
        yes, no = yes[:, :, None], no[:, None, :]
    return expit(yes - no).reshape(len(yes), -1).mean(1)


def _standard(scores: Float[np.ndarray, "I F"]) -> Float[np.ndarray, "I F"]:
    """Take mean and spread over the images from each column; a constant one becomes 0."""
    flat = scores.max(0) == scores.min(0)
    return np.where(flat, 0, scores - scores.mean(0)) / np.where(flat, 1, scores.std(0))


def _averaged(read: Features, counts: Sequence[int]) -> Features:
    """Make one text of each run of `counts` texts: its first, with the mean of their `pooled`."""
    some = np.array([count for count in counts if count])
    first = np.cumsum(some) - some
    total = np.add.reduceat(np.asarray(read.pooled, np.float32), first)
    return jax.tree.map(lambda x: x[first], read).replace(pooled=total / np.float32(some)[:, None])


def _ranking(
    scores: Float[np.ndarray, "I F"], labels: Int[np.ndarray, "I F"], names: Sequence[str]
) -> dict[str, float]:
    """Measure how each finding is ranked, and the means; a finding with one class has no key."""
    values = {}
    measures = {
        "auroc": classification_metrics.auroc,
        "auprc": classification_metrics.average_precision,
    }
    for key, measure in measures.items():
        found = _each(measure, scores, labels)
        pairs = zip(names, found, strict=True)
        values |= {f"{slug(name)}/{key}": value for name, value in pairs if value is not None}
        values[f"{key}_macro"] = _mean(found)
    return values


def _beside(scores: np.ndarray, labels: np.ndarray, samples: int, seed: int) -> dict[str, float]:
    """Give the interval of the mean AUROC, the level of chance, and what was counted."""
    rows = np.concatenate([scores, labels], 1)
    low, high = intervals.bootstrap(rows, _resampled, samples, seed)
    shares = _each(lambda _, label: float(label.mean()), scores, labels)
    scored = len([share for share in shares if share is not None])
    return {
        "auroc_macro_low": low,
        "auroc_macro_high": high,
        "chance/auprc_macro": _mean(shares),
        "findings_scored": float(scored),
        "findings_skipped": float(len(shares) - scored),
    }


def _thresholded(
    scores: Float[np.ndarray, "I F"],
    labels: Int[np.ndarray, "I F"],
    tuned: Float[np.ndarray, "V F"],
    tuned_labels: Int[np.ndarray, "V F"],
    names: Sequence[str],
    nulls: bool,
) -> dict[str, float]:
    """Decide at the threshold with the best F1 on the validation scores."""
    limits = _each(classification_metrics.best_threshold, tuned, tuned_labels)
    values, rows = {}, []
    for name, score, label, limit in zip(names, scores.T, labels.T, limits, strict=True):
        known = label >= 0
        truth = label[known] == 1
        if limit is None or truth.all() or not truth.any():
            continue
        measures = classification_metrics.f1, classification_metrics.accuracy
        pair = [measure(score[known], truth, limit) for measure in measures]
        values |= {f"{slug(name)}/f1": pair[0], f"{slug(name)}/accuracy": pair[1]}
        share = float(truth.mean())
        rows.append((*pair, 2 * share / (1 + share), max(share, 1 - share)))
    f1, accuracy, all_positive, majority = np.array(rows or [[np.nan] * 4]).mean(0).tolist()
    values |= {"f1_macro": f1, "accuracy_macro": accuracy}
    if nulls:
        values |= {"all_positive/f1_macro": all_positive, "majority/accuracy_macro": majority}
        values["findings_without_threshold"] = float(limits.count(None))
    return values


def _classes(
    scores: Float[np.ndarray, "I F"],
    labels: Int[np.ndarray, "I F"],
    names: Sequence[str],
    samples: int,
    seed: int,
    nulls: bool,
) -> dict[str, float]:
    """Take the class with the highest score; classes that tie share the answer."""
    truth = labels == 1
    right = (classification_metrics.vote_shares(scores) * truth).sum(1)
    occur, share = np.flatnonzero(truth.any(0)), float(truth.mean(0).max())
    values = {
        "accuracy": float(right.mean()),
        "f1_macro": classification_metrics.macro_f1(scores, truth),
    }
    for i in occur.tolist():
        alone = truth & (np.arange(len(names)) == i)  # the mean is over classes that occur
        values[f"{slug(names[i])}/f1"] = classification_metrics.macro_f1(scores, alone)
    if nulls:
        low, high = intervals.bootstrap(right, None, samples, seed)
        values |= {"accuracy_low": low, "accuracy_high": high, "majority/accuracy": share}
        values["chance/accuracy"] = 1 / len(names)
        values["majority/f1_macro"] = 2 * share / (1 + share) / len(occur)
    return values


def _each(
    measure: Callable[[np.ndarray, np.ndarray], float],
    scores: Float[np.ndarray, "I F"],
    labels: np.ndarray,
) -> list[float | None]:
    """Measure each finding over the images where it is known, None with one class only."""
    values: list[float | None] = []
    for score, label in zip(scores.T, labels.T, strict=True):
        known = label >= 0
        positive: Bool[np.ndarray, " I"] = label[known] == 1
        one = positive.all() or not positive.any()
        values.append(None if one else measure(score[known], positive))
    return values


def _resampled(rows: Float[np.ndarray, "I G"]) -> float:
    scores, labels = np.split(rows, 2, axis=1)
    return _mean(_each(classification_metrics.auroc, scores, labels))


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
