"""Self-attention of packed rows under a :class:`~bytelm.kernels.masks.Mask`.

:func:`plan_attention` converts the mask to a plan for the device, once for all layers of a stack,
and :func:`attention` executes it:

- on the CPU, each document is processed by itself, in blocks of queries that see a fixed span of
  keys, so a window costs O(length x window) in time and memory; keys and values are views, not
  copies for each block;
- on other devices, FlexAttention is used with a block mask computed from the starts of documents;
- masks with ``blocks`` are made dense, for a few queries at a time.

:func:`reference_attention` is the dense reference implementation of all of them.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from bytelm.kernels.flex import flex, flex_mask
from bytelm.kernels.masks import Mask

QUERY_BLOCK = 128
"""Queries per block of windowed attention: 128 and 256 are fastest on CPUs for windows of 512."""
DENSE_QUERIES = 512
"""Queries whose mask is made dense at once."""


class Group(NamedTuple):
    """Blocks of queries of one size and the keys they see, all within one document.

    Block ``i`` has the queries from ``begin + i * block`` on, and sees the ``span`` keys that end
    at its own last query.
    """

    begin: int
    num_blocks: int
    block: int
    span: int
    allowed: Float[Tensor, "1 1 block span"] | None
    """0 or minus infinity for each query and key of a block; ``None`` for plain causal."""

    def queries(self, x: Tensor) -> Tensor:
        """Return blocks of ``[positions, heads, head_dim]``.

        Returns:
            A view ``[num_blocks, heads, block, head_dim]``.
        """
        rows = x[self.begin : self.begin + self.num_blocks * self.block]
        return rows.unflatten(0, (self.num_blocks, self.block)).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys that each block sees, which overlap.

        Returns:
            A view ``[num_blocks, heads, span, head_dim]``.
        """
        first = self.begin + self.block - self.span
        return x[first:].unfold(0, self.span, self.block)[: self.num_blocks].transpose(2, 3)

    def add_keys(self, x: Tensor, spans: Tensor) -> None:
        """Add ``spans``, laid out as by :meth:`keys`, to the positions of ``x``.

        For three blocks of 2 with a span of 4, positions 2 to 5 are in two spans each::

            block 0     0 1 2 3
            block 1         2 3 4 5
            block 2             4 5 6 7
            column 0    0 1 | 2 3 | 4 5      the first two keys of every span
            column 1    2 3 | 4 5 | 6 7      the last two
        """
        if self.num_blocks == 1:
            self.keys(x).add_(spans)
            return
        # The blocks of one column do not overlap, so each column is added at once.
        first = self.begin + self.block - self.span
        for offset in range(0, self.span, self.block):
            rows = x[first + offset :][: self.num_blocks * self.block]
            column = spans[:, :, offset : offset + self.block]
            rows.unflatten(0, (self.num_blocks, self.block)).transpose(1, 2).add_(column)


