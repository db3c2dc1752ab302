"""Bootstrap intervals, of one model and of the difference between two.

A resample is described by how often it holds each row. Metrics that are sums or areas follow from
these counts for many resamples at once, without gathering the rows of any.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Shaped

MAX_COUNTS = 2**22  # counts at a time, 32 MiB; a statistic has a few arrays of this size


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
      statistic: from N resampled rows to a number; the mean by default. The order of the rows must
        not matter.
      n: number of resamples.
      seed: selects the resamples.
      level: share of the resampled statistics inside the interval.

    Returns:
      The lower and the upper end; NaN if there are no rows or a statistic is not defined.
    """

    def compute(counts: np.ndarray) -> np.ndarray:
        if statistic is None:
            return values.reshape(len(values), -1).mean(1) @ counts / len(values)
        repeats = counts.T.astype(int)
        return np.array([statistic(np.repeat(values, row, axis=0)) for row in repeats])

    return _bootstrap(len(values), compute, n, seed, level)


def bootstrap_metric(
    table: Float[np.ndarray, "N 2 F"],
    statistic: str,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns the percentile interval of a metric of `STATISTICS` over resampled rows.

    `macro_mean` and `macro_auroc` describe the table. The other arguments and the result are those
    of `bootstrap`.
    """
    compute = STATISTICS[statistic]
    return _bootstrap(len(table), lambda counts: compute(table, counts), n, seed, level)


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

    def compute_differences(counts: np.ndarray) -> np.ndarray:
        of_first, of_second = ([compute(x, counts) for x in tables] for tables in (first, second))
        difference_RS = np.subtract(of_second, of_first).T
        seeds_RS = draw.integers(len(first), size=difference_RS.shape)
        return np.take_along_axis(difference_RS, seeds_RS, 1).mean(1)

    return _bootstrap(first.shape[1], compute_differences, n, seed, level)


def _bootstrap(
    num_rows: int,
    statistic: Callable[[Float[np.ndarray, "N R"]], Float[np.ndarray, " R"]],
    n: int,
    seed: int,
    level: float,
) -> tuple[float, float]:
    """Returns the interval of a statistic of counts: how often each row is in each resample."""
    if not num_rows:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)

    def draw_counts() -> np.ndarray:
        return np.bincount(random.integers(num_rows, size=num_rows), minlength=num_rows)

    block_size = max(1, MAX_COUNTS // num_rows)
    samples = []
    for start in range(0, n, block_size):
        num_resamples = min(block_size, n - start)
        counts = np.stack([draw_counts() for _ in range(num_resamples)], 1)
        samples.append(statistic(counts.astype(float)))
    low, high = np.quantile(np.concatenate(samples), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compute_metric(table: Float[np.ndarray, "N 2 F"], statistic: str) -> float:
    """Computes a metric of `STATISTICS` from all rows of its table, each once."""
    return float(STATISTICS[statistic](table, np.ones((len(table), 1)))[0])


def macro_mean(
    sum_and_count: Float[np.ndarray, "N 2 F"], counts: Float[np.ndarray, "N R"]
) -> Float[np.ndarray, " R"]:
    """Returns the mean over F groups of *sum_n k_n s_nf / sum_n k_n c_nf* for each resample.

    s are sums over the items of example n in group f, c their numbers, and k how often a resample
    has example n. Groups without an item are left out.
    """
    total, count = (sum_and_count[:, i].T @ counts for i in range(2))
    return _mean_where(total / np.where(count > 0, count, 1), count > 0)


def macro_auroc(
    scores_and_labels: Float[np.ndarray, "N 2 F"], counts: Float[np.ndarray, "N R"]
) -> Float[np.ndarray, " R"]:
    """Returns the mean AUROC over findings for each resample.

    AUROC is that of `classification.auroc`. Labels are 1 and 0; -1 is unknown. Findings without
    both labels are left out.

    *sum_p k_p (n_below(p) + n_tied(p) / 2) / (n1 n0)* over the positives p, k_p how often a
    resample has p, and n the numbers of its negatives with a lower and with the same score; n1 and
    n0 are the numbers of its positives and negatives.
    """
    areas, is_defined = [], []
    for scores, labels in scores_and_labels.transpose(2, 1, 0):
        order = np.argsort(scores)  # of positives too, so that memory is read in its order
        positives, negatives = (order[labels[order] == label] for label in (1, 0))
        num_below = np.cumsum(np.pad(counts[negatives], ((1, 0), (0, 0))), 0)
        first, last = (
            np.searchsorted(scores[negatives], scores[positives], side)
            for side in ("left", "right")
        )
        below_and_tied = num_below[first]
        below_and_tied += num_below[last]
        wins = np.einsum("pr,pr->r", counts[positives], below_and_tied) / 2
        pairs = counts[positives].sum(0) * num_below[-1]
        if np.isnan(scores[labels >= 0]).any():
            wins = np.full_like(wins, np.nan)
        areas.append(wins / np.maximum(pairs, 1))
        is_defined.append(pairs > 0)
    shape = scores_and_labels.shape[2], counts.shape[1]
    return _mean_where(np.reshape(areas, shape), np.reshape(is_defined, shape).astype(bool))


def _mean_where(
    values: Float[np.ndarray, "F R"], is_chosen: Bool[np.ndarray, "F R"]
) -> Float[np.ndarray, " R"]:
    """Returns the mean of the chosen values of each column; NaN where there are none."""
    total, count = np.where(is_chosen, values, 0).sum(0), is_chosen.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# How a metric follows from the scores of single examples, `types.ExampleScores`, for each resample.
STATISTICS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": macro_mean,
    "auroc": macro_auroc,
}
