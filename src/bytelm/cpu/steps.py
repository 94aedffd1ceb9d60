"""Decoding steps of a stack: one position of each of some rows, with few calls into torch.

A thread's buffers and views of the weights are allocated once for a number of rows. Results are
those of the modules.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from bytelm.cpu import int8
from bytelm.cpu.compiling import kernels
from bytelm.cpu.int8 import Int8Weight
from bytelm.cpu.products import MAX_ROWS_BY_ROWS, add_product, choose
from bytelm.model.blt import LocalEncoder
from bytelm.model.layers import Block

BLOCK_LAYERS = (
    "attention_norm",
    "attention.qkv",
    "attention.out",
    "feed_forward_norm",
    "feed_forward.gate_up",
    "feed_forward.down",
)
BLOCK_CONTAINERS = ("attention", "feed_forward")
CROSS_LAYERS = ("query_norm", "query", "out")
Weight = Any
"""A tensor, or the :class:`~bytelm.cpu.int8.Int8Weight` of a quantised layer."""


class Step:
    """Decoding step of a stack of blocks; returns the last block's output."""

    def __init__(self, owner: Any, weights: Iterator[Weight], rows: int) -> None:
        self._owner, self._rows = owner, rows
        self._weights = [tuple(next(weights) for _ in BLOCK_LAYERS) for _ in owner.blocks]
        self._blocks: list[_BlockStep] = []
        self._kernels: list[_BlockKernel] = []
        if all(_has_block_kernel(weights, rows) for weights in self._weights):
            # The blocks of a stack have one shape, and run one after another.
            hidden = self._weights[0][-1].shape[1]
            buffers = _BlockBuffers.of(owner.blocks[0], rows, hidden)
            self._kernels = [_BlockKernel(*one, buffers) for one in self._pairs()]

    def __call__(self, x: Float[Tensor, "rows dim"], *rest: Any) -> Any:
        (context,) = rest
        for block in self._over(context):
            x = block(x)
        return x[:, None]

    def _pairs(self) -> Iterator[tuple[Block, tuple[Weight, ...]]]:
        return zip(self._owner.blocks, self._weights, strict=True)

    def _over(self, context: Any) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield each block with its place in a context."""
        in_place = context.in_place() if self._kernels else None
        if in_place is not None:
            factors = in_place.factors[:, 0, 0].numpy()
            place = in_place.entries.place(in_place.head_positions, self._kernels[0].kv_heads)
            for layer, block in enumerate(self._kernels):
                cached = in_place.keys[layer].view(-1), in_place.values[layer].view(-1)
                yield partial(block, cached=cached, place=place, factors=factors)
        else:
            if not self._blocks:
                self._blocks = [_BlockStep(*one, self._rows) for one in self._pairs()]
            factors = context.factors[:, 0]
            for layer, block in enumerate(self._blocks):
                yield partial(block, layer=layer, context=context, factors=factors)


class EncoderStep(Step):
    """Decoding step of a local encoder; returns the states of the layers that patches read."""

    def __init__(self, owner: LocalEncoder, weights: Iterator[Weight], rows: int) -> None:
        super().__init__(owner, weights, rows)
        self._num_read = owner.num_read

    def __call__(self, x: Float[Tensor, "rows dim"], *rest: Any) -> Any:
        (context,) = rest
        states = []
        for block in self._over(context):
            x = block(x)
            states.append(x[:, None])
        return states[-self._num_read :]


class TransformerStep(Step):
    """Decoding step of a transformer; returns the logits."""

    def __init__(self, owner: Any, weights: Iterator[Weight], rows: int) -> None:
        super().__init__(owner, weights, rows)
        self._logits = _NormLinear(next(weights), next(weights), owner.norm.eps, rows)

    def __call__(self, x: Float[Tensor, "rows dim"], *rest: Any) -> Any:
        (context,) = rest
        for block in self._over(context):
            x = block(x)
        return self._logits(x).to(torch.float32, copy=True)[:, None]


class DecoderStep(TransformerStep):
    """Decoding step of a local decoder, whose bytes each read one latent; returns the logits."""

    def __init__(self, owner: Any, weights: Iterator[Weight], rows: int) -> None:
        super().__init__(owner, weights, rows)
        self._crosses = [_CrossStep(cross, weights, rows) for cross in owner.cross_attention]

    def __call__(self, x: Float[Tensor, "rows dim"], *rest: Any) -> Any:
        readable, _, context = rest
        if not self._crosses:
            ((slots,),) = readable
            x = x + slots[:, 0, 0]
        for layer, block in enumerate(self._over(context)):
            if layer < len(self._crosses):
                x = self._crosses[layer](x, *readable[layer])
            x = block(x)
        return self._logits(x).to(torch.float32, copy=True)[:, None]


class _BlockStep:
    """Decoding step of a block."""

    def __init__(self, block: Block, weights: tuple[Weight, ...], rows: int) -> None:
        attention_norm, qkv, out, feed_forward_norm, gate_up, down = weights
        kv_heads, head_dim = block.attention.kv_heads, block.attention.head_dim
        self._project = _NormLinear(attention_norm, qkv, block.attention_norm.eps, rows)
        heads = self._project.out.view(rows, -1, head_dim)
        self._rotated = torch.view_as_complex(heads[:, :-kv_heads].unflatten(-1, (-1, 2)))
        keys, values = heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
        queries = heads[:, : -2 * kv_heads]
        if rows == 1:
            self._key, self._value = keys[0], values[0]
            self._attend_one = _Attend(queries[0].view(kv_heads, -1, head_dim))
        self._heads = queries[:, None], keys[:, None], values[:, None]
        self._out = _AddLinear(out)
        self._gate_up = _NormLinear(feed_forward_norm, gate_up, block.feed_forward_norm.eps, rows)
        self._gate, self._up = self._gate_up.out.chunk(2, dim=-1)
        self._down = _AddLinear(down)

    def __call__(
        self,
        x: Float[Tensor, "rows dim"],
        layer: int,
        context: Any,
        factors: Complex[Tensor, "rows 1 half"],
    ) -> Float[Tensor, "rows dim"]:
        self._project(x)
        self._rotated.mul_(factors)
        x = self._out(x, self._attend(layer, context))
        self._gate_up(x)
        hidden = nn.functional.silu(self._gate).mul_(self._up)
        return self._down(x, hidden)

    def _attend(self, layer: int, context: Any) -> Float[Tensor, "rows heads_by_head_dim"]:
        if len(self._rotated) > 1:
            return context[layer].attend(*self._heads).flatten(1)
        return self._attend_one(*context.append(layer, self._key, self._value))


class _CrossStep:
    """Decoding step of a decoder's cross-attention."""

    def __init__(self, cross: Any, weights: Iterator[Weight], rows: int) -> None:
        norm, query, out = (next(weights) for _ in CROSS_LAYERS)
        self._project = _NormLinear(norm, query, cross.query_norm.eps, rows)
        self._queries = self._project.out.view(rows, cross.num_heads, 1, -1)
        self._attend = _Attend(self._queries.flatten(0, 1))
        self._out = _AddLinear(out)
        self._residual_scale = cross.residual_scale
        self._read: tuple[Any, Any] = (None, None)
        self._kernel: Any = None
        if _are_wide((query, out), rows):
            given = norm.detach().numpy(), _as_array(query), _as_array(out)
            numbers = cross.query_norm.eps or 0.0, float(cross.residual_scale)
            shapes = (rows, len(norm)), (rows, query.shape[0]), (rows, query.shape[0])
            buffers = tuple(np.empty(shape, np.float32) for shape in shapes)
            self._kernel = kernels().decode_cross
            self._given = given, numbers, buffers

    def __call__(
        self,
        x: Float[Tensor, "rows dim"],
        keys: Float[Tensor, "rows 1 slots heads head_dim"],
        values: Float[Tensor, "rows 1 slots heads head_dim"],
    ) -> Float[Tensor, "rows dim"]:
        """Let each byte read the slots of one latent."""
        if self._kernel is not None:
            result = torch.empty(x.shape)
            read = (one[:, 0].contiguous().numpy() for one in (keys, values))
            self._kernel(x.contiguous().numpy(), *read, *self._given, result.numpy())
            return result
        self._project(x)
        if len(x) == 1:
            if self._read[0] is not keys:
                # Views: they also show values that are written to the cache later.
                views = keys[0, 0].transpose(0, 1), values[0, 0].transpose(0, 1)
                self._read = (keys, views)
            mixed = self._attend(*self._read[1])
        else:
            scores = (self._queries * keys[:, 0].transpose(1, 2)).sum(-1, keepdim=True)
            weights = scores.mul_(keys.shape[-1] ** -0.5).softmax(2)
            mixed = (weights * values[:, 0].transpose(1, 2)).sum(2).flatten(1)
        return self._out(x, mixed, self._residual_scale)


