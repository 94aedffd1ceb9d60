"""Intervals of runs and of their differences: documents resampled, seeds paired.

Each replicate resamples the held-out documents within each source, in the same way for all runs, so
that what two runs have in common does not count as a difference; the mix of sources is part of the
question and stays. It also adds the noise of seeds. Runs of one seed and budget read the same text
in the same order, so that noise has a part that they share::

    log bpb(run) = configuration + shared(seed, budget) + own(run)

Differences are those of runs with the same seed, where the shared part cancels. Both parts are
estimated from the configurations with several seeds, and drawn from Student's t, because an
estimate from a few runs is itself uncertain.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from bytelm.errors import DataError
from bytelm.evaluation.bootstrap import REPLICATES, Floats, interval, resample
from bytelm.study.fit import Curve, through
from bytelm.study.table import Results, budget

MAX_T = 30.0
MIN_FREEDOM = 4
"""Degrees of freedom from which the runs of a comparison give their own estimate of noise."""


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviations between seeds, of the logarithm of bits per byte."""

    total: float
    """Between the seeds of one configuration; 0 if none has several."""
    own: float
    """The part that differs between configurations; ``total`` if it cannot be separated."""
    freedom: int
    """Degrees of freedom of ``total``."""
    own_freedom: int
    """Degrees of freedom of ``own``; 0 if it cannot be separated."""

    @property
    def shared(self) -> float:
        """The part that runs of one seed and budget have in common."""
        return math.sqrt(max(self.total**2 - self.own**2, 0.0))


@dataclass(frozen=True)
class Difference:
    """Bits per byte of a member minus those of the baseline, at one budget."""

    name: str
    baseline: str
    budget: float
    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""
    seeds: int
    """Seeds that both have, over which the difference is the mean; 0 if they share none, so that
    the difference is that of the means of all seeds."""


class Bootstrap:
    """Replicates of every run's bits per byte.

    Args:
        results: results of a study.
        replicates: number of replicates.
        seed: seed of the resampling.

    Raises:
        DataError: there is no run.
    """

    def __init__(self, results: Results, replicates: int = REPLICATES, seed: int = 0) -> None:
        if not results.rows:
            raise DataError("the table holds no run that was trained to its end")
        self.results = results
        self.bpb = results.bits_per_byte(np.ones(len(results.num_bytes)))
        self._seed = seed
        weights = _draws(results, replicates, np.random.default_rng(seed))
        self._resampled = np.array([results.bits_per_byte(draw) for draw in weights])
        self.noise = seed_noise(results.rows, self.bpb)
        self.replicates = self._with_noise()
        """``[replicate, run]``."""

    def among(self, rows: Sequence[int]) -> "Bootstrap":
        """Return the replicates with the noise of seeds that these runs have.

        Runs of similar models react to a seed alike, so their differences are less noisy than those
        of all runs. If the runs are too few to tell, the noise of all runs is kept.
        """
        noise = seed_noise([self.results.rows[row] for row in rows], self.bpb[list(rows)])
        if noise.own_freedom < MIN_FREEDOM:
            return self
        other = copy(self)
        other.noise = noise
        other.replicates = other._with_noise()
        return other

    def interval(self, row: int) -> tuple[float, float]:
        """Return the 95% interval of a run's bits per byte."""
        return interval(self.replicates[:, row])

    def difference(
        self,
        sizes: Sequence[Sequence[int]],
        baseline: Sequence[Sequence[int]],
        names: tuple[str, str] = ("", ""),
    ) -> Difference:
        """Return the difference of two members at one budget, each with its best size.

        Args:
            sizes: runs of the member, by size and seed.
            baseline: runs of the baseline at the same budget, likewise.
            names: names of the two.
        """
        seeds = set.intersection(
            *({self.results.rows[row]["seed"] for row in rows} for rows in (*sizes, *baseline))
        )
        mine, base = self._of_seeds(sizes, seeds), self._of_seeds(baseline, seeds)
        value = _best(self.bpb[None], mine) - _best(self.bpb[None], base)
        drawn = _best(self.replicates, mine) - _best(self.replicates, base)
        planned = budget(self.results.rows[sizes[0][0]])
        return Difference(*names, planned, float(value[0]), *interval(drawn), len(seeds))

    def curve(self, name: str, budgets: Sequence[Sequence[Sequence[int]]], axis: str) -> Curve:
        """Return the curve through some runs: at each budget the best size, as the mean over seeds.

        Each replicate chooses the best size for itself; otherwise the intervals of a family with
        several sizes would be too narrow.

        Args:
            name: name of the curve.
            budgets: rows of the table by budget, size and seed.
            axis: column of the table that is ``x``.
        """
        means, drawn, x, planned = [], [], [], []
        for sizes in budgets:
            by_size = np.array([self.bpb[list(rows)].mean() for rows in sizes])
            means.append(by_size.min())
            best = list(sizes[int(by_size.argmin())])
            x.append(np.mean([self.results.rows[row][axis] for row in best]))
            planned.append(budget(self.results.rows[best[0]]))
            drawn.append(_best(self.replicates, sizes))
        order = np.argsort(x)
        planned, at = np.array(planned, float)[order], np.array(x, float)[order]
        return through(name, planned, at, np.array(means)[order], np.stack(drawn, 1)[:, order])

    def _of_seeds(self, sizes: Sequence[Sequence[int]], seeds: set[int]) -> list[list[int]]:
        rows = self.results.rows
        return [[n for n in size if not seeds or rows[n]["seed"] in seeds] for size in sizes]

    def _with_noise(self) -> Floats:
        noise, blocks = self.noise, [_block(row) for row in self.results.rows]
        generator = np.random.default_rng([self._seed, 1])
        shape = self._resampled.shape
        # With a single pair of seeds the tails of t are so long that figures could not show them.
        total = generator.standard_t(max(noise.freedom, 1), shape).clip(-MAX_T, MAX_T)
        own = generator.standard_t(max(noise.own_freedom or noise.freedom, 1), shape)
        first = [blocks.index(block) for block in blocks]
        spread = noise.shared * total[:, first] + noise.own * own.clip(-MAX_T, MAX_T)
        return self._resampled * np.exp(spread)


