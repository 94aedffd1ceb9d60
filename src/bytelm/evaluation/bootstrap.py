"""Intervals by the bootstrap: items resampled, in the same way for all that is compared.

Documents or sentences are drawn with replacement, and every quantity is computed again. Quantities
of one replicate, of several models or languages, come from the same draw, so the interval of their
difference is a paired one: what an item does to both does not count.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
REPLICATES = 1000
LEVEL = (0.025, 0.975)
"""Quantiles at the ends of a 95% interval."""


class Estimate(NamedTuple):
    """A value with the ends of its 95% interval; NaN if there are too few items for one."""

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2

    def text(self, digits: int, *, signed: bool = False) -> str:
        """Return the value and the margin, such as ``1.20 ±0.03``; the value alone without one."""
        shown = f"{self.value:{'+' if signed else ''}.{digits}f}"
        return shown if math.isnan(self.margin) else f"{shown} ±{self.margin:.{digits}f}"

    def record(self) -> dict[str, float | None]:
        """Return the fields for JSON, which has no NaN."""
        return {k: None if math.isnan(v) else v for k, v in self._asdict().items()}


def resample(
    num_items: int,
    replicates: int = REPLICATES,
    generator: np.random.Generator | int = 0,
) -> NDArray[np.int64]:
    """Return how often each item is drawn in each replicate, ``int64[replicate, item]``.

    ``resample(n) @ values / n`` are the replicates of the mean of ``values``.

    Args:
        num_items: number of items, which is also the number of draws in a replicate.
        replicates: number of replicates.
        generator: random generator, or its seed.
    """
    generator = np.random.default_rng(generator)
    return generator.multinomial(num_items, np.full(num_items, 1 / num_items), size=replicates)


def interval(replicates: Floats) -> tuple[float, float]:
    """Return the ends of the 95% interval of a quantity, from its value in each replicate."""
    low, high = np.quantile(replicates, LEVEL)
    return float(low), float(high)


def ratio_estimate(
    numerators: Floats, denominators: Floats, replicates: int = REPLICATES, seed: int = 0
) -> Estimate:
    """Return the ratio of two sums over items, with an interval that resamples the items.

    Args:
        numerators: such as bits, ``[item]``.
        denominators: such as bytes, ``[item]``.
        replicates: number of replicates.
        seed: seed of the resampling.
    """
    value = float(numerators.sum() / denominators.sum())
    if len(numerators) < 2:
        return Estimate(value, math.nan, math.nan)
    drawn = resample(len(numerators), replicates, seed)
    return Estimate(value, *interval((drawn @ numerators) / (drawn @ denominators)))
