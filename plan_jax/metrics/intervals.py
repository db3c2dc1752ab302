"""Bootstrap intervals, of one model and of the difference between two."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Shaped

from plan_jax.metrics import classification


def bootstrap(
    values: Shaped[np.ndarray, "N ..."],
    statistic: Callable[[np.ndarray], float] | None = None,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns the percentile interval of a statistic over resampled rows (Efron 1979).

    Each of `n` resamples draws N rows with replacement, so a row must be a unit that is independent
    of the others: an image, a query.

    Args:
      values: the rows.
      statistic: from N resampled rows to a number; the mean by default.
      n: number of resamples.
      seed: selects the resamples.
      level: share of the resampled statistics inside the interval.

    Returns:
      The lower and the upper end; NaN if there are no rows or a statistic is not defined.
    """
    if not len(values):
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    statistic = statistic or (lambda rows: float(np.mean(rows)))
    # One resample at a time: all N x n indices at once would not fit in memory for large N.
    samples = [statistic(values[random.integers(len(values), size=len(values))]) for _ in range(n)]
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_difference(
    first: Float[np.ndarray, "N 2 F"],
    second: Float[np.ndarray, "N 2 F"],
    statistic: str = "mean",
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns the percentile interval of how far a metric of `second` is above that of `first`.

    Row n of both tables is of the same example. A resample draws the same rows of both, so what
    makes an example hard for both models cancels out (a paired bootstrap).

    >>> first = np.ones((5, 2, 1))
    >>> bootstrap_difference(first, first * [[3.0], [1.0]])
    (2.0, 2.0)
    """
    return bootstrap_difference_over_seeds(first[None], second[None], statistic, n, seed, level)


def bootstrap_difference_over_seeds(
    first: Float[np.ndarray, "S N 2 F"],
    second: Float[np.ndarray, "S N 2 F"],
    statistic: str = "mean",
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns the interval of `bootstrap_difference` for metrics that are means over S seeds.

    Tables s are of the runs of seed s. A resample draws examples, and independently of them seeds,
    the same of both models. So the interval is of other images and of other runs.
    """
    compute = STATISTICS[statistic]
    draw = np.random.default_rng([seed, 1])  # not the numbers that draw the examples

    def difference(rows: np.ndarray) -> float:
        seeds = draw.integers(len(first), size=len(first))
        return float(np.mean([compute(rows[:, 1, s]) - compute(rows[:, 0, s]) for s in seeds]))

    pairs = np.moveaxis(np.stack([first, second]), 2, 0)
    return bootstrap(pairs, difference, n, seed, level)


def macro_mean(sum_and_count: Float[np.ndarray, "N 2 F"]) -> float:
    """Returns the mean over F groups of *sum_n s_nf / sum_n c_nf*; groups without a count are left
    out.

    s are sums over the items of example n in group f, and c their numbers.
    """
    total, count = sum_and_count.sum(0)
    return float((total[count > 0] / count[count > 0]).mean()) if (count > 0).any() else np.nan


def macro_auroc(scores_and_labels: Float[np.ndarray, "N 2 F"]) -> float:
    """Returns the mean AUROC over the findings that have both labels, 1 and 0; -1 is unknown."""
    areas = []
    for scores, labels in scores_and_labels.transpose(2, 1, 0):
        known = labels >= 0
        positive = labels[known] == 1
        if positive.any() and not positive.all():
            areas.append(classification.auroc(scores[known], positive))
    return classification.macro_mean(areas)


# How a metric follows from the scores of single examples, `types.ExampleScores`.
STATISTICS: Mapping[str, Callable[[np.ndarray], float]] = {
    "mean": macro_mean,
    "auroc": macro_auroc,
}
