"""Segment operations: patch pooling and both cross-attentions, in linear time.

A segment is a patch. ``segment_ids`` gives the segment of each element; the value ``num_segments``
marks elements in no segment (padding, bytes of an open patch). Every function costs O(elements),
not O(elements x segments), and has a readable reference implementation, ``reference_*``, with a
dense mask.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bytelm.kernels.projections import is_eager_cpu, row_chunks

CHUNK = 512
"""Bytes for which slots are gathered at once."""


def segment_max(
    values: Float[Tensor, "batch elements dim"],
    segment_ids: Int[Tensor, "batch elements"],
    num_segments: int,
) -> Float[Tensor, "batch segments dim"]:
    """Return the maximum over each segment's elements; 0 for an empty segment."""
    flat_ids, count = _flatten(segment_ids, num_segments)
    index = flat_ids[:, None].expand(-1, values.shape[-1])
    pooled = values.new_zeros(count, values.shape[-1])
    pooled = pooled.scatter_reduce(0, index, values.flatten(0, 1), "amax", include_self=False)
    return pooled.unflatten(0, (len(values), -1))[:, :num_segments]


def encoder_cross_attention(
    queries: Float[Tensor, "batch patches slots heads head_dim"],
    keys: Float[Tensor, "batch bytes heads head_dim"],
    values: Float[Tensor, "batch bytes heads head_dim"],
    encoder_ids: Int[Tensor, "batch bytes"],
) -> Float[Tensor, "batch patches slots heads head_dim"]:
    """Return the attention of each patch's slots to the patch's bytes, by a segment softmax.

    For slot ``s`` of patch ``j``, with the sums over the bytes ``i`` of patch ``j``::

        out[j, s] = sum_i softmax_i(queries[j, s] . keys[i] / sqrt(head_dim)) values[i]

    Scores, softmax and sums are in fp32, since a patch may have thousands of bytes, too many for a
    running sum in bf16. A patch without bytes yields 0. (Paper equations 5-8.)
    """
    if is_eager_cpu(queries) and torch.is_grad_enabled():
        # Recomputed in the backward pass: it is cheap, and would save four vectors per byte.
        return checkpoint(
            _segment_attention, queries, keys, values, encoder_ids, use_reentrant=False
        )
    return _segment_attention(queries, keys, values, encoder_ids)


def _segment_attention(
    queries: Tensor, keys: Tensor, values: Tensor, encoder_ids: Tensor
) -> Tensor:
    batch, patches = queries.shape[:2]
    flat_ids, count = _flatten(encoder_ids, patches)
    padded = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, 0, 0, 1)).flatten(0, 1)
    queries_of_bytes = padded.index_select(0, flat_ids)
    scale = queries.shape[-1] ** -0.5
    scores = (queries_of_bytes.float() * keys.flatten(0, 1)[:, None].float()).sum(-1) * scale

    # The shift avoids overflow and cancels out, so it needs no gradient.
    index = flat_ids[:, None, None].expand_as(scores)
    highest = scores.new_full((count, *scores.shape[1:]), float("-inf"))
    highest = highest.scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - highest.index_select(0, flat_ids)).exp()
    totals = weights.new_zeros(count, *weights.shape[1:]).index_add(0, flat_ids, weights)
    weighted = weights[..., None] * values.flatten(0, 1)[:, None].float()
    sums = weighted.new_zeros(count, *weighted.shape[1:]).index_add(0, flat_ids, weighted)
    out = sums / totals.clamp(min=torch.finfo(totals.dtype).tiny)[..., None]
    return out.to(values.dtype).unflatten(0, (batch, patches + 1))[:, :patches]


def decoder_cross_attention(
    queries: Float[Tensor, "batch bytes heads head_dim"],
    keys: Float[Tensor, "batch patches slots heads head_dim"],
    values: Float[Tensor, "batch patches slots heads head_dim"],
    decoder_ids: Int[Tensor, "batch bytes"],
) -> Float[Tensor, "batch bytes heads head_dim"]:
    """Return the attention of each byte to the slots of the one latent it may read.

    For byte ``i`` reading patch ``j = decoder_ids[i]``, with the sums over the slots ``s``::

        out[i] = sum_s softmax_s(queries[i] . keys[j, s] / sqrt(head_dim)) values[j, s]

    Scores and softmax are in fp32.
    """
    batch, patches = keys.shape[:2]
    flat_ids = decoder_ids + torch.arange(batch, device=keys.device)[:, None] * patches
    flat = (queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), flat_ids.flatten())
    if not is_eager_cpu(queries):
        out, *_ = _gathered_attention(*flat)
    elif torch.is_grad_enabled():
        out: Tensor = _GatheredAttention.apply(*flat)  # pyright: ignore[reportAssignmentType]
    else:
        out = _GatheredAttention.forward(None, *flat)
    return out.unflatten(0, (batch, -1))


