"""Decoding steps of a stack: one position through all its blocks, with few calls into torch.

A thread's buffers and views of the weights are allocated once. Results are those of the modules.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

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


class Step:
    """Decoding step of a stack of blocks; returns the last block's output."""

    def __init__(self, owner: Any, weights: Iterator[Tensor]) -> None:
        self._blocks = [_BlockStep(block, weights) for block in owner.blocks]

    def __call__(self, x: Float[Tensor, "1 dim"], *rest: Any) -> Any:
        (context,) = rest
        for layer, block in enumerate(self._blocks):
            x = block(x, layer, context)
        return x[None]


class EncoderStep(Step):
    """Decoding step of a local encoder; returns the states of the layers that patches read."""

    def __init__(self, owner: LocalEncoder, weights: Iterator[Tensor]) -> None:
        super().__init__(owner, weights)
        self._num_read = owner.num_read

    def __call__(self, x: Float[Tensor, "1 dim"], *rest: Any) -> Any:
        (context,) = rest
        states = []
        for layer, block in enumerate(self._blocks):
            x = block(x, layer, context)
            states.append(x[None])
        return states[-self._num_read :]


class TransformerStep(Step):
    """Decoding step of a transformer; returns the logits."""

    def __init__(self, owner: Any, weights: Iterator[Tensor]) -> None:
        super().__init__(owner, weights)
        self._logits = _NormLinear(next(weights), next(weights), owner.norm.eps)

    def __call__(self, x: Float[Tensor, "1 dim"], *rest: Any) -> Any:
        (context,) = rest
        for layer, block in enumerate(self._blocks):
            x = block(x, layer, context)
        return self._logits(x).to(torch.float32, copy=True)[None]


class DecoderStep(TransformerStep):
    """Decoding step of a local decoder, for a byte that reads one latent; returns the logits."""

    def __init__(self, owner: Any, weights: Iterator[Tensor]) -> None:
        super().__init__(owner, weights)
        self._crosses = [_CrossStep(cross, weights) for cross in owner.cross_attention]

    def __call__(self, x: Float[Tensor, "1 dim"], *rest: Any) -> Any:
        readable, _, context = rest
        if not self._crosses:
            ((slots,),) = readable
            x = x + slots[0, :, 0]
        for layer, block in enumerate(self._blocks):
            if layer < len(self._crosses):
                x = self._crosses[layer](x, *readable[layer])
            x = block(x, layer, context)
        return self._logits(x).to(torch.float32, copy=True)[None]


class _BlockStep:
    """Decoding step of a block."""

    def __init__(self, block: Block, weights: Iterator[Tensor]) -> None:
        attention_norm, qkv, out, feed_forward_norm, gate_up, down = (
            next(weights) for _ in BLOCK_LAYERS
        )
        kv_heads, head_dim = block.attention.kv_heads, block.attention.head_dim
        self._project = _NormLinear(attention_norm, qkv, block.attention_norm.eps)
        heads = self._project.out.view(-1, head_dim)
        self._rotated = torch.view_as_complex(heads[:-kv_heads].unflatten(-1, (-1, 2)))
        self._key, self._value = heads[-2 * kv_heads : -kv_heads], heads[-kv_heads:]
        self._attend = _Attend(heads[: -2 * kv_heads].view(kv_heads, -1, head_dim))
        self._out = out.T
        self._gate_up = _NormLinear(feed_forward_norm, gate_up, block.feed_forward_norm.eps)
        self._gate, self._up = self._gate_up.out.chunk(2, dim=-1)
        self._down = down.T

    def __call__(
        self, x: Float[Tensor, "1 dim"], layer: int, context: Any
    ) -> Float[Tensor, "1 dim"]:
        self._project(x)
        self._rotated.mul_(context.factor)
        keys, values = context.append(layer, self._key, self._value)
        x = torch.addmm(x, self._attend(keys, values), self._out)
        self._gate_up(x)
        hidden = nn.functional.silu(self._gate).mul_(self._up)
        return torch.addmm(x, hidden, self._down, out=x)


class _CrossStep:
    """Decoding step of a decoder's cross-attention."""

    def __init__(self, cross: Any, weights: Iterator[Tensor]) -> None:
        norm, query, out = (next(weights) for _ in CROSS_LAYERS)
        self._project = _NormLinear(norm, query, cross.query_norm.eps)
        self._attend = _Attend(self._project.out.view(cross.num_heads, 1, -1))
        self._out = out.T
        self._residual_scale = cross.residual_scale
        self._read: tuple[Any, Any] = (None, None)

    def __call__(
        self,
        x: Float[Tensor, "1 dim"],
        keys: Float[Tensor, "1 1 slots heads head_dim"],
        values: Float[Tensor, "1 1 slots heads head_dim"],
    ) -> Float[Tensor, "1 dim"]:
        """Let the byte read the slots of one latent."""
        if self._read[0] is not keys:
            # Views: they also show values that are written to the cache later.
            views = keys[0, 0].permute(1, 2, 0), values[0, 0].transpose(0, 1)
            self._read = (keys, views)
        self._project(x)
        mixed = self._attend(*self._read[1])
        return torch.addmm(x, mixed, self._out, beta=self._residual_scale)


class _NormLinear:
    """:func:`bytelm.kernels.norm_linear` of one position, written to a buffer."""

    def __init__(self, norm: Tensor, weight: Tensor, eps: float | None) -> None:
        self._norm, self._dim, self._eps = norm, norm.shape[0], eps or 0.0
        self._weight = weight.T
        self._normed = weight.new_empty(1, weight.shape[1])
        self.out = weight.new_empty(1, weight.shape[0])

    def __call__(self, x: Float[Tensor, "1 dim"]) -> Float[Tensor, "1 out"]:
        torch.mul(x, self._norm, out=self._normed)
        vector = x[0]
        # The norm's scale is applied as a factor of the product.
        scale = (float(vector.dot(vector)) / self._dim + self._eps) ** -0.5
        return torch.addmm(self.out, self._normed, self._weight, beta=0, alpha=scale, out=self.out)


class _Attend:
    """Attention of the queries in a buffer to given keys and values."""

    def __init__(self, queries: Float[Tensor, "kv_heads group head_dim"]) -> None:
        self._queries = queries
        self._scale = queries.shape[-1] ** -0.5
        self._none = queries.new_zeros(1, 1, 1)
        self._mixed = torch.empty_like(queries)
        self._flat = self._mixed.view(1, -1)

    def __call__(
        self,
        keys: Float[Tensor, "kv_heads head_dim seen"],
        values: Float[Tensor, "kv_heads seen head_dim"],
    ) -> Float[Tensor, "1 heads_by_head_dim"]:
        scores = torch.baddbmm(self._none, self._queries, keys, beta=0, alpha=self._scale)
        torch.bmm(scores.softmax(-1), values, out=self._mixed)
        return self._flat
