"""Bootstrap intervals."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped


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
