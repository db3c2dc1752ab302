"""Bootstrap intervals: coverage, whole rows, repeatability."""

import numpy as np
import pytest

from plan_jax.metrics import classification, intervals


def test_an_interval_covers_the_mean_as_often_as_its_level():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        low, high = intervals.bootstrap(random.normal(2, 1, 60), n=200, seed=seed)
        covered += low < 2 < high
    assert 85 <= covered <= 100


def test_rows_stay_together_and_a_seed_repeats():
    rows = np.stack([np.arange(20.0), np.arange(20.0)], 1)

    def largest_difference(sample):
        return float(abs(sample[:, 0] - sample[:, 1]).max())

    assert intervals.bootstrap(rows, largest_difference, n=50) == (0, 0)
    assert intervals.bootstrap(rows, n=50, seed=3) == intervals.bootstrap(rows, n=50, seed=3)
    assert intervals.bootstrap(rows, n=50, seed=3) != intervals.bootstrap(rows, n=50, seed=4)


def test_no_rows_have_no_interval():
    assert np.isnan(intervals.bootstrap(np.zeros(0))).all()


def test_a_paired_difference_needs_no_independent_noise():
    random = np.random.default_rng(0)
    noise = random.normal(size=200)
    first, second = (np.stack([noise + shift, np.ones(200)], 1)[..., None] for shift in (0.0, 0.1))
    low, high = intervals.bootstrap_difference(first, second)
    np.testing.assert_allclose((low, high), 0.1, atol=1e-9)
    other = np.stack([random.permutation(noise) + 0.1, np.ones(200)], 1)[..., None]
    low, high = intervals.bootstrap_difference(first, other)
    assert low < 0 < high


def test_an_interval_over_seeds_is_wider_than_one_over_images():
    first = np.stack([np.zeros(50), np.ones(50)], 1)[None, :, :, None].repeat(4, 0)
    second = first.copy()
    second[:, :, 0, 0] += np.array([0.0, 1, 2, 3])[:, None]
    low, high = intervals.bootstrap_difference_over_seeds(first, second)
    assert 0 <= low < 1 and 2 < high <= 3
    assert intervals.bootstrap_difference(first[0], second[2]) == (2, 2)


def test_means_are_over_groups_that_have_a_count():
    table = np.zeros((3, 2, 3))
    table[:, 0, 0], table[:, 1, 0] = [1, 2, 6], 1
    table[0, :, 1] = 4, 2
    assert intervals.compute_metric(table, "mean") == (3 + 2) / 2
    assert np.isnan(intervals.compute_metric(np.zeros((3, 2, 3)), "mean"))


def test_an_area_is_over_findings_with_both_labels():
    scores = np.array([[0.1, 5, 1], [0.4, 5, 2], [0.4, 5, 3], [0.8, 5, 9]])
    labels = np.array([[0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, -1]])
    table = np.stack([scores, labels], 1)
    assert intervals.compute_metric(table, "auroc") == (0.875 + 1) / 2
    assert np.isnan(intervals.compute_metric(table[:, :, 1:2], "auroc"))
    assert np.isnan(intervals.compute_metric(table[:, :, :0], "auroc"))
    table[1, 0, 0] = np.nan
    assert np.isnan(intervals.compute_metric(table, "auroc"))


def literal_mean(rows):
    pairs = [(rows[:, 0, f].sum(), rows[:, 1, f].sum()) for f in range(rows.shape[2])]
    return np.mean([total / count for total, count in pairs if count])


def literal_auroc(rows):
    areas = []
    for scores, labels in rows.transpose(2, 1, 0):
        positive = labels[labels >= 0] == 1
        if positive.any() and not positive.all():
            areas.append(classification.auroc(scores[labels >= 0], positive))
    return np.mean(areas) if areas else np.nan


@pytest.mark.parametrize(
    ("statistic", "literal"), [("mean", literal_mean), ("auroc", literal_auroc)]
)
@pytest.mark.parametrize("max_counts", [2**22, 40])
def test_counts_of_rows_give_the_interval_of_the_rows(statistic, literal, max_counts, monkeypatch):
    monkeypatch.setattr(intervals, "MAX_COUNTS", max_counts)
    random = np.random.default_rng(0)
    first, second = random.integers(-1, 2, (2, 13, 2, 4)).astype(float)
    if statistic == "mean":
        # Many groups are empty in some resamples, and the counts of others are below 1.
        first[:, 1] = random.integers(0, 3, (13, 4)) * (random.random((13, 4)) < 0.2) / 4
        first[:, 0] *= first[:, 1] > 0
        second[:, 0] *= first[:, 1] > 0
    else:
        first[0, 0] = -np.inf
    second[:, 1] = first[:, 1]
    result = intervals.bootstrap_metric(first, statistic, n=50, seed=2)
    np.testing.assert_allclose(result, intervals.bootstrap(first, literal, n=50, seed=2))
    draw = np.random.default_rng(2)
    chosen = [draw.integers(13, size=13) for _ in range(50)]
    np.testing.assert_allclose(
        result, np.quantile([literal(first[rows]) for rows in chosen], [0.025, 0.975])
    )
    differences = [literal(second[rows]) - literal(first[rows]) for rows in chosen]
    result = intervals.bootstrap_difference(first, second, statistic, n=50, seed=2)
    np.testing.assert_allclose(result, np.quantile(differences, [0.025, 0.975]), atol=1e-12)
    first[0, 0, 0], first[0, 1, 0] = np.nan, 1
    assert np.isnan(intervals.bootstrap_metric(first, statistic, n=50)).all()


def test_an_interval_over_seeds_is_that_of_a_loop():
    random, draw, draw_seeds = (np.random.default_rng(seed) for seed in (0, 5, [5, 1]))
    first, second = (
        np.stack([random.normal(size=(3, 11, 2)), np.ones((3, 11, 2))], 2) for _ in "ab"
    )
    differences = []
    for _ in range(40):
        rows, seeds = draw.integers(11, size=11), draw_seeds.integers(3, size=3)
        means = [[literal_mean(x[s][rows]) for s in seeds] for x in (first, second)]
        differences.append(np.mean(means[1]) - np.mean(means[0]))
    result = intervals.bootstrap_difference_over_seeds(first, second, n=40, seed=5)
    np.testing.assert_allclose(result, np.quantile(differences, [0.025, 0.975]))
