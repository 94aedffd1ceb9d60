"""Intervals by the bootstrap: items resampled, in the same way for all that is compared.

Documents or sentences are drawn with replacement, and every quantity is computed again. Quantities
of one replicate, of several models or languages, come from the same draw, so the interval of their
difference is a paired one: what an item does to both does not count.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
REPLICATES = 1000
LEVEL = (0.025, 0.975)
"""Quantiles at the ends of a 95% interval."""


class Estimate(NamedTuple):
    """A value with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half of the interval."""
        return (self.high - self.low) / 2


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
