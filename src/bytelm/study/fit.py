"""Power laws with intervals, and where they cross.

::

    bpb(x) = E + A x ** -alpha          x: training FLOPs, or training bytes

With fewer than five budgets ``E`` cannot be told from ``alpha`` and is 0: a straight line in
logarithms, good between the budgets and not far beyond. Intervals are 95% of bootstrap replicates,
each of which draws the held-out documents anew (the same draw for every run, so that what two runs
have in common does not count as their difference) and adds to every run the noise of its seed,
normal, of the spread seen between seeds of one configuration.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bytelm.study.table import Results

REPLICATES = 1000
MIN_POINTS_FOR_FLOOR = 5
REACH = 3.0
"""How many times beyond the budgets that were run a crossover may lie."""
MIN_SHARE = 0.975
"""Share of replicates that must cross within reach for the crossover to be stated."""

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
    x: Floats
    """Distinct budgets, ascending."""
    bpb: Floats
    """At each, the mean over seeds."""
    low: Floats
    high: Floats
    law: PowerLaw | None
    """``None`` for fewer than two budgets."""
    replicates: tuple[PowerLaw, ...]

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
    """

    def __init__(self, results: Results, replicates: int = REPLICATES, seed: int = 0) -> None:
        self.results = results
        generator = np.random.default_rng(seed)
        num_documents = len(results.num_bytes)
        self.bpb = results.bits_per_byte(np.ones(num_documents))
        self.seed_noise = seed_spread(results, self.bpb)
        draws = generator.multinomial(
            num_documents, np.full(num_documents, 1 / num_documents), size=replicates
        )
        resampled = np.array([results.bits_per_byte(weights.astype(float)) for weights in draws])
        noise = generator.normal(0, self.seed_noise, resampled.shape)
        self.replicates = resampled + noise
        """``[replicate, run]``."""

    def curve(self, name: str, rows: Sequence[int], x: Callable[[dict], float]) -> Curve:
        """The curve through some runs, seeds of one budget averaged.

        Args:
            name: of the curve.
            rows: of the table.
            x: what of a row goes along the axis.
        """
        groups: dict[float, list[int]] = defaultdict(list)
        for row in rows:
            groups[x(self.results.rows[row])].append(row)
        budgets = sorted(groups)
        means = np.array([self.bpb[groups[b]].mean() for b in budgets])
        drawn = np.stack([self.replicates[:, groups[b]].mean(1) for b in budgets], axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        at = np.array(budgets)
        if len(budgets) < 2:
            return Curve(name, at, means, low, high, None, ())
        laws = tuple(fit_power_law(at, y) for y in drawn)
        return Curve(name, at, means, low, high, fit_power_law(at, means), laws)


def seed_spread(results: Results, bpb: Floats) -> float:
    """Standard deviation between seeds of one configuration, pooled over all that have several."""
    groups: dict[tuple, list[float]] = defaultdict(list)
    for row, value in zip(results.rows, bpb, strict=True):
        key = (row["family"], row["size"], row["budget_flops"], row["budget_bytes"])
        groups[(*key, row["settings"])].append(float(value))
    several = [values for values in groups.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum(float(np.var(values)) * len(values) for values in several)
    return math.sqrt(squares / freedom) if freedom else 0.0


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
    """From where on a curve lies below the baseline; refused where it cannot be bounded.

    It is stated if the fitted laws cross once within :data:`REACH` times the budgets that both
    were run at, and so do :data:`MIN_SHARE` of the replicates.
    """

    def result(verdict: str, *values: float | None) -> Crossover:
        x, low, high = values or (None, None, None)
        return Crossover(curve.name, baseline.name, x, low, high, verdict)

    if curve.law is None or baseline.law is None:
        return result("not fitted: fewer than two budgets")
    first = max(curve.x[0], baseline.x[0])
    last = min(curve.x[-1], baseline.x[-1])
    grid = np.geomspace(first / REACH, last * REACH, 2001)
    inside = (grid >= first) & (grid <= last)
    differences = np.array(
        [a(grid) - b(grid) for a, b in zip(curve.replicates, baseline.replicates, strict=True)]
    )
    for sign, word in ((-1, "below"), (1, "above")):
        if (sign * differences[:, inside] > 0).all(1).mean() >= MIN_SHARE:
            beyond = (
                ""
                if (sign * differences > 0).all(1).mean() >= MIN_SHARE
                else ("; a crossover beyond them cannot be bounded")
            )
            return result(f"{word} at all budgets that were run{beyond}")
    at = _crossing(grid, curve.law(grid) - baseline.law(grid))
    drawn = [c for c in (_crossing(grid, d) for d in differences) if c is not None]
    share = len(drawn) / len(differences)
    if at is None or share < MIN_SHARE:
        return result(
            f"cannot be bounded: {share:.0%} of replicates cross within {REACH:g} times the "
            "budgets that were run"
        )
    low, high = _interval(drawn)
    return result("crosses", at, low, high)


def _crossing(grid: Floats, difference: Floats) -> float | None:
    """Where a difference turns negative for good, if it changes sign once."""
    changes = np.flatnonzero(np.diff(np.sign(difference)))
    if len(changes) != 1 or difference[-1] > 0:
        return None
    at = int(changes[0])
    a, b = difference[at], difference[at + 1]
    t = a / (a - b)
    return float(np.exp(np.log(grid[at]) * (1 - t) + np.log(grid[at + 1]) * t))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(np.array(values), (0.025, 0.975))
    return float(low), float(high)