class _BlockBuffers(NamedTuple):
    """What a kernel writes between the parts of a block."""

    between: tuple[Any, ...]
    """See :func:`bytelm.cpu.kernels.decode_block`."""
    hidden: Float[Tensor, "rows hidden"]

    @classmethod
    def of(cls, block: Block, rows: int, hidden: int) -> "_BlockBuffers":
        """Allocate the buffers of a block's shape."""
        attention = block.attention
        dim, head_dim = len(block.attention_norm.weight), attention.head_dim
        heads = rows, sum(attention.split), head_dim
        inner = rows, attention.split[0] * head_dim
        shapes = (rows, dim), heads, inner, (rows, 2 * hidden)
        between = tuple(np.empty(shape, np.float32) for shape in shapes)
        return cls(between, torch.empty(rows, hidden))


class _BlockKernel:
    """Decoding step of a block in one call of :func:`bytelm.cpu.kernels.decode_block`."""

    def __init__(self, block: Block, weights: tuple[Weight, ...], buffers: _BlockBuffers) -> None:
        self.kv_heads = block.attention.kv_heads
        self._weights = tuple(map(_as_array, weights))
        self._eps = block.attention_norm.eps or 0.0, block.feed_forward_norm.eps or 0.0
        self._buffers, self._down = buffers, weights[-1]
        is_int8 = isinstance(self._down, Int8Weight)
        self._has_down = is_int8 or len(buffers.hidden) <= MAX_ROWS_BY_ROWS

    def __call__(
        self,
        x: Float[Tensor, "rows dim"],
        cached: tuple[Tensor, Tensor],
        place: tuple[Any, ...],
        factors: Any,
    ) -> Float[Tensor, "rows dim"]:
        out, hidden = torch.empty(x.shape), self._buffers.hidden
        kernels().decode_block(
            x.contiguous().numpy(),
            factors,
            (cached[0].numpy(), cached[1].numpy()),
            place,
            self._weights,
            self._eps,
            self._buffers.between,
            self._has_down,
            out.numpy(),
            hidden.numpy(),
        )
        return out if self._has_down else torch.addmm(out, hidden, self._down.T, out=out)


