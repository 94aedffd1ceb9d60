"""Attention of one new position of each of several documents to what their caches hold.

The keys and values of a document lie in one or more blocks: a ring buffer, or pages. Operations of
``torch`` would first copy the blocks of all documents next to each other, and compute masked
entries too; this kernel (:func:`bytelm.cpu.compiling.compiled`) reads the entries in use where they
are::

    mixed[h] = sum_e softmax_e(queries[h] . keys[e] / sqrt(head_dim)) values[e]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.cpu.compiling import compiled


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
        mixed = torch.empty(queries.shape)
        kernel()(
            *(one.detach().contiguous().numpy() for one in (queries, keys, values)),
            *(one.detach().view(-1).numpy() for one in (all_keys, all_values)),
            (self.starts, self.block, self.new, self.counts, head_positions),
            mixed.numpy(),
        )
        return mixed


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


@cache
def kernel() -> Callable[..., None]:
    """Compile the kernel."""

    # Without annotations: numba compiles the function itself, not one that checks types.
    def attend(queries, keys, values, all_keys, all_values, place, mixed):  # noqa: ANN001, ANN202  # pyright: ignore
        starts, block, new, counts, head_positions = place
        rows, heads, dim = queries.shape
        group = heads // keys.shape[1]
        scale = np.float32(1.0 / np.sqrt(dim))
        scores = np.empty(counts.max(), np.float32)
        for row in range(rows):
            count = counts[row]
            for head in range(heads):
                kv = head // group
                offset = kv * head_positions
                if head % group == 0:
                    at = (starts[row, new[row] // block] + offset + new[row] % block) * dim
                    all_keys[at : at + dim] = keys[row, kv]
                    all_values[at : at + dim] = values[row, kv]
                query, out = queries[row, head], mixed[row, head]
                highest = np.float32(-np.inf)
                for begin in range(0, count, block):
                    at = (starts[row, begin // block] + offset) * dim
                    for entry in range(begin, min(begin + block, count)):
                        key = all_keys[at : at + dim]
                        score = np.float32(0)
                        for n in range(dim):
                            score += query[n] * key[n]
                        scores[entry] = score * scale
                        highest = max(highest, score * scale)
                        at += dim
                total = np.float32(0)
                out[:] = 0
                for begin in range(0, count, block):
                    at = (starts[row, begin // block] + offset) * dim
                    for entry in range(begin, min(begin + block, count)):
                        value = all_values[at : at + dim]
                        weight = np.exp(scores[entry] - highest)
                        total += weight
                        for n in range(dim):
                            out[n] += weight * value[n]
                        at += dim
                for n in range(dim):
                    out[n] /= total

    place = "Tuple((int64[:, ::1], int64, int64[::1], int64[::1], int64))"
    rows, cached = "float32[:, :, ::1]", "float32[::1]"
    return compiled(attend, f"void({rows}, {rows}, {rows}, {cached}, {cached}, {place}, {rows})")
