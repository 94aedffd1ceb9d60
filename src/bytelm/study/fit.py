"""Power laws with confidence intervals, and their crossovers.

::

    bpb(x) = E + A x ** -alpha          x: training FLOPs, or training bytes

With fewer than five budgets ``E`` and ``alpha`` cannot both be estimated, and ``E`` is 0: the law
is a straight line in logarithms, valid between the budgets and not beyond. Intervals are 95% of
bootstrap replicates (:mod:`bytelm.study.bootstrap`).
"""

import math
from dataclasses import dataclass

import numpy as np

from bytelm.evaluation.bootstrap import Floats, interval

MIN_POINTS_FOR_FLOOR = 5
SAME = 0.1
"""Relative difference up to which two runs count as having spent the same."""
MIN_SHARE = 0.975
"""Share of replicates that must agree on the sign of a difference for it to be stated."""


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

    def at(self, budgets: Floats) -> "Curve":
        """Return the curve through some of the budgets alone."""
        kept = np.isin(self.budgets, budgets)
        return through(
            self.name, self.budgets[kept], self.x[kept], self.bpb[kept], self.drawn[:, kept]
        )

    def exponent_interval(self) -> tuple[float, float]:
        """Return the 95% interval of the exponent."""
        return interval(np.array([law.exponent for law in self.replicates]))

    def band(self, x: Floats) -> tuple[Floats, Floats]:
        """Return the 95% interval of the law at each ``x``."""
        curves = np.array([law(x) for law in self.replicates])
        low, high = np.quantile(curves, (0.025, 0.975), axis=0)
        return low, high


@dataclass(frozen=True)
class SlopeDifference:
    """Exponent of a curve's law minus that of the baseline's, at the budgets that both have."""

    name: str
    baseline: str
    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""


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


def through(name: str, budgets: Floats, x: Floats, bpb: Floats, drawn: Floats) -> Curve:
    """Return the curve through some points, with a law for them and for each replicate."""
    if len(x) < 2:
        return Curve(name, budgets, x, bpb, drawn, None, ())
    laws = tuple(fit_power_law(x, y) for y in drawn)
    return Curve(name, budgets, x, bpb, drawn, fit_power_law(x, bpb), laws)


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


def compare_slopes(curve: Curve, baseline: Curve) -> SlopeDifference | None:
    """Return the difference of two laws' exponents, or ``None`` if they share one budget or none.

    Both are fitted to the same budgets, and in each replicate to the same documents and seeds, so
    the interval is narrower than those of the two exponents suggest.
    """
    shared = np.intersect1d(curve.budgets, baseline.budgets)
    curve, baseline = curve.at(shared), baseline.at(shared)
    if curve.law is None or baseline.law is None:
        return None
    pairs = zip(curve.replicates, baseline.replicates, strict=True)
    low, high = interval(np.array([mine.exponent - base.exponent for mine, base in pairs]))
    value = curve.law.exponent - baseline.law.exponent
    return SlopeDifference(curve.name, baseline.name, value, low, high)


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
