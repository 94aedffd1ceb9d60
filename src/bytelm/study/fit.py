"""Power laws with confidence intervals, and their crossovers.

::

    bpb(x) = E + A x ** -alpha          x: training FLOPs, or training bytes

With fewer than five budgets ``E`` and ``alpha`` cannot both be estimated, and ``E`` is 0: the law
is a straight line in logarithms, valid between the budgets and not beyond. Intervals are 95% of
bootstrap replicates. Each replicate resamples the held-out documents within each source, in the
same way for all runs, so that what two runs have in common does not count as a difference. It also
adds the noise of a seed to each run, with the spread between seeds of one configuration; the noise
is Student's t because that spread is an estimate. The mix of sources is part of the question and
stays.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytelm.errors import DataError
from bytelm.study.table import Results, budget

REPLICATES = 1000
MIN_POINTS_FOR_FLOOR = 5
MAX_T = 30.0
SAME = 0.1
"""Relative difference up to which two runs count as having spent the same."""
MIN_SHARE = 0.975
"""Share of replicates that must agree on the sign of a difference for it to be stated."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """``floor + exp(log_scale) x ** -exponent``."""

    floor: float
    log_scale: float
    exponent: float

    def __call__(self, x: Floats) -> Floats:
        """Return the bits per byte at ``x``."""
        return self.floor + np.exp(self.log_scale - self.exponent * np.log(x))


@dataclass(frozen=True)
class Curve:
    """Points of a family, the power law through them, and the law's replicates."""

    name: str
    budgets: Floats
    """Planned budgets, ascending."""
    x: Floats
    """FLOPs or bytes that were spent at each budget."""
    bpb: Floats
    """Bits per byte at each budget, as the mean over seeds."""
    drawn: Floats
    """Replicates of ``bpb``, ``[replicate, budget]``."""
    law: PowerLaw | None
    """``None`` for fewer than two budgets."""
    replicates: tuple[PowerLaw, ...]

    @property
    def low(self) -> Floats:
        """Lower ends of the 95% intervals of ``bpb``."""
        return np.quantile(self.drawn, 0.025, axis=0)

    @property
    def high(self) -> Floats:
        """Upper ends of the 95% intervals of ``bpb``."""
        return np.quantile(self.drawn, 0.975, axis=0)

    def minus(self, other: "Curve") -> tuple[Floats, Floats, Floats, Floats]:
        """Return the differences from another curve at the budgets that both have.

        Returns:
            ``x`` of the other curve, the differences, and the ends of their 95% intervals. These
            are narrower than the intervals of the curves, since both are measured on the same
            documents.
        """
        shared = np.intersect1d(self.budgets, other.budgets)
        mine, others = self.at(shared), other.at(shared)
        low, high = np.quantile(mine.drawn - others.drawn, (0.025, 0.975), axis=0)
        return others.x, mine.bpb - others.bpb, low, high

    def at(self, budgets: Floats) -> "Curve":
        """Return the curve through some of the budgets alone."""
        kept = np.isin(self.budgets, budgets)
        return through(
            self.name, self.budgets[kept], self.x[kept], self.bpb[kept], self.drawn[:, kept]
        )

    def exponent_interval(self) -> tuple[float, float]:
        """Return the 95% interval of the exponent."""
        return _interval([law.exponent for law in self.replicates])

    def band(self, x: Floats) -> tuple[Floats, Floats]:
        """Return the 95% interval of the law at each ``x``."""
        curves = np.array([law(x) for law in self.replicates])
        low, high = np.quantile(curves, (0.025, 0.975), axis=0)
        return low, high


