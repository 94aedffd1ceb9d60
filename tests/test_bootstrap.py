import numpy as np
import pytest

from bytelm.evaluation.bootstrap import Estimate, interval, resample


def test_each_replicate_draws_as_many_items_as_there_are():
    counts = resample(7, 50)
    assert counts.shape == (50, 7)
    assert (counts.sum(1) == 7).all()
    assert len({tuple(row) for row in counts.tolist()}) > 40


def test_draws_depend_on_the_seed_only():
    assert (resample(9, 20, 3) == resample(9, 20, 3)).all()
    assert (resample(9, 20, 3) != resample(9, 20, 4)).any()


def test_an_interval_leaves_out_a_fortieth_at_either_end():
    assert interval(np.arange(1001.0)) == pytest.approx((25, 975))
    assert Estimate(3.0, 2.0, 5.0).margin == 1.5


def test_intervals_of_a_mean_hold_it_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        values = generator.exponential(size=60)
        low, high = interval(resample(60, 400, seed) @ values / 60)
        hits += low <= 1 <= high
    assert 0.89 <= hits / 300 <= 0.98
