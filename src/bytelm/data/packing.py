"""Pack spans of documents into rows of fixed size.

A row has two budgets, bytes and units (patches or tokens), and closes when either is used up, so
that shapes are fixed for compilation and the global transformer, whose cost is per patch, is padded
little. A document that does not fit is cut; the rest is a separate document to the model (no byte
before the cut is visible to it), whose first id is an ordinary byte and not BOS. Every id of a
document except the first is a target exactly once, unless only some of its bytes are trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bytelm import codec
from bytelm.patching import PADDING
from bytelm.units import IGNORED, Segment, Span, Units


class Batch(NamedTuple):
    """Rows of equal size, ready for a model."""

    ids: Int[Tensor, "batch ids"]
    targets: Int[Tensor, "batch ids"]
    """Id after each; ``IGNORED`` on padding and where a document is not trained on."""
    target_bytes: Int[Tensor, "batch ids"]
    """Bytes of text in each target: 1 for a byte, the length of a token, 0 for the end of a
    document, on padding and where a document is not trained on."""
    documents: Int[Tensor, "batch ids"]
    """Span of each id within its row; ``PADDING`` on padding."""
    next_boundary: Bool[Tensor, "batch ids"] | None
    """Whether the byte after each starts a patch; ``None`` if rows carry no patches."""
    budget: int | None
    """Units that a row has room for; ``None`` if units have no budget."""
    unit_counts: Int[Tensor, " batch"] | None
    """Units in each row; ``None`` if units have no budget."""
    byte_counts: Int[Tensor, " batch"]
    """Positions in each row: bytes, and the BOS and EOS of documents."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for a language model's forward pass."""
        if self.next_boundary is None:
            return {"ids": self.ids, "documents": self.documents}
        return {
            "ids": self.ids,
            "documents": self.documents,
            "next_boundary": self.next_boundary,
            "num_patches": self.budget,
        }

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, rows: int) -> "list[Batch]":
        """Return micro-batches of ``rows`` rows."""
        begins = range(0, len(self.ids), rows)
        return [self._map(lambda tensor, at=at: tensor[at : at + rows]) for at in begins]

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        fields = self._asdict().items()
        return self._replace(**{k: function(x) for k, x in fields if isinstance(x, Tensor)})


@dataclass
class Row:
    """Row that is being filled."""

    max_bytes: int
    budget: int | None
    """Units that there is room for; ``None`` for no limit."""
    units: Units
    spans: list[Span] = field(default_factory=list)
    """Spans in the row, as far as they were added."""
    segments: list[Segment] = field(default_factory=list)
    """Segment of each span."""
    num_bytes: int = 0
    num_units: int = 0

    @property
    def is_full(self) -> bool:
        """Whether a budget is used up."""
        no_units_left = self.budget is not None and self.num_units >= self.budget
        return self.num_bytes >= self.max_bytes or no_units_left

    def has_room(self, span: Span) -> bool:
        """Whether the whole span fits."""
        if span.num_positions > self.max_bytes - self.num_bytes:
            return False
        segment = self.units.segment(span, self._room)
        return segment.size == span.num_positions

    @property
    def _room(self) -> int | None:
        return None if self.budget is None else self.budget - self.num_units

    def add(self, span: Span, cut: int = 0) -> int:
        """Add as much of a span as fits, at least one position.

        Args:
            span: the span to add.
            cut: if above 0, a target index that no token may extend across.

        Returns:
            The number of positions added.
        """
        span = span.head(self.max_bytes - self.num_bytes)
        segment = self.units.segment(span, self._room, cut)
        self.segments.append(segment)
        added = segment.size
        self.spans.append(span.head(added))
        self.num_bytes += added
        self.num_units += self.units.count(segment)
        return added


def make_batch(rows: Sequence[Row]) -> Batch:
    """Pad rows to their budgets and stack them."""
    first = rows[0]
    counts = torch.tensor([row.num_units for row in rows])
    budget = first.budget or int(counts.max())
    shape = (len(rows), first.units.row_length(first.max_bytes, budget))
    # Not filled: most of a row is written once, below.
    ids, targets, target_bytes, documents = np.empty((4, *shape), np.int64)
    next_boundary = np.zeros(shape, np.bool_)
    has_patches = False
    for r, row in enumerate(rows):
        at = 0
        for number, segment in enumerate(row.segments):
            end = at + len(segment.ids)
            ids[r, at:end] = segment.ids
            targets[r, at:end] = segment.targets
            target_bytes[r, at:end] = segment.target_bytes
            documents[r, at:end] = number
            if segment.next_boundary is not None:
                has_patches = True
                next_boundary[r, at:end] = segment.next_boundary
            at = end
        padding = ((ids, codec.BOE), (targets, IGNORED), (target_bytes, 0), (documents, PADDING))
        for array, value in padding:
            array[r, at:] = value
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        target_bytes=torch.from_numpy(target_bytes),
        documents=torch.from_numpy(documents),
        next_boundary=torch.from_numpy(next_boundary) if has_patches else None,
        budget=budget if first.units.has_budget else None,
        unit_counts=counts if first.units.has_budget else None,
        byte_counts=torch.tensor([row.num_bytes for row in rows]),
    )
