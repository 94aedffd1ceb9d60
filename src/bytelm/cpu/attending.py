"""Attention of one new position of each of several documents to what their caches hold.

The keys and values of a document lie in one or more blocks: a ring buffer, or pages. Operations of
``torch`` would first copy the blocks of all documents next to each other, and compute masked
entries too; a kernel (:func:`bytelm.cpu.kernels.attend`) reads the entries in use where they
are::

    mixed[h] = sum_e softmax_e(queries[h] . keys[e] / sqrt(head_dim)) values[e]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.cpu.compiling import kernels


@dataclass(frozen=True)
class Entries:
    """Where the entries of some documents are, in units of positions of a tensor of keys."""

    starts: Int[np.ndarray, "rows blocks"]
    """First position of each block."""
    block: int
    """Entries of a block."""
    new: Int[np.ndarray, " rows"]
    """Entry of the new position of each document."""
    counts: Int[np.ndarray, " rows"]
    """Entries in use, with the new one; they are the first."""

    def attend(
        self,
        queries: Float[Tensor, "rows heads head_dim"],
        keys: Float[Tensor, "rows kv_heads head_dim"],
        values: Float[Tensor, "rows kv_heads head_dim"],
        all_keys: Float[Tensor, "..."],
        all_values: Float[Tensor, "..."],
        head_positions: int,
    ) -> Float[Tensor, "rows heads head_dim"]:
        """Store the new keys and values, and attend.

        Args:
            queries: queries of the new positions.
            keys: their keys.
            values: their values.
            all_keys: the cache's keys, contiguous.
            all_values: the cache's values, contiguous.
            head_positions: positions from a head's entries to those of the next head.
        """
        mixed = torch.empty(len(queries), queries.shape[1] * queries.shape[2])
        kernels().attend(
            torch.cat((queries, keys, values), 1).detach().numpy(),
            *(one.detach().view(-1).numpy() for one in (all_keys, all_values)),
            self.place(head_positions, keys.shape[1]),
            mixed.numpy(),
        )
        return mixed.view(queries.shape)

    def place(self, head_positions: int, kv_heads: int) -> tuple[Any, ...]:
        """Return what the kernels read of this."""
        return self.starts, self.block, self.new, self.counts, head_positions, kv_heads


def rings(
    slots: Sequence[int], positions: Int[np.ndarray, " rows"], room: int, heads: int
) -> Entries:
    """Return the entries of documents in ring buffers ``[slots, heads, room, head_dim]``."""
    starts = np.asarray(slots, dtype=np.int64)[:, None] * (heads * room)
    return Entries(starts, room, positions % room, np.minimum(positions + 1, room))


def paged(
    tables: Sequence[Sequence[int]], positions: Int[np.ndarray, " rows"], page: int
) -> Entries:
    """Return the entries of documents in pages of a tensor ``[heads, positions, head_dim]``."""
    starts = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in enumerate(tables):
        starts[row, : len(table)] = table
    return Entries(starts * page, page, positions, positions + 1)