@dataclass(frozen=True)
class Crossover:
    """Where a curve crosses the baseline, or why that cannot be stated."""

    name: str
    baseline: str
    x: float | None
    low: float | None
    high: float | None
    verdict: str
    """Statement for the page."""


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
        generator = np.random.default_rng(seed)
        self.bpb = results.bits_per_byte(np.ones(len(results.num_bytes)))
        self.seed_noise, freedom = seed_spread(results, self.bpb)
        weights = _draws(results, replicates, generator)
        resampled = np.array([results.bits_per_byte(draw) for draw in weights])
        noise = generator.standard_t(max(freedom, 1), resampled.shape)
        # With a single pair of seeds the tails of t are so long that figures could not show them.
        self.replicates = resampled * np.exp(self.seed_noise * noise.clip(-MAX_T, MAX_T))
        """``[replicate, run]``."""

    def interval(self, row: int, baseline: Sequence[int] = ()) -> tuple[float, float]:
        """Return the 95% interval of a run's bits per byte, or of a difference.

        Args:
            row: the run.
            baseline: runs whose mean is subtracted. All are resampled alike, so the interval of the
                difference is narrower than the intervals of both suggest.
        """
        values = self.replicates[:, row]
        if baseline:
            values = values - self.replicates[:, list(baseline)].mean(1)
        low, high = np.quantile(values, (0.025, 0.975))
        return float(low), float(high)

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
            each = [self.replicates[:, list(rows)].mean(1) for rows in sizes]
            drawn.append(np.min(each, axis=0))
        order = np.argsort(x)
        planned, at = np.array(planned, float)[order], np.array(x, float)[order]
        return through(name, planned, at, np.array(means)[order], np.stack(drawn, 1)[:, order])


def through(name: str, budgets: Floats, x: Floats, bpb: Floats, drawn: Floats) -> Curve:
    """Return the curve through some points, with a law for them and for each replicate."""
    if len(x) < 2:
        return Curve(name, budgets, x, bpb, drawn, None, ())
    laws = tuple(fit_power_law(x, y) for y in drawn)
    return Curve(name, budgets, x, bpb, drawn, fit_power_law(x, bpb), laws)


def _draws(results: Results, replicates: int, generator: np.random.Generator) -> Floats:
    """Return the weight of each document in each replicate, ``[replicate, document]``.

    Documents are resampled within their source, whose total number of bytes stays.
    """
    weights = np.zeros((replicates, len(results.num_bytes)))
    sources = np.array(results.sources)
    for source in sorted(set(results.sources)):
        at = np.flatnonzero(sources == source)
        drawn = generator.multinomial(len(at), np.full(len(at), 1 / len(at)), size=replicates)
        num_bytes = results.num_bytes[at]
        weights[:, at] = drawn * (num_bytes.sum() / (drawn @ num_bytes))[:, None]
    return weights


