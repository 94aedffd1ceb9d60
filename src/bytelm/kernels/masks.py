"""Descriptions of self-attention masks, from which each device derives what it needs."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Mask(NamedTuple):
    """Mask of self-attention over packed rows.

    A query sees only keys of its document, less than ``window`` positions before it. Without
    ``blocks`` attention is causal. With them, bytes whose block is -1 are causal among themselves,
    and a block of bytes that are filled in together (in a diffusion decoder, Fast BLT section
    3.2.2) sees all of itself and the causal bytes before its first position, and is visible only to
    itself::

        position    0  1  2  3  4  5     3  4  5       block 0 starts at position 3
        block      -1 -1 -1 -1 -1 -1     0  0  0
        seen by the query at position 4, block -1:     0 1 2 3 4
        seen by the query at position 4, block 0:      0 1 2, and 3 4 5 of its block
    """

    documents: Int[Tensor, "batch length"]
    """Document of each position; the positions of one are contiguous."""
    window: int | None = None
    """Positions visible to a position, itself included; ``None`` for all before it."""
    blocks: Int[Tensor, "batch length"] | None = None
    """Block of each position, numbered within the row; -1 for bytes that are in no block."""
    positions: Int[Tensor, "batch length"] | None = None
    """Position of each in its document, if blocks make it differ from the order in the row."""

    def allowed(self, begin: int, end: int) -> Bool[Tensor, "batch queries length"]:
        """Return the dense mask of queries ``begin`` to ``end``, which defines the mask."""
        documents, blocks = self.documents, self.blocks
        index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        positions = index if self.positions is None else self.positions
        limits = positions + 1
        if blocks is not None:
            limits = torch.where(blocks < 0, limits, _block_starts(positions, blocks))
        keys, queries = positions[:, None], positions[:, begin:end, None]
        seen = keys < limits[:, begin:end, None]
        if self.window is not None:
            seen &= queries - keys < self.window
        if blocks is not None:
            seen &= blocks[:, None] < 0
            own = blocks[:, begin:end, None]
            seen |= (own == blocks[:, None]) & (own >= 0)
        return seen & (documents[:, begin:end, None] == documents[:, None])


def _block_starts(
    positions: Int[Tensor, "batch length"], blocks: Int[Tensor, "batch length"]
) -> Int[Tensor, "batch length"]:
    """Return the first position of each position's block; undefined outside blocks."""
    slots = blocks + 1
    room = positions.new_full((len(blocks), int(slots.max()) + 1), torch.iinfo(torch.long).max)
    return room.scatter_reduce(1, slots, positions, "amin").gather(1, slots)
