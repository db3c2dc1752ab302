"""Metrics of ranked retrieval: ranks of hits, recall, precision, and their values by chance.

Ties count against the model: among equal scores, wrong candidates come first. Otherwise a model
with constant scores would profit from the order of the candidates.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


def hit_ranks(
    scores: Float[np.ndarray, "Q N"], hits: Bool[np.ndarray, "Q N"]
) -> Float[np.ndarray, " Q"]:
    """Returns the rank (1 = first) of each query's best hit among N candidates.

    A query without a hit has rank infinity. A query with NaN among its scores has rank NaN.

    >>> hit_ranks(np.array([[0.1, 0.9, 0.5]]), np.array([[False, False, True]])).tolist()
    [2.0]
    """
    best = np.where(hits, scores, -np.inf).max(1, keepdims=True)
    ranks = 1.0 + (~hits & (scores >= best)).sum(1)
    ranks = np.where(hits.any(1), ranks, np.inf)
    return np.where(np.isnan(scores).any(1), np.nan, ranks)


class RankCounter:
    """Computes `hit_ranks` of queries whose N candidates come in blocks of K.

    All blocks pass twice: through `find_best`, then through `count_above`. Counters of different
    blocks are merged after each pass.
    """

    def __init__(self, num_queries: int) -> None:
        """Initialises the ranks of queries without any candidate."""
        self._best = np.full(num_queries, -np.inf)
        self._has_hit = np.zeros(num_queries, bool)
        self._has_nan = np.zeros(num_queries, bool)
        self._num_above = np.zeros(num_queries, int)

    def find_best(self, scores: Float[np.ndarray, "Q K"], hits: Bool[np.ndarray, "Q K"]) -> None:
        """Reads the scores of the hits of a block."""
        self._best = np.maximum(self._best, np.where(hits, scores, -np.inf).max(1))
        self._has_hit |= hits.any(1)
        self._has_nan |= np.isnan(scores).any(1)

    def count_above(self, scores: Float[np.ndarray, "Q K"], hits: Bool[np.ndarray, "Q K"]) -> None:
        """Counts the wrong candidates of a block that score at least as high as the best hit."""
        self._num_above += (~hits & (scores >= self._best[:, None])).sum(1)

    def state(self) -> dict[str, np.ndarray]:
        """Returns what was read so far, for `merge`: arrays [Q]."""
        return {
            "best": self._best,
            "has_hit": self._has_hit,
            "has_nan": self._has_nan,
            "num_above": self._num_above,
        }

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Replaces what was read by what the counters of several parts of the blocks have read."""
        self._best = np.max([state["best"] for state in states], axis=0)
        self._has_hit = np.any([state["has_hit"] for state in states], axis=0)
        self._has_nan = np.any([state["has_nan"] for state in states], axis=0)
        self._num_above = np.sum([state["num_above"] for state in states], axis=0)

    def ranks(self) -> Float[np.ndarray, " Q"]:
        """Returns the ranks of the best hits, as `hit_ranks` does."""
        ranks = np.where(self._has_hit, 1.0 + self._num_above, np.inf)
        return np.where(self._has_nan, np.nan, ranks)


def recall_at(ranks: Float[np.ndarray, " Q"], k: int) -> float:
    """Returns the share of queries whose best hit is among the first `k`, from 0 to 1."""
    return float(np.where(np.isnan(ranks), np.nan, ranks <= k).mean())


def precision_at(scores: Float[np.ndarray, "Q N"], hits: Bool[np.ndarray, "Q N"], k: int) -> float:
    """Returns the share of hits among the first `k` of N candidates, mean over queries.

    A `k` above N is cut to N. A NaN among the scores gives NaN.

    >>> precision_at(np.array([[0.9, 0.5, 0.1]]), np.array([[True, False, True]]), 2)
    0.5
    >>> precision_at(np.zeros((1, 3)), np.array([[True, False, True]]), 1)
    0.0
    """
    if np.isnan(scores).any():
        return float("nan")
    # The last key of lexsort is the primary one: by score, then False before True.
    order = np.lexsort((hits, -scores), axis=1)[:, :k]
    return float(np.take_along_axis(hits, order, axis=1).mean())


def chance_recall(num_hits: Int[np.ndarray, " Q"], num_candidates: int, k: int) -> float:
    """Returns the expected `recall_at(k)` of a random order of N candidates.

    *1 - C(N - h, k) / C(N, k)* for a query with h hits, mean over queries.

    >>> chance_recall(np.ones(4, int), 4, 1)
    0.25
    """
    return float(_chance_curve(num_hits, num_candidates)[min(k, num_candidates) - 1])


def chance_median_rank(num_hits: Int[np.ndarray, " Q"], num_candidates: int) -> float:
    """Returns the median rank of a random order: the first rank by which half of the queries hit.

    It is infinity if fewer than half of the queries have a hit.

    >>> chance_median_rank(np.ones(4, int), 4)
    2.0
    """
    curve = _chance_curve(num_hits, num_candidates)
    # 1e-9 absorbs the rounding of a product that is 1/2 in exact arithmetic.
    return float(np.argmax(curve >= 0.5 - 1e-9) + 1) if curve[-1] >= 0.5 else float("inf")


def _chance_curve(
    num_hits: Int[np.ndarray, " Q"], num_candidates: int
) -> Float[np.ndarray, " {num_candidates}"]:
    """Returns the probability of a hit among the first 1..N of a random order, mean over queries.

    The binomials cancel to a product over ranks r of *(N - h - r) / (N - r)*, the probability that
    rank r + 1 is wrong too.
    """
    # Queries with the same number of hits have the same curve.
    counts, num_queries = np.unique(num_hits, return_counts=True)
    ranks = np.arange(num_candidates)
    num_wrong = np.maximum(num_candidates - counts[:, None] - ranks, 0)
    miss = (num_wrong / (num_candidates - ranks)).cumprod(1)
    return num_queries @ (1 - miss) / len(num_hits)