class Groups:
    """All groups of a batch.

    Not a tuple: compiled code would be made again for every length of one.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self.all = tuple(groups)


AttentionPlan = Groups | BlockMask | Mask
"""Plan of attention: groups (CPU), a block mask (FlexAttention), or the mask itself (dense)."""


def plan_attention(mask: Mask) -> AttentionPlan:
    """Return the plan of attention under a mask, which all layers of a stack can share."""
    if mask.blocks is not None:
        return mask
    if mask.documents.device.type == "cpu":
        make: Any = torch.compiler.disable(_groups)
        return make(mask.documents, mask.window)
    return flex_mask(mask.documents, mask.window)


def attention(
    queries: Float[Tensor, "batch length heads head_dim"],
    keys: Float[Tensor, "batch length kv_heads head_dim"],
    values: Float[Tensor, "batch length kv_heads head_dim"],
    plan: AttentionPlan,
) -> Float[Tensor, "batch length heads head_dim"]:
    """Return scaled dot-product attention, with scale ``1 / sqrt(head_dim)``.

    Each key-value head is shared by ``heads / kv_heads`` consecutive query heads.
    """
    group = queries.shape[2] // keys.shape[2]
    if group > 1:
        keys, values = (x.repeat_interleave(group, dim=2) for x in (keys, values))
    if isinstance(plan, BlockMask):
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        return flex(queries, keys, values, plan).transpose(1, 2)
    if isinstance(plan, Mask):
        return _dense(queries, keys, values, plan)
    run: Any = torch.compiler.disable(_blocked)
    return run(queries, keys, values, plan)


def reference_attention(
    queries: Float[Tensor, "batch length heads head_dim"],
    keys: Float[Tensor, "batch length kv_heads head_dim"],
    values: Float[Tensor, "batch length kv_heads head_dim"],
    mask: Mask,
) -> Float[Tensor, "batch length heads head_dim"]:
    """Reference implementation of :func:`attention` with a dense mask and an explicit softmax."""
    grouped = queries.unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, keys) * queries.shape[-1] ** -0.5
    allowed = mask.allowed(0, queries.shape[1])[:, None, None]
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, values).flatten(2, 3)


def _dense(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """Return attention under any mask, made dense for a few queries at a time."""
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    outputs = [
        functional.scaled_dot_product_attention(
            block,
            keys,
            values,
            attn_mask=mask.allowed(begin, begin + block.shape[2])[:, None],
        )
        for begin, block in zip(
            range(0, queries.shape[2], DENSE_QUERIES),
            queries.split(DENSE_QUERIES, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, 2).transpose(1, 2)


def _groups(documents: Int[Tensor, "batch length"], window: int | None) -> Groups:
    """Return the groups of every document, with positions counted over the whole batch."""
    if not documents.numel():
        return Groups(())
    changes = torch.ones_like(documents, dtype=torch.bool)
    changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = changes.flatten().nonzero().flatten().tolist()
    ends = [*starts[1:], documents.numel()]
    templates = _Templates(window)
    return Groups(
        group
        for begin, end in zip(starts, ends, strict=True)
        for group in templates.document(begin, end - begin)
    )


class _Templates:
    """Builder of the groups of documents, whose masks depend only on the window."""

    def __init__(self, window: int | None) -> None:
        self._window = window
        if window is not None:
            self._block = min(QUERY_BLOCK, window)
            blocks_before = -(-(window - 1) // self._block)
            self._before = blocks_before * self._block
            """Keys in a span before its block: whole blocks, so that spans are aligned."""

    def document(self, begin: int, length: int) -> Iterator[Group]:
        """Yield the groups of one document: its start, its whole blocks, and the remainder."""
        window = self._window
        if window is None or length <= window:
            yield Group(begin, 1, length, length, None)
            return
        head = min(max(self._before, self._block), length)
        is_causal = head <= window
        yield Group(begin, 1, head, head, None if is_causal else self._allowed(head, head))
        count, rest = divmod(length - head, self._block)
        begin += head
        if count:
            span = self._before + self._block
            yield Group(begin, count, self._block, span, self._allowed(self._block, span))
        if rest:
            begin += count * self._block
            span = self._before + rest
            yield Group(begin, 1, rest, span, self._allowed(rest, span))

    def _allowed(self, block: int, span: int) -> Float[Tensor, "1 1 block span"]:
        assert self._window is not None
        distance = torch.arange(span - block, span)[:, None] - torch.arange(span)
        seen = (distance >= 0) & (distance < self._window)
        return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]


def _blocked(queries: Tensor, keys: Tensor, values: Tensor, groups: Groups) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (queries, keys, values))
    is_training = torch.is_grad_enabled()
    run: Any = _BlockedAttention.apply if is_training else partial(_BlockedAttention.forward, None)
    out = run(q, k, v, groups.all)
    return out.unflatten(0, queries.shape[:2])


class _BlockedAttention(torch.autograd.Function):
    """Flash attention on the CPU over each group, adding gradients where spans overlap.

    It calls the operators of ``scaled_dot_product_attention`` on the CPU directly, since autograd
    would allocate a gradient of the whole row for every slice of keys.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, groups: tuple[Group, ...]
    ) -> Tensor:
        out = queries.new_empty(queries.shape)
        sums = []
        for group in groups:
            result, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                group.queries(queries),
                group.keys(keys),
                group.keys(values),
                0.0,
                group.allowed is None,
                attn_mask=_of(group.allowed, queries),
            )
            group.queries(out).copy_(result)
            sums.append(log_sum)
        if ctx is not None:
            ctx.groups = groups
            ctx.save_for_backward(queries, keys, values, out, *sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, out, *sums = ctx.saved_tensors
        grad_queries = queries.new_empty(queries.shape)
        grad_keys, grad_values = keys.new_zeros(keys.shape), values.new_zeros(values.shape)
        for group, log_sum in zip(ctx.groups, sums, strict=True):
            results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                group.queries(grad),
                group.queries(queries),
                group.keys(keys),
                group.keys(values),
                group.queries(out),
                log_sum,
                0.0,
                group.allowed is None,
                attn_mask=_of(group.allowed, queries),
            )
            group.queries(grad_queries).copy_(results[0])
            group.add_keys(grad_keys, results[1])
            group.add_keys(grad_values, results[2])
        return grad_queries, grad_keys, grad_values, None


def _of(allowed: Tensor | None, like: Tensor) -> Tensor | None:
    return None if allowed is None else allowed.to(like.dtype)