def _has_block_kernel(weights: tuple[Weight, ...], rows: int) -> bool:
    """Whether a block's matrices are stored as the kernel reads them, and are faster that way."""
    _, *wide, _, gate_up, down = weights
    wide.append(gate_up)
    is_int8 = isinstance(down, Int8Weight)
    if isinstance(wide[0], Int8Weight) != is_int8 or not _are_wide(wide, rows):
        return False
    return is_int8 or down.is_contiguous()


def _are_wide(matrices: Sequence[Weight], rows: int) -> bool:
    """Whether all matrices are stored by columns, for a kernel, or all are quantised.

    Others have kernels as well, but every combination is compiled by itself.
    """
    if all(isinstance(matrix, Int8Weight) for matrix in matrices):
        return rows <= int8.MAX_ROWS
    if any(isinstance(matrix, Int8Weight) or matrix.is_contiguous() for matrix in matrices):
        return False
    return all(choose(matrix, rows) is not None for matrix in matrices)


def _as_array(weight: Weight) -> Any:
    """Return a matrix as the kernels take it."""
    return weight.arrays if isinstance(weight, Int8Weight) else weight.detach().numpy()


class _NormLinear:
    """:func:`bytelm.kernels.norm_linear` of single positions, written to a buffer."""

    def __init__(self, norm: Tensor, weight: Weight, eps: float | None, rows: int) -> None:
        self._norm, self._dim, self._eps = norm, norm.shape[0], eps or 0.0
        self._weight: Any = None if isinstance(weight, Int8Weight) else weight.T
        self._normed = norm.new_empty(rows, self._dim)
        self.out = norm.new_empty(rows, weight.shape[0])
        self._kernel: Any = None
        if _has_kernel(weight, rows):
            given = norm.detach().numpy(), _as_array(weight), self._eps
            buffers = self._normed.numpy(), self.out.numpy()
            self._kernel = lambda x: kernels().norm_linear(x, *given, *buffers)

    def __call__(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows out"]:
        if self._kernel is not None:
            self._kernel(x.contiguous().numpy())
            return self.out
        torch.mul(x, self._norm, out=self._normed)
        if len(x) == 1:
            vector = x[0]
            # The norm's scale is applied as a factor of the product.
            scale = (float(vector.dot(vector)) / self._dim + self._eps) ** -0.5
            return torch.addmm(
                self.out, self._normed, self._weight, beta=0, alpha=scale, out=self.out
            )
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        self._normed.mul_(norms.square_().div_(self._dim).add_(self._eps).rsqrt_())
        return torch.mm(self._normed, self._weight, out=self.out)


def _has_kernel(weight: Weight, rows: int) -> bool:
    """Whether a matrix has a kernel for so many rows."""
    return isinstance(weight, Int8Weight) or choose(weight, rows) is not None


class _AddLinear:
    """A projection of single positions that is added to a residual stream."""

    def __init__(self, weight: Weight) -> None:
        self._is_int8 = isinstance(weight, Int8Weight)
        self._weight = weight

    def __call__(
        self, x: Float[Tensor, "rows dim"], inner: Float[Tensor, "rows inner"], scale: float = 1.0
    ) -> Float[Tensor, "rows dim"]:
        if self._is_int8:
            return torch.add(self._weight(inner), x, alpha=scale)
        if len(x) > 1:
            return add_product(x * scale, inner, self._weight)
        return torch.addmm(x, inner, self._weight.T, beta=scale)


class _Attend:
    """Attention of the queries in a buffer to given keys and values."""

    def __init__(self, queries: Float[Tensor, "kv_heads group head_dim"]) -> None:
        self._queries = queries.transpose(1, 2)
        self._scale = queries.shape[-1] ** -0.5
        self._none = queries.new_zeros(1, 1, 1)
        self._mixed = torch.empty_like(queries)
        self._flat = self._mixed.view(1, -1)

    def __call__(
        self,
        keys: Float[Tensor, "kv_heads seen head_dim"],
        values: Float[Tensor, "kv_heads seen head_dim"],
    ) -> Float[Tensor, "1 heads_by_head_dim"]:
        # Keys times queries, not queries times keys: whole rows of keys are read.
        scores = torch.baddbmm(self._none, keys, self._queries, beta=0, alpha=self._scale)
        torch.bmm(scores.softmax(1).transpose(1, 2), values, out=self._mixed)
        return self._flat
