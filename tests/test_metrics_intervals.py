"""Bootstrap intervals: coverage, whole rows, repeatability."""

import numpy as np

from plan_jax.metrics import intervals


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
    assert intervals.macro_mean(table) == (3 + 2) / 2
    assert np.isnan(intervals.macro_mean(np.zeros((3, 2, 3))))


def test_an_area_is_over_findings_with_both_labels():
    scores = np.array([[0.1, 5, 1], [0.4, 5, 2], [0.4, 5, 3], [0.8, 5, 9]])
    labels = np.array([[0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, -1]])
    table = np.stack([scores, labels], 1)
    assert intervals.macro_auroc(table) == (0.875 + 1) / 2
    assert np.isnan(intervals.macro_auroc(table[:, :, 1:2]))
