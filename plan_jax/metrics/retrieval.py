"""Ranks of hits among candidates, and the recall and median rank of a random order."""

import numpy as np
from jaxtyping import Bool, Float


def hit_ranks(
    scores: Float[np.ndarray, "Q N"], hits: Bool[np.ndarray, "Q N"]
) -> Float[np.ndarray, " Q"]:
    """Find the rank (1 = first) of each query's best hit among N candidates.

    Ties count against the model: a wrong candidate with the same score stands before the hit. A
    query without a hit has rank infinity, one with NaN among its scores rank NaN.

    >>> hit_ranks(np.array([[0.1, 0.9, 0.5]]), np.array([[False, False, True]])).tolist()
    [2.0]
    """
    best = np.where(hits, scores, -np.inf).max(1, keepdims=True)
    ranks = 1.0 + (~hits & (scores >= best)).sum(1)
    ranks = np.where(hits.any(1), ranks, np.inf)
    return np.where(np.isnan(scores).any(1), np.nan, ranks)


def recall_at(ranks: Float[np.ndarray, " Q"], k: int) -> float:
    """Give the share of queries whose best hit is among the first `k`: 0 to 1."""
    return float(np.where(np.isnan(ranks), np.nan, ranks <= k).mean())


def chance_recall(hits: Bool[np.ndarray, "Q N"], k: int) -> float:
    """Give the expected `recall_at(k)` of a random order.

    *1 - C(N - h, k) / C(N, k)* for a query with h hits among N, averaged over queries.

    >>> chance_recall(np.eye(4, dtype=bool), 1)
    0.25
    """
    return float(_chance_curve(hits)[min(k, hits.shape[1]) - 1])


def chance_median_rank(hits: Bool[np.ndarray, "Q N"]) -> float:
    """Give the median rank of a random order: the first rank by which half of the queries hit.

    >>> chance_median_rank(np.eye(4, dtype=bool))
    2.0
    """
    curve = _chance_curve(hits)
    return float(np.argmax(curve >= 0.5 - 1e-9) + 1) if curve[-1] >= 0.5 else float("inf")


def _chance_curve(hits: Bool[np.ndarray, "Q N"]) -> Float[np.ndarray, " N"]:
    """Give the chance of a hit among the first 1..N of a random order, averaged over queries."""
    number = hits.shape[1]
    right, queries = np.unique(hits.sum(1), return_counts=True)
    drawn = np.arange(number)
    left = np.maximum(number - right[:, None] - drawn, 0) / (number - drawn)
    return queries @ (1 - left.cumprod(1)) / len(hits)
