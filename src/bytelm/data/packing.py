"""Packing: stretches of documents side by side in rows of fixed size.

A row has two budgets, bytes and patches, and closes when either is used up, so that compiled
shapes are fixed and the global transformer, which is paid per patch, is padded little. A document
that does not fit is cut; what follows the cut is a document of its own to the model (its first
byte has nothing before it), whose first id is an ordinary byte and not BOS. Every id of every
document but the first is a target exactly once.

A model with a tokenizer gets the same stretches of the same documents, as tokens: its context is
equal in bytes, its text in the same order, and the budget of tokens takes the place of patches.
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
from bytelm.tokens import Tokenizer

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
    """Rows of equal size, ready for a model; of a model with a tokenizer, its tokens."""

    ids: Int[Tensor, "batch bytes"]
    targets: Int[Tensor, "batch bytes"]
    """Id after each; ``IGNORED`` on padding."""
    target_bytes: Int[Tensor, "batch bytes"]
    """Bytes of text in each target: 1, or 0 for the end of a document and on padding; the length
    of a token."""
    documents: Int[Tensor, "batch bytes"]
    """Stretch of each byte within its row; ``PADDING`` on padding."""
    next_boundary: Bool[Tensor, "batch bytes"] | None
    """Where the model has patches: whether the byte after each starts one."""
    num_patches: int | None
    """Where the model has patches, or tokens: the budget of a row."""
    patch_counts: Int[Tensor, " batch"] | None
    """Where the model has patches, or tokens: how many each row uses."""
    byte_counts: Int[Tensor, " batch"]
    """How many positions of text (bytes, ends and beginnings of documents) each row uses."""

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
            function(self.target_bytes),
            function(self.documents),
            None if boundary is None else function(boundary),
            self.num_patches,
            None if counts is None else function(counts),
            function(self.byte_counts),
        )


class Units(NamedTuple):
    """What a model reads of one stretch, and predicts: bytes, or tokens."""

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    num_positions: NDArray[np.int64]
    """How many of the stretch's ids each target stands for."""
    next_boundary: NDArray[np.bool_] | None
    """Where the model has patches: whether the byte after each starts one."""

    @property
    def target_bytes(self) -> NDArray[np.int64]:
        """Bytes of text in each target: none in the end of a document."""
        return np.where(self.targets == codec.EOS, 0, self.num_positions)


@dataclass
class Row:
    """A row being filled."""

    max_bytes: int
    max_patches: int | None
    """Patches, or tokens, that there is room for."""
    patcher: Patcher | None = None
    tokenizer: Tokenizer | None = None
    stretches: list[Stretch] = field(default_factory=list)
    """What was put in of each stretch."""
    units: list[Units] = field(default_factory=list)
    """Of each stretch."""
    num_bytes: int = 0
    num_patches: int = 0

    @property
    def is_full(self) -> bool:
        """Whether a budget is used up."""
        no_patches_left = self.max_patches is not None and self.num_patches >= self.max_patches
        return self.num_bytes >= self.max_bytes or no_patches_left

    def add(self, stretch: Stretch, cut: int = 0) -> int:
        """Put in as much of a stretch as fits, at least one position, and say how much.

        Args:
            stretch: what to put in.
            cut: where above 0, no token stands for positions on both sides of this one.
        """
        stretch = stretch.head(self.max_bytes - self.num_bytes)
        if self.tokenizer is not None:
            units = self._tokens(stretch, self.tokenizer, cut)
        else:
            units = self._bytes(stretch)
        self.units.append(units)
        added = int(units.num_positions.sum())
        self.stretches.append(stretch.head(added))
        self.num_bytes += added
        return added

    def _bytes(self, stretch: Stretch) -> Units:
        boundary = None
        if self.patcher is not None:
            boundary = stretch_boundaries(self.patcher, stretch)
            starts = np.flatnonzero(boundary[:-1]) + 1
            if self.max_patches is not None:
                room = self.max_patches - self.num_patches
                if len(starts) >= room:
                    stretch, starts = stretch.head(int(starts[room - 1])), starts[: room - 1]
            self.num_patches += 1 + len(starts)
            boundary = boundary[: stretch.num_positions]
        ones = np.ones(stretch.num_positions, np.int64)
        return Units(stretch.ids[:-1], stretch.ids[1:], ones, boundary)

    def _tokens(self, stretch: Stretch, tokenizer: Tokenizer, cut: int) -> Units:
        # The tokens of what is predicted; the byte before it, whatever token that was part of, is
        # all that is known of the text before.
        parts = [stretch.ids[1 : 1 + cut], stretch.ids[1 + cut :]]
        targets = np.concatenate([tokenizer.encode(part) for part in parts])
        if self.max_patches is not None:
            targets = targets[: self.max_patches - self.num_patches]
        self.num_patches += len(targets)
        ids = np.concatenate([stretch.ids[:1], targets[:-1]])
        return Units(ids, targets, tokenizer.num_ids(targets), None)


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
    counts = torch.tensor([row.num_patches for row in rows])
    budget = first.max_patches or int(counts.max())
    shape = (len(rows), first.max_bytes if first.tokenizer is None else budget)
    ids = np.full(shape, codec.BOE, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    target_bytes = np.zeros(shape, np.int64)
    documents = np.full(shape, PADDING, np.int64)
    next_boundary = np.zeros(shape, np.bool_)
    for r, row in enumerate(rows):
        at = 0
        for number, units in enumerate(row.units):
            end = at + len(units.ids)
            ids[r, at:end] = units.ids
            targets[r, at:end] = units.targets
            target_bytes[r, at:end] = units.target_bytes
            documents[r, at:end] = number
            if units.next_boundary is not None:
                next_boundary[r, at:end] = units.next_boundary
            at = end
    has_units = first.patcher is not None or first.tokenizer is not None
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        target_bytes=torch.from_numpy(target_bytes),
        documents=torch.from_numpy(documents),
        next_boundary=torch.from_numpy(next_boundary) if first.patcher is not None else None,
        num_patches=budget if has_units else None,
        patch_counts=counts if has_units else None,
        byte_counts=torch.tensor([row.num_bytes for row in rows]),
    )
