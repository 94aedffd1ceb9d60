"""The layers every model here is made of: rotary attention, feed-forward, cross-attention.

Blocks are pre-norm and bias-free (paper section 4.7)::

    x = x + SelfAttention(RMSNorm(x))
    x = x + FeedForward(RMSNorm(x))

Modules know nothing of masks, caches, devices or configuration files: attention is handed an
:data:`~bytelm.model.attention.Attend`, the rest are plain functions of tensors. A norm is computed
with the projection that follows it (:mod:`bytelm.kernels.projections`), so layers take their norm's
weight along.
"""

from typing import Literal

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from bytelm import kernels
from bytelm.model.attention import Attend

Residual = Literal["single", "doubled"]


class SelfAttention(nn.Module):
    """Multi-head self-attention of normalised vectors, with rotary positions."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        norm: Float[Tensor, " dim"],
        factors: Complex[Tensor, "batch length 1 half"],
        attend: Attend,
    ) -> Float[Tensor, "batch length dim"]:
        heads = kernels.rotary_projection(x, norm, self.qkv.weight, factors)
        return self.out(attend(*heads).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU of normalised vectors, gate and up in one matrix."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch length dim"], norm: Float[Tensor, " dim"]
    ) -> Float[Tensor, "batch length dim"]:
        return kernels.feed_forward(x, norm, self.gate_up.weight, self.down.weight)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=kernels.NORM_EPS)
        self.attention = SelfAttention(dim=dim)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=kernels.NORM_EPS)
        self.feed_forward = FeedForward(dim=dim, hidden_dim=hidden_dim)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        factors: Complex[Tensor, "batch length 1 half"],
        attend: Attend,
    ) -> Float[Tensor, "batch length dim"]:
        x = x + self.attention(x, self.attention_norm.weight, factors, attend)
        return x + self.feed_forward(x, self.feed_forward_norm.weight)


class CrossAttention(nn.Module):
    """What the two cross-attentions between bytes and slots share (paper equations 5-8).

    Queries and keys are normalised separately and carry no positions. The inner width is
    ``num_heads * (dim // num_heads)``, which is below ``dim`` where heads do not divide it, as in
    the paper's 400M model. With the ``doubled`` residual of the released checkpoints a layer maps
    ``x`` to ``2 x + out`` in place of the paper's ``x + out``.
    """

    def __init__(self, *, dim: int, num_heads: int, residual: Residual) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.residual_scale = {"single": 1.0, "doubled": 2.0}[residual]
        inner_dim = num_heads * (dim // num_heads)
        self.query_norm = nn.RMSNorm(dim, eps=kernels.NORM_EPS)
        self.key_value_norm = nn.RMSNorm(dim, eps=kernels.NORM_EPS)
        self.query = nn.Linear(dim, inner_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.out = nn.Linear(inner_dim, dim, bias=False)

    def project_queries(
        self, x: Float[Tensor, "*shape dim"]
    ) -> Float[Tensor, "*shape heads head_dim"]:
        """Normalised queries, by head."""
        queries = kernels.norm_linear(x, self.query_norm.weight, self.query.weight)
        return queries.unflatten(-1, (self.num_heads, -1))

    def project_keys_values(
        self, x: Float[Tensor, "*shape dim"]
    ) -> tuple[Float[Tensor, "*shape heads head_dim"], Float[Tensor, "*shape heads head_dim"]]:
        """Normalised keys and values, by head."""
        both = kernels.norm_linear(x, self.key_value_norm.weight, self.key_value.weight)
        keys, values = both.unflatten(-1, (2 * self.num_heads, -1)).chunk(2, dim=-2)
        return keys, values

    def add_residual(
        self, x: Float[Tensor, "*shape dim"], out: Float[Tensor, "*shape heads head_dim"]
    ) -> Float[Tensor, "*shape dim"]:
        """``x`` with the attention output added."""
        return torch.add(self.out(out.flatten(-2)), x, alpha=self.residual_scale)


class EncoderCrossAttention(CrossAttention):
    """The slots of each patch attend to the patch's bytes."""

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
    """Each byte attends to the slots of the one latent it may read."""

    def forward(
        self,
        states: Float[Tensor, "batch bytes dim"],
        keys: Float[Tensor, "batch patches slots heads head_dim"],
        values: Float[Tensor, "batch patches slots heads head_dim"],
        decoder_ids: Int[Tensor, "batch bytes"],
    ) -> Float[Tensor, "batch bytes dim"]:
        """States with what they read; keys and values from :meth:`project_keys_values`."""
        queries = self.project_queries(states)
        out = kernels.decoder_cross_attention(queries, keys, values, decoder_ids)
        return self.add_residual(states, out)


def init_stack(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Every matrix as :func:`init_linear` has it; what branches add to the residual stream is 0.

    Blocks and cross-attentions so begin as the identity: a branch adds nothing before it has
    learned something. The paper is silent; small models of every kind gain by it (docs/log.md).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            init_linear(module.weight, generator)
    for module in model.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            nn.init.zeros_(module.out.weight)
        elif isinstance(module, FeedForward):
            nn.init.zeros_(module.down.weight)


def init_linear(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Truncated normal at 3 sigma, sigma = fan-in ** -0.5 (official code; the paper is silent)."""
    std = weight.shape[1] ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
