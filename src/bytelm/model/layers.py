"""Layers of all models: transformer blocks, and cross-attention between bytes and patches.

Blocks are pre-norm (paper section 4.7)::

    x = x + SelfAttention(RMSNorm(x))
    x = x + FeedForward(RMSNorm(x))

Modules do not depend on masks, caches or devices: self-attention receives a
:class:`~bytelm.model.attention.LayerContext`, the rest are plain functions of tensors.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from bytelm import kernels
from bytelm.config import BlockConfig, StackConfig
from bytelm.model.attention import LayerContext, RMSNorm, SelfAttention

Residual = Literal["single", "doubled"]


class FeedForward(nn.Module):
    """SwiGLU feed-forward, ``down(silu(gate(x)) * up(x))``, with gate and up in one matrix."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=config.ffn_bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Float[Tensor, "batch length dim"], context: LayerContext
    ) -> Float[Tensor, "batch length dim"]:
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.feed_forward(self.feed_forward_norm(x))


def build_blocks(config: StackConfig) -> nn.ModuleList:
    """Return the blocks of a stack."""
    return nn.ModuleList(Block(config) for _ in range(config.num_layers))


class CrossAttention(nn.Module):
    """Base class of the two cross-attentions between bytes and slots (paper equations 5-8).

    Queries and keys are normalised separately and carry no positions. The inner width is
    ``num_heads * (dim // num_heads)``, which is below ``dim`` where heads do not divide it, as in
    the paper's 400M model. With the ``doubled`` residual of the released checkpoints a layer maps
    ``x`` to ``2 x + out`` instead of the paper's ``x + out``.
    """

    def __init__(self, *, dim: int, num_heads: int, residual: Residual, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.residual_scale = {"single": 1.0, "doubled": 2.0}[residual]
        inner_dim = num_heads * (dim // num_heads)
        self.query_norm = RMSNorm(dim, eps=eps)
        self.key_value_norm = RMSNorm(dim, eps=eps)
        self.query = nn.Linear(dim, inner_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.out = nn.Linear(inner_dim, dim, bias=False)

    def project_queries(
        self, x: Float[Tensor, "*shape dim"]
    ) -> Float[Tensor, "*shape heads head_dim"]:
        """Return normalised queries, by head."""
        return self.query(self.query_norm(x)).unflatten(-1, (self.num_heads, -1))

    def project_keys_values(
        self, x: Float[Tensor, "*shape dim"]
    ) -> tuple[Float[Tensor, "*shape heads head_dim"], Float[Tensor, "*shape heads head_dim"]]:
        """Return normalised keys and values, by head."""
        both = self.key_value(self.key_value_norm(x)).unflatten(-1, (2 * self.num_heads, -1))
        keys, values = both.chunk(2, dim=-2)
        return keys, values

    def add_residual(
        self, x: Float[Tensor, "*shape dim"], out: Float[Tensor, "*shape heads head_dim"]
    ) -> Float[Tensor, "*shape dim"]:
        """Return ``x`` with the attention output added."""
        return torch.add(self.out(out.flatten(-2)), x, alpha=self.residual_scale)


class EncoderCrossAttention(CrossAttention):
    """Cross-attention of the slots of each patch to the patch's bytes."""

    def forward(
        self,
        slots: Float[Tensor, "batch patches slots dim"],
        states: Float[Tensor, "batch bytes dim"],
        encoder_ids: Int[Tensor, "batch bytes"],
    ) -> Float[Tensor, "batch patches slots dim"]:
        keys, values = self.project_keys_values(states)
        queries = self.project_queries(slots)
        out = kernels.encoder_cross_attention(queries, keys, values, encoder_ids)
        return self.add_residual(slots, out)


class DecoderCrossAttention(CrossAttention):
    """Cross-attention of each byte to the slots of the one latent it may read."""

    def forward(
        self,
        states: Float[Tensor, "batch bytes dim"],
        keys: Float[Tensor, "batch patches slots heads head_dim"],
        values: Float[Tensor, "batch patches slots heads head_dim"],
        decoder_ids: Int[Tensor, "batch bytes"],
    ) -> Float[Tensor, "batch bytes dim"]:
        """Return the updated byte states.

        Args:
            states: byte states.
            keys: from :meth:`project_keys_values`.
            values: from the same.
            decoder_ids: patch whose latent each byte reads.
        """
        queries = self.project_queries(states)
        out = kernels.decoder_cross_attention(queries, keys, values, decoder_ids)
        return self.add_residual(states, out)


Initialisers = Iterator[tuple[Tensor, Callable[[Tensor], object]]]
"""Parameters, and for each a function that initialises a tensor of its shape."""


def stack_initialisers(model: nn.Module, generator: torch.Generator | None = None) -> Initialisers:
    """Yield the initialisation of a stack, in the order in which its values are drawn.

    Every matrix is initialised as :func:`init_linear` does, except residual outputs, which are 0.
    Norms are 1 and biases 0. A residual branch adds nothing before it has been trained, so blocks
    begin as the identity. The paper does not specify this; it improves small models of every kind
    (docs/log.md).

    Values do not depend on the tensor that they are written to, so a model that is spread over
    several devices can be initialised one whole parameter at a time, to the same bits.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag):
            yield module.weight, partial(init_linear, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            yield module.bias, nn.init.zeros_
        if isinstance(module, RMSNorm):
            yield module.weight, nn.init.ones_
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            yield module.out.weight, nn.init.zeros_
        elif isinstance(module, FeedForward):
            yield module.down.weight, nn.init.zeros_


def init_linear(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Initialise from a normal truncated at 3 sigma, sigma = fan-in ** -0.5 (official code)."""
    std = weight.shape[1] ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
