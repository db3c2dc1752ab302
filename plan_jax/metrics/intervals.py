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
    """Give the percentile interval of a statistic (default: the mean) over resampled rows.

    Rows of `values` are what is drawn with replacement `n` times (a query, an image), so rows must
    be independent of each other. (NaN, NaN) for no rows or where a statistic is not defined.
    """
    if not len(values):
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    statistic = statistic or (lambda rows: float(np.mean(rows)))
    drawn = [statistic(values[random.integers(len(values), size=len(values))]) for _ in range(n)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