def _gathered_attention(
    queries: Tensor, keys: Tensor, values: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the attention of bytes to the slots of their patch, its weights, and the slots."""
    keys, values = keys.index_select(0, ids), values.index_select(0, ids)
    scale = queries.shape[-1] ** -0.5
    scores = (queries[:, None].float() * keys.float()).sum(-1) * scale
    weights = scores.softmax(1)[..., None].to(values.dtype)
    return (weights * values).sum(1), weights, keys, values


class _GatheredAttention(torch.autograd.Function):
    """Attention to gathered slots, which are gathered again, in chunks, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(queries, keys, values, ids)
        out = queries.new_empty(queries.shape)
        for rows, index, result in row_chunks(queries, ids, out, size=CHUNK):
            result.copy_(_gathered_attention(rows, keys, values, index)[0])
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, ids = ctx.saved_tensors
        scale = queries.shape[-1] ** -0.5
        grad_queries = queries.new_empty(queries.shape)
        grad_keys, grad_values = keys.new_zeros(keys.shape), values.new_zeros(values.shape)
        for rows, index, grad_out, out in row_chunks(queries, ids, grad, grad_queries, size=CHUNK):
            result, weights, slot_keys, slot_values = _gathered_attention(rows, keys, values, index)
            grad_out = grad_out[:, None]
            along = (grad_out * slot_values).sum(-1) - (grad_out * result[:, None]).sum(-1)
            scores = (weights[..., 0] * along).mul_(scale)[..., None]
            torch.sum(slot_keys.mul_(scores), 1, out=out)
            grad_keys.index_add_(0, index, scores * rows[:, None])
            grad_values.index_add_(0, index, weights * grad_out)
        return grad_queries, grad_keys, grad_values, None


def _flatten(
    segment_ids: Int[Tensor, "batch elements"], num_segments: int
) -> tuple[Int[Tensor, " all_elements"], int]:
    """Return segment ids over the whole batch, and their number.

    Each row has one more segment, for the elements that are in none.
    """
    batch = len(segment_ids)
    offsets = torch.arange(batch, device=segment_ids.device)[:, None] * (num_segments + 1)
    return (segment_ids + offsets).flatten(), batch * (num_segments + 1)


def reference_segment_max(
    values: Float[Tensor, "batch elements dim"],
    segment_ids: Int[Tensor, "batch elements"],
    num_segments: int,
) -> Float[Tensor, "batch segments dim"]:
    """Reference implementation of :func:`segment_max` with a dense mask."""
    segments = torch.arange(num_segments, device=segment_ids.device)
    member = segment_ids[:, None] == segments[:, None]
    masked = values[:, None].masked_fill(~member[..., None], float("-inf")).amax(2)
    return masked.masked_fill(~member.any(2)[..., None], 0.0)


def reference_encoder_cross_attention(
    queries: Float[Tensor, "batch patches slots heads head_dim"],
    keys: Float[Tensor, "batch bytes heads head_dim"],
    values: Float[Tensor, "batch bytes heads head_dim"],
    encoder_ids: Int[Tensor, "batch bytes"],
) -> Float[Tensor, "batch patches slots heads head_dim"]:
    """Reference implementation of :func:`encoder_cross_attention` with a dense mask."""
    scores = torch.einsum("bpshd,bnhd->bpshn", queries, keys) * queries.shape[-1] ** -0.5
    patches = torch.arange(queries.shape[1], device=encoder_ids.device)
    member = encoder_ids[:, None] == patches[:, None]
    member = member[:, :, None, None]
    weights = scores.masked_fill(~member, torch.finfo(scores.dtype).min).softmax(-1)
    weights = weights.masked_fill(~member.any(-1, keepdim=True), 0.0)
    return torch.einsum("bpshn,bnhd->bpshd", weights, values)


def reference_decoder_cross_attention(
    queries: Float[Tensor, "batch bytes heads head_dim"],
    keys: Float[Tensor, "batch patches slots heads head_dim"],
    values: Float[Tensor, "batch patches slots heads head_dim"],
    decoder_ids: Int[Tensor, "batch bytes"],
) -> Float[Tensor, "batch bytes heads head_dim"]:
    """Reference implementation of :func:`decoder_cross_attention` with a dense mask."""
    scores = torch.einsum("bnhd,bpshd->bnhps", queries, keys) * queries.shape[-1] ** -0.5
    allowed = decoder_ids[..., None] == torch.arange(keys.shape[1], device=keys.device)
    scores = scores.masked_fill(~allowed[:, :, None, :, None], torch.finfo(scores.dtype).min)
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])
    return torch.einsum("bnhps,bpshd->bnhd", weights, values)
