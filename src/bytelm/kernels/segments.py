"""Segment operations: the linear-time heart of patch pooling and of both cross-attentions.

A segment is a patch; ``segment_ids`` gives the segment of each element and ``num_segments`` marks
elements that belong to none (padding, bytes of a patch still open). Every function costs
O(elements), never O(elements x segments); each has a readable twin, ``reference_*``, that builds
the dense mask and that the tests compare it with, gradients included.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def segment_max(
    values: Float[Tensor, "batch elements dim"],
    segment_ids: Int[Tensor, "batch elements"],
    num_segments: int,
) -> Float[Tensor, "batch segments dim"]:
    """Maximum over each segment's elements; 0 for an empty segment."""
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
    """Each patch's slots attend to that patch's bytes: a segment softmax.

    For slot ``s`` of patch ``j``, with the sums over the bytes ``i`` of patch ``j``::

        out[j, s] = sum_i softmax_i(queries[j, s] . keys[i] / sqrt(head_dim)) values[i]

    Scores, softmax and sums are in fp32: a patch may hold thousands of bytes, which a running sum
    in bf16 would lose. A patch without bytes yields 0. (Paper equations 5-8.)
    """
    batch, patches = queries.shape[:2]
    flat_ids, count = _flatten(encoder_ids, patches)
    padded = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, 0, 0, 1)).flatten(0, 1)
    queries_of_bytes = padded.index_select(0, flat_ids)
    scale = queries.shape[-1] ** -0.5
    scores = (queries_of_bytes.float() * keys.flatten(0, 1)[:, None].float()).sum(-1) * scale

    # The shift makes exp safe and cancels, so it takes no gradient.
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
    """Each byte attends to the slots of the one latent it may read: a gather and a small softmax.

    For byte ``i`` reading patch ``j = decoder_ids[i]``, with the sums over the slots ``s``::

        out[i] = sum_s softmax_s(queries[i] . keys[j, s] / sqrt(head_dim)) values[j, s]

    Scores and softmax are in fp32.
    """
    batch, patches = keys.shape[:2]
    offsets = torch.arange(batch, device=decoder_ids.device)[:, None] * patches
    flat_ids = (decoder_ids + offsets).flatten()
    keys_of_bytes = keys.flatten(0, 1).index_select(0, flat_ids)
    values_of_bytes = values.flatten(0, 1).index_select(0, flat_ids)
    scale = queries.shape[-1] ** -0.5
    scores = (queries.flatten(0, 1)[:, None].float() * keys_of_bytes.float()).sum(-1) * scale
    weights = scores.softmax(1)[..., None].to(values.dtype)
    return (weights * values_of_bytes).sum(1).unflatten(0, (batch, -1))


def _flatten(
    segment_ids: Int[Tensor, "batch elements"], num_segments: int
) -> tuple[Int[Tensor, " all_elements"], int]:
    """Segment ids over the whole batch, and how many: each row has one more, for strays."""
    batch = len(segment_ids)
    offsets = torch.arange(batch, device=segment_ids.device)[:, None] * (num_segments + 1)
    return (segment_ids + offsets).flatten(), batch * (num_segments + 1)


def reference_segment_max(
    values: Float[Tensor, "batch elements dim"],
    segment_ids: Int[Tensor, "batch elements"],
    num_segments: int,
) -> Float[Tensor, "batch segments dim"]:
    """Twin of :func:`segment_max` by a dense mask."""
    member = segment_ids[:, None] == torch.arange(num_segments)[:, None]
    masked = values[:, None].masked_fill(~member[..., None], float("-inf")).amax(2)
    return masked.masked_fill(~member.any(2)[..., None], 0.0)


def reference_encoder_cross_attention(
    queries: Float[Tensor, "batch patches slots heads head_dim"],
    keys: Float[Tensor, "batch bytes heads head_dim"],
    values: Float[Tensor, "batch bytes heads head_dim"],
    encoder_ids: Int[Tensor, "batch bytes"],
) -> Float[Tensor, "batch patches slots heads head_dim"]:
    """Twin of :func:`encoder_cross_attention` by a dense mask."""
    scores = torch.einsum("bpshd,bnhd->bpshn", queries, keys) * queries.shape[-1] ** -0.5
    member = encoder_ids[:, None] == torch.arange(queries.shape[1])[:, None]
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
    """Twin of :func:`decoder_cross_attention` by a dense mask."""
    scores = torch.einsum("bnhd,bpshd->bnhps", queries, keys) * queries.shape[-1] ** -0.5
    allowed = decoder_ids[..., None] == torch.arange(keys.shape[1])
    scores = scores.masked_fill(~allowed[:, :, None, :, None], torch.finfo(scores.dtype).min)
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, scores.shape[-2:])
    return torch.einsum("bnhps,bpshd->bnhd", weights, values)
