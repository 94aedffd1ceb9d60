"""Intervals and paired differences of scores."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.errors import DataError
from bytelm.evaluation.scores import Scores, by_group, difference, mcnemar, score, wilson


def scores(values, weights=None, aggregation="mean", documents=None, groups=()):
    values = np.array(values, float)
    weights = np.ones(len(values)) if weights is None else np.array(weights, float)
    names = documents or tuple(map(str, range(len(values))))
    return Scores("task", "metric", aggregation, values, weights, names, groups)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_are_the_proportions_from_which_the_observed_one_is_as_far(case):
    right, total = case
    low, high = wilson(right, total)
    assert 0 <= low <= right / total <= high <= 1
    for end in (low, high):
        # The score test: |p - end| = z sqrt(end (1 - end) / n); at 0 and 1 both sides are 0.
        error = 1.959963984540054 * math.sqrt(end * (1 - end) / total)
        assert abs(right / total - end) == pytest.approx(error, abs=1e-6)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(one, other):
    total, fewer = one + other, min(one, other)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail / 2**total))
    assert mcnemar(one, other) == mcnemar(other, one)


def test_mcnemar_of_many_documents():
    # Nearly normal, with a correction of one half for continuity.
    z = (2500 - 2350.5) / math.sqrt(5000 / 4)
    assert mcnemar(2350, 2650) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)
    assert mcnemar(0, 20_000) == 0.0


def test_scores_of_each_aggregation():
    assert score(scores([1, 0, 1, 1])).value == 0.75
    nats = [-1.0, -2.0, -6.0]
    assert score(scores(nats, None, "perplexity")).value == pytest.approx(math.exp(3))
    bits = score(scores(nats, [2, 3, 4], "bits_per_byte")).value
    assert bits == pytest.approx(1 / math.log(2))
    assert score(scores(nats, [1, 1, 1], "weighted_perplexity")).value == pytest.approx(math.exp(3))
    with pytest.raises(DataError, match="no document"):
        score(scores([]))


def test_bootstrap_of_right_answers_agrees_with_its_formula():
    values = np.arange(400) % 4 == 0
    other = np.arange(400) % 5 == 0
    found = difference(scores(values), scores(other))
    spread = np.std(values.astype(float) - other) / math.sqrt(400)
    assert found.estimate.value == pytest.approx(0.05)
    assert found.estimate.low == pytest.approx(0.05 - 1.96 * spread, abs=0.008)
    assert found.estimate.high == pytest.approx(0.05 + 1.96 * spread, abs=0.008)
    assert found.p == mcnemar(int((values & ~other).sum()), int((other & ~values).sum()))


def test_what_documents_do_to_both_models_does_not_count():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 10, 500)
    one, other = scores(hard - 3, None, "perplexity"), scores(hard - 3.1, None, "perplexity")
    found = difference(one, other)
    assert found.p is None
    assert found.estimate.low < found.estimate.value < found.estimate.high < 0
    same = difference(one, one)
    assert same.estimate == (0, 0, 0)


def test_other_documents_are_refused():
    with pytest.raises(DataError, match="other documents"):
        difference(scores([1, 0]), scores([1, 0], documents=("0", "2")))


def test_groups():
    found = by_group(scores([1, 0, 1, 1], groups=("b", "a", "b", "a")))
    assert {name: list(one.values) for name, one in found.items()} == {"a": [0, 1], "b": [1, 1]}
    assert found["a"].documents == ("1", "3")
