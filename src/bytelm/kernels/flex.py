"""FlexAttention with block masks computed from the starts of documents.

A causal window within a document is one number for each query: the first key it sees,
``max(start of its document, i - window + 1)``. That number never decreases along a row, so the key
blocks that a block of queries sees, in part or in full, follow from its first and last query, and
no mask of length x length is built.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries and keys per block."""
LEAST_HEAD_DIM = 16
"""Smallest head that FlexAttention's kernels take."""


def flex_mask(documents: Int[Tensor, "batch length"], window: int | None) -> BlockMask:
    """Return the block mask of a causal :class:`~bytelm.kernels.masks.Mask`."""
    length = documents.shape[1]
    first_key = first_keys(documents, window)
    padding = -length % BLOCK
    # Queries past the end see nothing, so their blocks are not computed.
    first_key = functional.pad(first_key, (0, padding), value=length + padding)
    by_block = first_key.unflatten(1, (-1, BLOCK))
    last_query = by_block[:, :, -1].clone()
    last_query[:, -1] = first_key[:, length - 1]
    blocks = torch.arange(by_block.shape[1], device=documents.device)
    query_block, key_block = blocks[:, None], blocks
    # Visible, at least in part: from the block of the first query's first key to the diagonal.
    is_seen = (key_block <= query_block) & (key_block >= by_block[:, :, :1] // BLOCK)
    is_full = is_seen & (key_block < query_block) & (key_block * BLOCK >= last_query[..., None])
    is_partial = is_seen & ~is_full

    return BlockMask.from_kv_blocks(
        *_listed(is_partial),
        *_listed(is_full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda batch, _, query, key: (key <= query) & (key >= first_key[batch, query]),
        seq_lengths=(length, length),
    )


def first_keys(
    documents: Int[Tensor, "batch length"], window: int | None
) -> Int[Tensor, "batch length"]:
    """Return the first key that each query sees."""
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = torch.where(begins, index, 0).cummax(1).values
    return starts if window is None else torch.maximum(starts, index - window + 1)


def flex(
    queries: Float[Tensor, "batch heads length head_dim"],
    keys: Float[Tensor, "batch heads length head_dim"],
    values: Float[Tensor, "batch heads length head_dim"],
    mask: BlockMask,
) -> Float[Tensor, "batch heads length head_dim"]:
    """Run FlexAttention, compiling it by itself unless the caller is being compiled."""
    head_dim = queries.shape[-1]
    if head_dim < LEAST_HEAD_DIM:
        padding = (0, LEAST_HEAD_DIM - head_dim)
        queries, keys, values = (functional.pad(x, padding) for x in (queries, keys, values))
    return _flex(queries, keys, values, mask, head_dim**-0.5)[..., :head_dim]


def _flex(queries: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, scale: float) -> Any:
    if torch.compiler.is_compiling():
        return flex_attention(queries, keys, values, block_mask=mask, scale=scale)
    # Each kind of model and pass is compiled separately, and a process may use several.
    with torch._dynamo.config.patch(recompile_limit=256):
        return _compiled()(queries, keys, values, block_mask=mask, scale=scale)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of visible key blocks per query block, and indices of these first."""
    counts = blocks.sum(-1, dtype=torch.int32)[:, None]
    order = blocks.int().sort(dim=-1, descending=True, stable=True).indices.int()[:, None]
    return counts, order.contiguous()
