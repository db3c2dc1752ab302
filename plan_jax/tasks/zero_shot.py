"""Zero-shot classification: a finding is present if its image is nearer to `yes` than `no`.

The score of a finding is the mean similarity to its positive prompts minus the mean to its negative
ones (BioViL, arXiv 2204.09817, contrasts prompts so); only its order matters, so no threshold and
no temperature enters.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from plan_jax import metrics
from plan_jax.figures import slug
from plan_jax.types import Model, Record, UserError

HEADLINE = "global"
Prompts = Mapping[str, tuple[Sequence[str], Sequence[str]]]


def evaluate(
    model: Model,
    records: Sequence[Record],
    prompts: Prompts,
    *,
    findings: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Classify every finding that has prompts, and give the area under the ROC curve.

    `records[i].labels` holds 1 present, 0 absent, -1 unknown (left out) in the order of `findings`.
    Keys: `auroc_macro`, the mean over findings, with a 95 % bootstrap interval over images in
    `auroc_macro_low`, `..._high`; `<finding>/auroc`. Names without prefix are the model's global
    similarity (its first kind, if it has no global one), other kinds stand under `local/`, `both/`.
    `chance/auroc_macro` is 0.5; `findings_scored` and `findings_skipped` count the findings with
    both classes among the records and those without.

    Raises:
        UserError: if prompts name no finding of the data, or one lacks prompts of a side.
    """
    names = [name for name in findings if name in prompts]
    if not names:
        raise UserError(
            f"prompts for {', '.join(prompts) or 'nothing'} name none of the data's findings "
            f"({', '.join(findings) or 'none'}); use their names"
        )
    if empty := [name for name in names if not all(prompts[name])]:
        raise UserError(f"prompts of {empty[0]} are empty on one side; give at least one each")
    labels = np.stack([record.labels for record in records])
    labels = labels[:, [list(findings).index(name) for name in names]]
    texts = [text for name in names for side in prompts[name] for text in side]
    seen = model.see(np.stack([record.image for record in records]))
    kinds = model.similarity(seen, model.read(texts))
    headline = HEADLINE if HEADLINE in kinds else next(iter(kinds))
    values: dict[str, float] = {"chance/auroc_macro": 0.5}
    for kind, table in kinds.items():
        prefix = "" if kind == headline else f"{kind}/"
        scores = _contrast(np.asarray(table, np.float64), [prompts[name] for name in names])
        areas = _areas(scores, labels)
        known = {name: area for name, area in zip(names, areas, strict=True) if area is not None}
        values |= {f"{prefix}{slug(name)}/auroc": area for name, area in known.items()}
        values[f"{prefix}auroc_macro"] = _mean(areas)
        if kind == headline:
            rows = np.concatenate([scores, labels], 1)
            low, high = metrics.bootstrap(rows, _resampled, samples, seed)
            values |= {"auroc_macro_low": low, "auroc_macro_high": high}
            values["findings_scored"] = float(len(known))
            values["findings_skipped"] = float(len(names) - len(known))
    return values


def _contrast(
    table: Float[np.ndarray, "I T"], prompts: Sequence[tuple[Sequence[str], Sequence[str]]]
) -> Float[np.ndarray, "I F"]:
    """Average the columns of each side, positive prompts first, and take the difference."""
    scores, start = [], 0
    for positive, negative in prompts:
        middle, end = start + len(positive), start + len(positive) + len(negative)
        scores.append(table[:, start:middle].mean(1) - table[:, middle:end].mean(1))
        start = end
    return np.stack(scores, 1)


def _areas(scores: Float[np.ndarray, "I F"], labels: np.ndarray) -> list[float | None]:
    """Give the AUROC of each finding over the images where it is known, None with one class."""
    areas = []
    for score, label in zip(scores.T, labels.T, strict=True):
        known = label >= 0
        positive: Bool[np.ndarray, " I"] = label[known] == 1
        one = positive.all() or not positive.any()
        areas.append(None if one else metrics.auroc(score[known], positive))
    return areas


def _resampled(rows: Float[np.ndarray, "I G"]) -> float:
    scores, labels = np.split(rows, 2, axis=1)
    return _mean(_areas(scores, labels))


def _mean(areas: Sequence[float | None]) -> float:
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else float("nan")
