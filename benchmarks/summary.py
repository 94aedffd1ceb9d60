"""Figures from samples. Nothing here needs torch: records can be drawn anywhere."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Sample = Mapping[str, float]


class Ratio(NamedTuple):
    """How many times as long one subject takes as another, measured in pairs."""

    median: float
    lowest: float
    highest: float


def minimum(samples: Sequence[Sample], clock: str) -> float:
    """The least disturbed sample."""
    return min(sample[clock] for sample in samples)


def median(samples: Sequence[Sample], clock: str) -> float:
    """The middle of the samples."""
    return statistics.median(sample[clock] for sample in samples)


def pair_ratio(
    ours: Sequence[Sample], theirs: Sequence[Sample], clock: str, scale: float = 1.0
) -> Ratio:
    """Theirs over ours for each pair of neighbouring samples: the median and the extremes.

    Args:
        ours: samples of one subject.
        theirs: as many of the other.
        clock: which times.
        scale: how much more work there is in a sample of ours than in one of theirs.
    """
    ratios = [
        scale * other[clock] / max(one[clock], 1e-12)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def clocks(samples: Sequence[Sample]) -> list[str]:
    """The clocks to report, the steadier one first."""
    return ["device", "wall"] if "device" in samples[0] else ["cpu", "wall"]
