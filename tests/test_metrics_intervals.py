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
