"""Calibrate a threshold for a wanted mean patch size (paper section 4.3).

The mean patch size is the number of positions (BOS and bytes) divided by the number of patches. It
does not decrease as the threshold rises, so bisection over the values in a sample finds the
threshold.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.config import CalibratedPatching, PatchingConfig
from bytelm.errors import PatchingError
from bytelm.patching.boundaries import build_patches
from bytelm.patching.patcher import Patcher, build_patcher

TOLERANCE = 0.02
"""Largest relative deviation of the mean patch size from the one wanted."""
_GAP_SEARCH = 2000
"""The threshold is put into the widest gap between values near the one found: at most the
``1 / _GAP_SEARCH``-th part of all values to either side,"""
_GAP_MARGIN = 0.005
"""as long as the mean patch size deviates by no more than this share from the one wanted."""


class PatchSample(NamedTuple):
    """Sample of documents, packed in one row."""

    ids: Int[Tensor, "1 bytes"]
    entropies: Float[Tensor, "1 bytes"] | None
    documents: Int[Tensor, "1 bytes"]

    @classmethod
    def join(cls, documents: Sequence[tuple[Tensor, Tensor | None]]) -> "PatchSample":
        """Return the sample of (ids, entropies) pairs, of which all or none have entropies.

        Raises:
            PatchingError: there are no documents.
        """
        if not documents:
            raise PatchingError("there is no text to calibrate on: prepare more")
        lengths = torch.tensor([len(ids) for ids, _ in documents])
        numbers = torch.arange(len(documents)).repeat_interleave(lengths)
        scores = [entropies for _, entropies in documents if entropies is not None]
        joined = torch.cat(scores)[None] if scores else None
        return cls(torch.cat([ids for ids, _ in documents])[None], joined, numbers[None])


class PatchStatistics(NamedTuple):
    """Statistics of the patches of a sample."""

    num_positions: int
    """Number of bytes, and of a BOS for each document."""
    num_patches: int
    longest: int
    """Longest patch, in bytes."""

    @property
    def mean_size(self) -> float:
        """Mean bytes per patch."""
        return self.num_positions / max(self.num_patches, 1)

    def joined(self, other: "PatchStatistics") -> "PatchStatistics":
        """Return the statistics of both samples together."""
        return PatchStatistics(
            self.num_positions + other.num_positions,
            self.num_patches + other.num_patches,
            max(self.longest, other.longest),
        )


def patch_statistics(patcher: Patcher, sample: PatchSample) -> PatchStatistics:
    """Count the patches of a sample."""
    boundary = patcher.next_boundary(*sample)
    patches = build_patches(boundary, sample.documents)
    num_patches = patches.num_patches
    return PatchStatistics(sample.ids.numel(), num_patches, int(patches.lengths.max()))


def calibrate(config: PatchingConfig, sample: PatchSample, patch_size: float) -> CalibratedPatching:
    """Return a rule with the threshold (or increase) that gives a mean patch size on a sample.

    The threshold lies in a wide gap between two values of the sample, so that rounding moves no
    boundary.

    Args:
        config: configuration of a rule with a threshold, which is replaced if it is set.
        sample: documents with their entropies.
        patch_size: wanted mean bytes per patch.

    Raises:
        PatchingError: the rule has no threshold, or no threshold gives a mean within 2% of the one
            wanted; the message names what can be reached.
    """
    if not isinstance(config, CalibratedPatching):
        raise PatchingError(
            f"the {config.kind} rule has no threshold to calibrate: use entropy, monotonic or "
            "combined"
        )
    assert sample.entropies is not None
    values = sample.entropies[0].double()
    if config.compares_rises:
        values = values.diff()
    values = values.unique()
    # Threshold i lies between edges i and i + 1; the outermost ones make every byte a boundary, or
    # none.
    edges = torch.cat((values[:1] - 1.0, values, values[-1:] + 1.0))

    def at(index: int) -> CalibratedPatching:
        return config.with_threshold(float(edges[index] + edges[index + 1]) / 2)

    def mean_size(index: int) -> float:
        boundary = build_patcher(at(index)).next_boundary(*sample)
        is_last = torch.ones_like(boundary)
        is_last[:, :-1] = sample.documents[:, 1:] != sample.documents[:, :-1]
        num_patches = int(sample.documents[0, -1]) + 1 + int((boundary & ~is_last).sum())
        return sample.ids.numel() / num_patches

    low, high = 0, len(edges) - 2
    smallest, largest = mean_size(low), mean_size(high)
    if not smallest <= patch_size <= largest:
        limit = "" if config.max_length is None else f" with max_length {config.max_length}"
        raise PatchingError(
            f"a mean patch size of {patch_size:g} cannot be reached on this text: the "
            f"{config.kind} rule{limit} gives {smallest:.2f} to {largest:.2f} bytes per patch; ask "
            "for a size in this range, or use more text"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean_size(middle) <= patch_size else (low, middle)
    found = min(low, high, key=lambda i: abs(mean_size(i) / patch_size - 1))
    reached = mean_size(found)
    if abs(reached / patch_size - 1) > TOLERANCE:
        raise PatchingError(
            f"a mean patch size of {patch_size:g} cannot be reached on this text: it jumps from "
            f"{mean_size(low):.2f} to {mean_size(high):.2f}; ask for one of those, or use more text"
        )
    if found in (0, len(edges) - 2):
        return at(found)
    margin = max(abs(reached / patch_size - 1), _GAP_MARGIN)
    reach = len(values) // _GAP_SEARCH

    def is_close(index: int) -> bool:
        return abs(mean_size(index) / patch_size - 1) <= margin

    first = _farthest(found, max(found - reach, 1), is_close)
    last = _farthest(found, min(found + reach, len(edges) - 3), is_close)
    return at(first + int(edges.diff()[first : last + 1].argmax()))


def _farthest(found: int, limit: int, is_close: Callable[[int], bool]) -> int:
    """Return the index farthest from ``found``, up to ``limit``, that is close, by bisection."""
    close, far = found, limit
    while close != far:
        # Rounds towards the far end, so that the interval always shrinks.
        middle = (close + far + (far > close)) // 2
        if is_close(middle):
            close = middle
        else:
            far = middle + (1 if far < close else -1)
    return close