def seed_noise(rows: Sequence[dict[str, Any]], bpb: Floats) -> SeedNoise:
    """Estimate the noise of seeds, pooled over all configurations with several.

    The own part is the residual after a mean for each configuration and one for each seed of a
    budget. For example, with two configurations and two seeds of one budget::

        log bpb     seed 0    seed 1        total: both differ by 0.02 between seeds
        a           0.90      0.92          own:   0, as they differ alike
        b           0.70      0.72
    """
    values = np.log(bpb)
    configurations = _indicators([_configuration(row) for row in rows])
    both = np.hstack([configurations, _indicators([_block(row) for row in rows])])
    total, freedom = _residual(configurations, values)
    own, own_freedom = _residual(both, values)
    if not own_freedom:
        return SeedNoise(total, total, freedom, 0)
    return SeedNoise(total, own, freedom, own_freedom)


def _residual(columns: Floats, values: Floats) -> tuple[float, int]:
    """Return the standard deviation of the residuals of least squares, and its freedom."""
    found, _, rank, _ = np.linalg.lstsq(columns, values, rcond=None)
    freedom = len(values) - int(rank)
    if not freedom:
        return 0.0, 0
    return math.sqrt(float(np.square(values - columns @ found).sum()) / freedom), freedom


def _indicators(keys: Sequence[tuple[object, ...]]) -> Floats:
    """Return a column of zeros and ones for each distinct key."""
    numbers: dict[tuple[object, ...], int] = defaultdict(lambda: len(numbers))
    return np.eye(len(set(keys)))[[numbers[key] for key in keys]]


def _configuration(row: dict[str, Any]) -> tuple[object, ...]:
    return (row["family"], row["size"], row["budget_flops"], row["budget_bytes"], row["settings"])


def _block(row: dict[str, Any]) -> tuple[object, ...]:
    return (row["budget_flops"], row["budget_bytes"], row["seed"])


def _best(values: Floats, sizes: Sequence[Sequence[int]]) -> Floats:
    """Return the lowest mean over seeds of any size, ``[replicate]``."""
    return np.min([values[:, list(rows)].mean(1) for rows in sizes], axis=0)


def _draws(results: Results, replicates: int, generator: np.random.Generator) -> Floats:
    """Return the weight of each document in each replicate, ``[replicate, document]``.

    Documents are resampled within their source, whose total number of bytes stays.
    """
    weights = np.zeros((replicates, len(results.num_bytes)))
    sources = np.array(results.sources)
    for source in sorted(set(results.sources)):
        at = np.flatnonzero(sources == source)
        drawn = resample(len(at), replicates, generator)
        num_bytes = results.num_bytes[at]
        weights[:, at] = drawn * (num_bytes.sum() / (drawn @ num_bytes))[:, None]
    return weights