def seed_spread(results: Results, bpb: Floats) -> tuple[float, int]:
    """Estimate the relative deviation between seeds, pooled over all configurations with several.

    Returns:
        The standard deviation of the logarithm of bits per byte, and its degrees of freedom; both
        are 0 if no configuration has two seeds.
    """
    groups: dict[tuple, list[float]] = defaultdict(list)
    for row, value in zip(results.rows, bpb, strict=True):
        key = (row["family"], row["size"], row["budget_flops"], row["budget_bytes"])
        groups[(*key, row["settings"])].append(math.log(value))
    several = [values for values in groups.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum(float(np.var(values)) * len(values) for values in several)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def fit_power_law(x: Floats, y: Floats) -> PowerLaw:
    """Fit a power law by least squares in logarithms, and its floor by search.

    Args:
        x: budgets, at least two; with fewer than :data:`MIN_POINTS_FOR_FLOOR` the floor is 0.
        y: bits per byte at each budget, above 0.
    """
    if len(x) < MIN_POINTS_FOR_FLOOR:
        return _fit_line(x, y, 0.0)
    floors = float(y.min()) * np.linspace(0, 0.98, 50)
    laws = [_fit_line(x, y, float(floor)) for floor in floors]
    errors = [float(np.square(np.log(law(x) / y)).sum()) for law in laws]
    return laws[int(np.argmin(errors))]


def _fit_line(x: Floats, y: Floats, floor: float) -> PowerLaw:
    slope, intercept = np.polyfit(np.log(x), np.log(y - floor), 1)
    return PowerLaw(floor, float(intercept), -float(slope))


def find_crossover(curve: Curve, baseline: Curve) -> Crossover:
    """Find where a curve crosses the baseline, if the runs bracket it.

    Only budgets that both were run at count, and nothing is extrapolated. A crossover is stated if

    - the runs at the first and the last of these budgets lie on different sides of the baseline, in
      :data:`MIN_SHARE` of the replicates, and
    - the laws fitted to these budgets cross in between, as do both ends of the 95% interval of the
      replicates' crossings.

    For example, these differences from the baseline, with their 95% intervals::

        budget        1e12                    5e12                     3e13
        difference    0.20 [0.15, 0.25]       0.05 [-0.02, 0.09]      -0.10 [-0.14, -0.06]

    are a crossover between 5e12 and 3e13, "below from there on".
    """

    def result(verdict: str, *values: float | None) -> Crossover:
        x, low, high = values or (None, None, None)
        return Crossover(curve.name, baseline.name, x, low, high, verdict)

    shared = np.intersect1d(curve.budgets, baseline.budgets)
    curve, baseline = curve.at(shared), baseline.at(shared)
    if curve.law is None or baseline.law is None:
        return result("not fitted: they share fewer than two budgets")
    first = max(curve.x[0], baseline.x[0])
    last = min(curve.x[-1], baseline.x[-1])
    if first >= last:
        return result("not compared: what they spent of those budgets does not overlap")
    grid = np.geomspace(first, last, 2001)
    differences = np.array(
        [a(grid) - b(grid) for a, b in zip(curve.replicates, baseline.replicates, strict=True)]
    )
    # Budgets in FLOPs may be compared along training bytes: runs at one budget then differ in x.
    is_same_x = np.allclose(curve.x, baseline.x, rtol=SAME)
    runs = curve.drawn - baseline.drawn if is_same_x else differences[:, [0, -1]]
    below, above = (runs < 0).mean(0), (runs > 0).mean(0)
    for share, word in ((below, "below"), (above, "above")):
        if (share >= MIN_SHARE).all():
            return result(f"{word} at all budgets that both were run at")
    found = _crossing(grid, curve.law(grid) - baseline.law(grid))
    sides = (above, below) if found is not None and found > 0 else (below, above)
    if found is not None and min(sides[0][0], sides[1][-1]) >= MIN_SHARE:
        crossings = [_span(d, _crossing(grid, d), found > 0) for d in differences]
        low = float(np.quantile([low for low, _ in crossings], 0.025, method="lower"))
        high = float(np.quantile([high for _, high in crossings], 0.975, method="higher"))
        if low > 0 and high < math.inf:
            word = "from there on" if found > 0 else "up to there"
            return result(f"below {word}", abs(found), low, high)
    shares = ", ".join(f"{share:.1%} at {x:.2g}" for x, share in zip(curve.x, below, strict=True))
    return result(f"cannot be bounded by the runs; share of replicates that are below: {shares}")


def _span(difference: Floats, crossing: float | None, is_down: bool) -> tuple[float, float]:
    """Return the bounds between which a replicate crosses in a direction.

    A crossing below the grid is at 0, one above it at infinity; (0, infinity) says that it may be
    anywhere::

        difference on the grid    is_down    bounds
        +  +  -  -                True       both are where the sign changes
        -  -  -  -                True       (0, 0): it is below already
        +  +  +  +                True       (inf, inf): it is not below yet
        -  -  +  +                True       (0, inf): it crosses the other way
    """
    if crossing is not None and (crossing > 0) == is_down:
        return abs(crossing), abs(crossing)
    if (difference < 0).all():
        return (0.0, 0.0) if is_down else (math.inf, math.inf)
    if (difference > 0).all():
        return (math.inf, math.inf) if is_down else (0.0, 0.0)
    return 0.0, math.inf


def _crossing(grid: Floats, difference: Floats) -> float | None:
    """Return where a difference changes its sign, if it does so exactly once.

    The result is negative if the difference turns positive there: it is -20 for the differences
    [-2, -1, 1, 2] on the grid [5, 10, 40, 80], and 20 for [2, 1, -1, -2].
    """
    changes = np.flatnonzero(np.diff(np.sign(difference)))
    if len(changes) != 1:
        return None
    at = int(changes[0])
    a, b = difference[at], difference[at + 1]
    t = a / (a - b)
    x = float(np.exp(np.log(grid[at]) * (1 - t) + np.log(grid[at + 1]) * t))
    return x if b < 0 else -x


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(np.array(values), (0.025, 0.975))
    return float(low), float(high)
