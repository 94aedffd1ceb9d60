"""Scores of tasks with intervals, and differences of models on the same documents.

A score is a function of a ratio of sums over documents, ``t(sum a / sum b)``: the mean of right
answers, a perplexity, bits per byte. Intervals are 95%: Wilson's where documents are right or
wrong, bootstrap ones over documents otherwise. Differences are paired: bootstrap intervals draw the
same documents for both models, and McNemar's exact test counts the documents that one model has
right and the other has wrong.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bytelm.errors import DataError
from bytelm.evaluation.bootstrap import REPLICATES, Estimate, Floats, interval

__all__ = [
    "AGGREGATIONS",
    "Difference",
    "Scores",
    "by_group",
    "difference",
    "mcnemar",
    "score",
    "wilson",
]

Z = 1.959963984540054
"""Quantile of the standard normal distribution at 97.5%."""

AGGREGATIONS: dict[str, Callable[[Floats], Floats]] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(-ratio),
    "weighted_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
}
"""The harness's aggregations, as functions of a ratio of sums over documents."""


class Scores(NamedTuple):
    """What one model has for each document, by one metric of a task."""

    task: str
    metric: str
    aggregation: str
    """One of :data:`AGGREGATIONS`."""
    values: Floats
    """Summed in the numerator: 1 for a right answer, or a log-likelihood."""
    weights: Floats
    """Summed in the denominator: 1 for each document, or its bytes or words."""
    documents: tuple[str, ...]
    """Which document each is; two models are compared if these are the same."""
    groups: tuple[str, ...] = ()
    """Part of the task that each document belongs to, such as a paradigm of BLiMP."""

    @property
    def is_binary(self) -> bool:
        """Whether every document is right or wrong."""
        return bool(np.isin(self.values, (0, 1)).all() and (self.weights == 1).all())


class Difference(NamedTuple):
    """The score of a model minus that of another on the same documents."""

    estimate: Estimate
    p: float | None
    """Of McNemar's exact test, two-sided; ``None`` if documents are not right or wrong."""


def score(scores: Scores) -> Estimate:
    """Return the score with its interval.

    Raises:
        DataError: there is no document.
    """
    if not len(scores.values):
        raise DataError(f"the task {scores.task} has no document: raise the limit")
    aggregate = AGGREGATIONS[scores.aggregation]
    value = float(aggregate(np.array(scores.values.sum() / scores.weights.sum())))
    if scores.aggregation == "mean" and scores.is_binary:
        return Estimate(value, *wilson(int(scores.values.sum()), len(scores.values)))
    values, weights = _replicates(scores.values, scores.weights)
    return Estimate(value, *interval(aggregate(values / weights)))


def difference(one: Scores, other: Scores) -> Difference:
    """Return the score of one model minus that of another.

    Raises:
        DataError: they answered other documents.
    """
    if one.documents != other.documents:
        raise DataError(f"two models answered other documents of {one.task}: evaluate both again")
    aggregate = AGGREGATIONS[one.aggregation]
    value = score(one).value - score(other).value
    a, b, c, d = _replicates(one.values, one.weights, other.values, other.weights)
    estimate = Estimate(value, *interval(aggregate(a / b) - aggregate(c / d)))
    if not (one.is_binary and other.is_binary):
        return Difference(estimate, None)
    only_one = int((one.values > other.values).sum())
    only_other = int((one.values < other.values).sum())
    return Difference(estimate, mcnemar(only_one, only_other))


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion.

    ``(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``

    Args:
        right: number of successes.
        total: number of trials.
    """
    p, shrunk = right / total, Z**2 / total
    middle = p + shrunk / 2
    half = Z * math.sqrt(p * (1 - p) / total + shrunk / total / 4)
    low, high = (middle - half) / (1 + shrunk), (middle + half) / (1 + shrunk)
    # Exact where rounding is not: the interval holds p, 0 and 1 included.
    return min(max(low, 0.0), p), max(min(high, 1.0), p)


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the two-sided p of McNemar's exact test.

    If neither model is better, each document on which they differ is a fair coin:
    ``min(1, 2 P(X <= min))`` with ``X ~ Binomial(only_one + only_other, 1/2)``.

    Args:
        only_one: documents that only one model has right.
        only_other: documents that only the other has right.
    """
    total = only_one + only_other

    def log_chance(k: int) -> float:
        ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        return ways - total * math.log(2)

    tail = math.fsum(math.exp(log_chance(k)) for k in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail)


def _replicates(*columns: Floats) -> list[Floats]:
    """Return the sums of columns over documents drawn with replacement, in each replicate.

    Documents with the same values are drawn together, as right and wrong answers are: drawing one
    of ``n`` documents is drawing one of the distinct rows, with its share as probability.
    """
    rows, counts = np.unique(np.stack(columns, 1), axis=0, return_counts=True)
    total = int(counts.sum())
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(total, counts / total, size=REPLICATES).astype(float)
    return list((drawn @ rows).T)


def by_group(scores: Scores) -> dict[str, Scores]:
    """Return the scores of each group of documents, in order of their names."""
    groups = np.array(scores.groups)
    found = {}
    for name in sorted(set(scores.groups)):
        chosen: Sequence[int] = np.flatnonzero(groups == name).tolist()
        found[name] = scores._replace(
            values=scores.values[chosen],
            weights=scores.weights[chosen],
            documents=tuple(scores.documents[i] for i in chosen),
            groups=(),
        )
    return found
