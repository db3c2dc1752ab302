"""Ranked retrieval: ranks, recall and precision against literal loops; chance against sampling."""

import math

import numpy as np
import pytest

from plan_jax.metrics import retrieval as retrieval_metrics


def test_ranks_and_recall_by_hand():
    scores = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.5, 0.5, 0.5], [0.0, 0.0, np.nan]])
    hits = np.array([[0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 0]], bool)
    ranks = retrieval_metrics.hit_ranks(scores, hits)
    np.testing.assert_array_equal(ranks, [3, 2, 3, np.nan])
    assert retrieval_metrics.recall_at(ranks[:3], 1) == 0
    assert retrieval_metrics.recall_at(ranks[:3], 2) == pytest.approx(1 / 3)
    assert retrieval_metrics.recall_at(ranks[:3], 3) == 1
    assert math.isnan(retrieval_metrics.recall_at(ranks, 3))
    assert retrieval_metrics.hit_ranks(scores[:1], np.zeros((1, 3), bool))[0] == np.inf


def test_ranks_are_those_of_a_sorted_list():
    random = np.random.default_rng(3)
    scores, hits = random.normal(size=(20, 15)), random.random((20, 15)) < 0.2
    hits[:, 4] = True
    ranks = retrieval_metrics.hit_ranks(scores, hits)
    for row, row_hits, rank in zip(scores, hits, ranks, strict=True):
        order = sorted(range(15), key=lambda j, row=row: -row[j])
        num_wrong_before = next(n for n, j in enumerate(order) if row_hits[j])
        assert rank == num_wrong_before + 1


def test_precision_is_that_of_a_literal_loop_and_ties_count_against_the_model():
    random = np.random.default_rng(0)
    for k in (1, 3, 7, 20):
        scores = random.integers(0, 4, (12, 9)).astype(np.float32)
        hits = random.random((12, 9)) < 0.4
        shares = []
        for row, row_hits in zip(scores.tolist(), hits.tolist(), strict=True):
            order = sorted(range(9), key=lambda j, s=row, right=row_hits: (-s[j], right[j]))
            shares.append(sum(row_hits[j] for j in order[:k]) / len(order[:k]))
        assert retrieval_metrics.precision_at(scores, hits, k) == pytest.approx(np.mean(shares))
    assert np.isnan(retrieval_metrics.precision_at(np.float32([[1, np.nan]]), hits[:1, :2], 1))


def test_chance_is_what_random_orders_reach():
    label = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    hits = label[:, None] == label[None]
    random = np.random.default_rng(0)
    ranks = np.concatenate(
        [retrieval_metrics.hit_ranks(random.random(hits.shape), hits) for _ in range(800)]
    )
    for k in (1, 3, 5, 12, 50):
        expected = pytest.approx((ranks <= k).mean(), abs=0.015)
        assert retrieval_metrics.chance_recall(hits.sum(1), 12, k) == expected
    assert retrieval_metrics.chance_median_rank(hits.sum(1), 12) == np.median(ranks)
    by_hand = (3 * (1 - 9 * 8 / (12 * 11)) + 2 * (1 - 10 * 9 / (12 * 11)) + 7 * 2 / 12) / 12
    assert retrieval_metrics.chance_recall(hits.sum(1), 12, 2) == pytest.approx(by_hand)


def test_the_median_rank_of_chance_is_infinite_if_half_of_the_queries_have_no_hit():
    hits = np.zeros((5, 4), bool)
    hits[:2, 0] = True
    assert retrieval_metrics.chance_median_rank(hits.sum(1), 4) == np.inf
