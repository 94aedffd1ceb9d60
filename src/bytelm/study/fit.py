"""Power laws with intervals, and where they cross.

::

    bpb(x) = E + A x ** -alpha          x: training FLOPs, or training bytes

With fewer than five budgets ``E`` cannot be told from ``alpha`` and is 0: a straight line in
logarithms, good between the budgets and not beyond. Intervals are 95% of bootstrap replicates,
each of which draws the held-out documents of every source anew (the same draw for every run, so
that what two runs have in common does not count as their difference) and adds to every run the
noise of its seed, of the spread seen between seeds of one configuration: Student's t, since that
spread is an estimate. The mix of sources is part of the question and is not drawn.
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
"""How far what was spent of one budget may differ between runs that are beside each other."""
MIN_SHARE = 0.975
"""Share of replicates that must agree on a side for it to be stated."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """``floor + exp(log_scale) x ** -exponent``."""

    floor: float
    log_scale: float
    exponent: float

    def __call__(self, x: Floats) -> Floats:
        """Bits per byte."""
        return self.floor + np.exp(self.log_scale - self.exponent * np.log(x))


@dataclass(frozen=True)
class Curve:
    """A family's points, its law, and the law's replicates."""

    name: str
    budgets: Floats
    """As planned, ascending."""
    x: Floats
    """What was spent of each."""
    bpb: Floats
    """At each, the mean over seeds."""
    drawn: Floats
    """Its replicates, ``[replicate, budget]``."""
    law: PowerLaw | None
    """``None`` for fewer than two budgets."""
    replicates: tuple[PowerLaw, ...]

    @property
    def low(self) -> Floats:
        """Where the 95% of each budget begin."""
        return np.quantile(self.drawn, 0.025, axis=0)

    @property
    def high(self) -> Floats:
        """Where the 95% of each budget end."""
        return np.quantile(self.drawn, 0.975, axis=0)

    def minus(self, other: "Curve") -> tuple[Floats, Floats, Floats, Floats]:
        """Differences at shared budgets: where the other is, how large, and their 95%.

        Narrower than those of the curves, since both are measured on the same documents.
        """
        shared = np.intersect1d(self.budgets, other.budgets)
        mine, others = self.at(shared), other.at(shared)
        low, high = np.quantile(mine.drawn - others.drawn, (0.025, 0.975), axis=0)
        return others.x, mine.bpb - others.bpb, low, high

    def at(self, budgets: Floats) -> "Curve":
        """The curve through some of its budgets alone."""
        kept = np.isin(self.budgets, budgets)
        return through(
            self.name, self.budgets[kept], self.x[kept], self.bpb[kept], self.drawn[:, kept]
        )

    def exponent_interval(self) -> tuple[float, float]:
        """95% of the replicates' exponents."""
        return _interval([law.exponent for law in self.replicates])

    def band(self, x: Floats) -> tuple[Floats, Floats]:
        """95% of the replicates' curves."""
        curves = np.array([law(x) for law in self.replicates])
        low, high = np.quantile(curves, (0.025, 0.975), axis=0)
        return low, high


@dataclass(frozen=True)
class Crossover:
    """Where one curve begins to lie below another, or why that cannot be said."""

    name: str
    baseline: str
    x: float | None
    low: float | None
    high: float | None
    verdict: str
    """For people: what is known."""


class Bootstrap:
    """Replicates of every run's bits per byte.

    Args:
        results: of a study.
        replicates: how many.
        seed: of the draws.

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
        # With a single pair of seeds the tails of t are so long that nothing could be drawn.
        self.replicates = resampled * np.exp(self.seed_noise * noise.clip(-MAX_T, MAX_T))
        """``[replicate, run]``."""

    def interval(self, row: int, beside: Sequence[int] = ()) -> tuple[float, float]:
        """95% of a run's bits per byte, or of its difference from the mean of some others.

        Documents are drawn alike for both, so the interval of a difference is narrower than what
        two intervals suggest.
        """
        values = self.replicates[:, row]
        if beside:
            values = values - self.replicates[:, list(beside)].mean(1)
        low, high = np.quantile(values, (0.025, 0.975))
        return float(low), float(high)

    def curve(self, name: str, budgets: Sequence[Sequence[Sequence[int]]], axis: str) -> Curve:
        """The curve through some runs: at each budget the best size, each the mean of its seeds.

        The choice of a size is made anew in every replicate, or a family with more sizes would seem
        surer than it is.

        Args:
            name: of the curve.
            budgets: rows of the table by budget, size and seed.
            axis: the column that goes along.
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
    """The curve through some points, and its replicates."""
    if len(x) < 2:
        return Curve(name, budgets, x, bpb, drawn, None, ())
    laws = tuple(fit_power_law(x, y) for y in drawn)
    return Curve(name, budgets, x, bpb, drawn, fit_power_law(x, bpb), laws)


def _draws(results: Results, replicates: int, generator: np.random.Generator) -> Floats:
    """How often each document counts, ``[replicate, document]``.

    Documents are drawn within their source, which keeps the bytes that it has in all.
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
    """Relative deviation between seeds of one configuration, pooled over all that have several.

    Returns:
        The standard deviation of the logarithm of bits per byte, and its degrees of freedom; 0
        and 0 where no configuration has two seeds.
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
    """Least squares in logarithms, the floor (if it can be told) by search.

    Args:
        x: at least two budgets.
        y: bits per byte at each, above 0.
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
    """From where on a curve lies on the other side of the baseline; refused where not bounded.

    Only budgets that both were run at count, and nothing is extrapolated: it is stated if the runs
    of the first and of the last of them lie on different sides, and the laws, fitted to these
    budgets, cross in between, as do both ends of the 95% interval of their replicates. Runs lie
    on a side if :data:`MIN_SHARE` of the replicates do.
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
    # Runs at one budget are beside each other only where it is what goes along.
    are_beside = np.allclose(curve.x, baseline.x, rtol=SAME)
    runs = curve.drawn - baseline.drawn if are_beside else differences[:, [0, -1]]
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
    """Where a replicate may cross in a direction; 0 and infinity are beyond the grid."""
    if crossing is not None and (crossing > 0) == is_down:
        return abs(crossing), abs(crossing)
    if (difference < 0).all():
        return (0.0, 0.0) if is_down else (math.inf, math.inf)
    if (difference > 0).all():
        return (math.inf, math.inf) if is_down else (0.0, 0.0)
    return 0.0, math.inf


def _crossing(grid: Floats, difference: Floats) -> float | None:
    """Where a difference changes sign, if it does once; negative where it turns positive."""
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
