"""Accuracies against false reports: whether a model reads left, right, "no", size and place.

An image is compared with its own report and with a variant of it that contradicts the report in one
claim, see `data.report_parser.rewriting`. The accuracy is the share of variants that are less
similar to the image than the report; a tie counts half, so chance is 0.5. A variant is drawn for
each kind and report, two for a negation. Where a text is too long for the model, its variant may be
the same to it, and ties.

Keys, each also with an interval over reports, `_low` and `_high`, and as `<similarity>/...`:

- `laterality_accuracy`, `severity_accuracy`, `region_accuracy`.
- `negation_accuracy`: the mean of `negation_stated_accuracy` (the report has the finding) and
  `negation_denied_accuracy` (the report rules it out). A model that merely prefers texts with "no"
  is right in one of the two and wrong in the other.
- `laterality_n` and so on: reports that have a variant, without a similarity.

A key is absent where no report has such a variant.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from plan_jax.heads.examples import pad_examples, read_examples, share_batches
from plan_jax.metrics import intervals
from plan_jax.types import VARIANT_KINDS, Features, Metric, Model, ReportVariant

CHUNK = 64  # pairs per call of the model
NEGATION_PARTS = ("stated", "denied")
Finder = Callable[[str, str], Sequence[ReportVariant]]

_LABELS = {
    "laterality": ("left or right", "the report with left and right exchanged"),
    "negation": ("present or absent", "the report with one sentence negated"),
    "negation_stated": ("present or absent, present", "the report with a finding denied"),
    "negation_denied": ("present or absent, absent", "the report with a denied finding stated"),
    "severity": ("size", "the report with one size exchanged, as small for large"),
    "region": ("upper or lower", "the report with the zones of one sentence exchanged"),
}
METRICS = {
    f"{prefix}{name}_accuracy": Metric(
        f"accuracy, {label}{suffix}",
        f"How often the image is more similar to its report than to {variant}. Chance is 0.5.",
        baselines={"chance": f"chance/{name}_accuracy"},
        headline=not prefix and name in ("laterality", "negation"),
    )
    for name, (label, variant) in _LABELS.items()
    for prefix, suffix in (("", ""), ("{similarity}/", ", {similarity} similarity"))
} | {
    f"{name}_n": Metric(f"reports, {label}", f"Reports compared with {variant}.", digits=0)
    for name, (label, variant) in _LABELS.items()
}


class _Pair(NamedTuple):
    """A row of the reports, and a variant of its report."""

    row: int
    variant: ReportVariant


def compare_variants(
    model: Model,
    images: Features,
    reports: Sequence[str],
    find_variants: Finder,
    *,
    primary: str,
    max_reports: int,
    bootstrap_samples: int,
    seed: int,
) -> dict[str, float]:
    """Returns the accuracies of a model, see the keys of this module.

    Args:
      model: the model.
      images: features of N images.
      reports: the N reports.
      find_variants: returns the variants of a report of a kind, see `TaskContext`.
      primary: the kind of similarity whose metrics have no prefix.
      max_reports: reports that are compared for each kind of variant, drawn with the seed.
      bootstrap_samples: number of resamples of an interval.
      seed: draws reports, variants and resamples.
    """
    pairs = {
        kind: _draw_pairs(reports, kind, find_variants, max_reports, seed) for kind in VARIANT_KINDS
    }
    everything = [pair for chosen in pairs.values() for pair in chosen]
    if not everything:
        return {}
    wins = _compare(model, images, reports, everything)
    metrics: dict[str, float] = {}
    start = 0
    for kind, chosen in pairs.items():
        stop = start + len(chosen)
        for similarity, won in wins.items():
            prefix = "" if similarity == primary else f"{similarity}/"
            scores = _summarise(kind, chosen, won[start:stop], bootstrap_samples, seed)
            metrics |= {f"{prefix}{key}": value for key, value in scores.items()}
        start = stop
        for name in _names(kind, chosen):
            metrics[f"chance/{name}_accuracy"] = 0.5
            part = name.removeprefix("negation_")
            metrics[f"{name}_n"] = float(
                len({pair.row for pair in chosen if part in (kind, pair.variant.part)})
            )
    return metrics


def _draw_pairs(
    reports: Sequence[str], kind: str, find_variants: Finder, max_reports: int, seed: int
) -> list[_Pair]:
    """Draws one variant of each part for up to `max_reports` reports that have some."""
    random = np.random.default_rng([seed, VARIANT_KINDS.index(kind)])
    pairs: list[_Pair] = []
    rows: set[int] = set()
    for row in random.permutation(len(reports)).tolist():
        variants = find_variants(reports[row], kind)
        for part in dict.fromkeys(variant.part for variant in variants):
            options = [variant for variant in variants if variant.part == part]
            pairs.append(_Pair(row, options[random.integers(len(options))]))
            rows.add(row)
        if len(rows) == max_reports:
            break
    return pairs


def _compare(
    model: Model, images: Features, reports: Sequence[str], pairs: Sequence[_Pair]
) -> dict[str, Float[np.ndarray, " N"]]:
    """Returns for each kind of similarity 1 where the report is ahead of the variant, 1/2 tied."""

    def compare(indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        chosen = [pairs[index] for index in indices]
        # Both in one call of the model, so that equal texts have equal scores.
        texts = [reports[row] for row, _ in chosen] + [variant.text for _, variant in chosen]
        rows = np.array([row for row, _ in chosen])
        block = pad_examples(read_examples(images, np.concatenate([rows, rows])), 2 * CHUNK)
        encoded = pad_examples(model.encode_text(texts), 2 * CHUNK)
        wins = {}
        for kind, values in _pair_scores(model, block, encoded).items():
            own, other = np.split(values[: len(texts)], 2)
            is_finite = np.isfinite(own) & np.isfinite(other)
            wins[kind] = np.where(is_finite, (own > other) + 0.5 * (own == other), np.nan)
        return wins

    batches = share_batches(compare, len(pairs), CHUNK)
    return {kind: np.concatenate([wins[kind] for wins in batches]) for kind in batches[0]}


def _pair_scores(model: Model, images: Features, texts: Features) -> dict[str, np.ndarray]:
    """Returns the similarity of image b with text b, of each kind."""
    if model.pair_similarity is not None:
        values = model.pair_similarity(images, texts)
    else:
        tables = model.similarity(images, texts)
        values = {kind: np.diagonal(table) for kind, table in tables.items()}
    return {kind: np.asarray(value, np.float32) for kind, value in values.items()}


def _names(kind: str, pairs: Sequence[_Pair]) -> list[str]:
    """Returns the names of the accuracies of a kind: its own, and those of its parts."""
    if not pairs:
        return []
    if kind != "negation":
        return [kind]
    parts = {pair.variant.part for pair in pairs}
    return [kind, *(f"{kind}_{part}" for part in NEGATION_PARTS if part in parts)]


def _summarise(
    kind: str,
    pairs: Sequence[_Pair],
    wins: Float[np.ndarray, " N"],
    bootstrap_samples: int,
    seed: int,
) -> dict[str, float]:
    """Returns the accuracies of a kind of variants, with intervals over reports."""
    names = _names(kind, pairs)
    # One row a report, one column a part; NaN where a report has no variant of a part.
    parts = list(dict.fromkeys(pair.variant.part for pair in pairs))
    table = np.full((len(pairs), len(parts)), np.nan)
    row_of: dict[int, int] = {}
    for pair, won in zip(pairs, wins, strict=True):
        row = row_of.setdefault(pair.row, len(row_of))
        table[row, parts.index(pair.variant.part)] = won
    table = table[: len(row_of)]
    metrics: dict[str, float] = {}
    for name in names:
        key, part = f"{name}_accuracy", name.removeprefix("negation_")
        columns = table if part not in parts else table[:, [parts.index(part)]]
        is_known = ~np.isnan(columns)
        rows = np.stack([np.where(is_known, columns, 0), is_known], 1)[is_known.any(1)]
        if np.isnan(wins).any():  # a score of the model is not finite
            metrics |= dict.fromkeys((key, f"{key}_low", f"{key}_high"), float("nan"))
            continue
        low, high = intervals.bootstrap_metric(rows, "mean", bootstrap_samples, seed)
        accuracy = intervals.compute_metric(rows, "mean")
        metrics |= {key: accuracy, f"{key}_low": low, f"{key}_high": high}
    return metrics
