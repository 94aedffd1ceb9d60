"""Packing: stretches of documents side by side in rows of fixed size.

A row has two budgets, bytes and patches, and closes when either is used up, so that compiled
shapes are fixed and the global transformer, which is paid per patch, is padded little. A document
that does not fit is cut; what follows the cut is a document of its own to the model (its first
byte has nothing before it), whose first id is an ordinary byte and not BOS. Every id of every
document but the first is a target exactly once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from bytelm import codec
from bytelm.patching import PADDING, Patcher

IGNORED = -100
"""Target of padding: the value that cross-entropy leaves out."""


class Stretch(NamedTuple):
    """Consecutive positions of a document: ``ids[i]`` is read, ``ids[i + 1]`` predicted."""

    document: int
    begin: int
    """First position; 0 is BOS."""
    ids: NDArray[np.int64]
    """One more than there are positions."""
    entropies: NDArray[np.float32] | None

    @property
    def num_positions(self) -> int:
        """Bytes (or BOS) read."""
        return len(self.ids) - 1

    def head(self, length: int) -> "Stretch":
        """The first ``length`` positions, or all if there are fewer."""
        entropies = None if self.entropies is None else self.entropies[:length]
        return self._replace(ids=self.ids[: length + 1], entropies=entropies)


class Batch(NamedTuple):
    """Rows of equal size, ready for a model."""

    ids: Int[Tensor, "batch bytes"]
    targets: Int[Tensor, "batch bytes"]
    """Id after each; ``IGNORED`` on padding."""
    documents: Int[Tensor, "batch bytes"]
    """Stretch of each byte within its row; ``PADDING`` on padding."""
    next_boundary: Bool[Tensor, "batch bytes"] | None
    """Where the model has patches: whether the byte after each starts one."""
    num_patches: int | None
    """Where the model has patches: the patch budget of a row."""
    patch_counts: Int[Tensor, " batch"] | None
    """Where the model has patches: how many each row uses."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, rows: int) -> "list[Batch]":
        """Micro-batches of ``rows`` rows."""
        begins = range(0, len(self.ids), rows)
        return [self._map(lambda tensor, at=at: tensor[at : at + rows]) for at in begins]

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        boundary, counts = self.next_boundary, self.patch_counts
        return Batch(
            function(self.ids),
            function(self.targets),
            function(self.documents),
            None if boundary is None else function(boundary),
            self.num_patches,
            None if counts is None else function(counts),
        )


@dataclass
class Row:
    """A row being filled."""

    max_bytes: int
    max_patches: int | None
    patcher: Patcher | None
    stretches: list[Stretch] = field(default_factory=list)
    boundaries: list[NDArray[np.bool_]] = field(default_factory=list)
    num_bytes: int = 0
    num_patches: int = 0

    @property
    def is_full(self) -> bool:
        """Whether a budget is used up."""
        no_patches_left = self.max_patches is not None and self.num_patches >= self.max_patches
        return self.num_bytes >= self.max_bytes or no_patches_left

    def add(self, stretch: Stretch) -> int:
        """Put in as much of a stretch as fits, at least one position, and say how much."""
        stretch = stretch.head(self.max_bytes - self.num_bytes)
        if self.patcher is not None:
            boundary = stretch_boundaries(self.patcher, stretch)
            starts = np.flatnonzero(boundary[:-1]) + 1
            if self.max_patches is not None:
                room = self.max_patches - self.num_patches
                if len(starts) >= room:
                    stretch, starts = stretch.head(int(starts[room - 1])), starts[: room - 1]
            self.num_patches += 1 + len(starts)
            self.boundaries.append(boundary[: stretch.num_positions])
        self.stretches.append(stretch)
        self.num_bytes += stretch.num_positions
        return stretch.num_positions


def stretch_boundaries(patcher: Patcher, stretch: Stretch) -> NDArray[np.bool_]:
    """Whether the byte after each starts a patch, the stretch taken as a document."""
    ids = torch.from_numpy(stretch.ids[:-1])[None]
    entropies = None
    if patcher.needs_entropies:
        assert stretch.entropies is not None
        entropies = torch.from_numpy(stretch.entropies)[None]
    return patcher.next_boundary(ids, entropies)[0].numpy()


def make_batch(rows: Sequence[Row]) -> Batch:
    """Pad rows to their budgets and stack them."""
    first = rows[0]
    shape = (len(rows), first.max_bytes)
    ids = np.full(shape, codec.BOE, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    documents = np.full(shape, PADDING, np.int64)
    next_boundary = np.zeros(shape, np.bool_) if first.patcher is not None else None
    for r, row in enumerate(rows):
        at = 0
        for number, stretch in enumerate(row.stretches):
            end = at + stretch.num_positions
            ids[r, at:end] = stretch.ids[:-1]
            targets[r, at:end] = stretch.ids[1:]
            documents[r, at:end] = number
            if next_boundary is not None:
                next_boundary[r, at:end] = row.boundaries[number]
            at = end
    batch = Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        documents=torch.from_numpy(documents),
        next_boundary=None,
        num_patches=None,
        patch_counts=None,
    )
    if next_boundary is None:
        return batch
    counts = torch.tensor([row.num_patches for row in rows])
    return batch._replace(
        next_boundary=torch.from_numpy(next_boundary),
        num_patches=first.max_patches or int(counts.max()),
        patch_counts=counts,
    )
