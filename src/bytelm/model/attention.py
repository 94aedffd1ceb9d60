"""Self-attention, and the contexts it runs in.

A stack of layers is run in a context that provides, for each layer, the rotary factors of the
positions and the attention itself. Contexts of packed rows are made here, those of key-value caches
in :mod:`bytelm.inference.cache`, so layers depend neither on masks nor on caches.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from bytelm import kernels
from bytelm.config import BlockConfig, RopeScaling, StackConfig


@runtime_checkable
class LayerContext(Protocol):
    """Positions of a layer's vectors, and what they attend to."""

    @property
    def factors(self) -> Complex[Tensor, "batch length 1 half"]:
        """Rotary factors of the positions."""
        ...

    def attend(
        self,
        queries: Float[Tensor, "batch length heads head_dim"],
        keys: Float[Tensor, "batch length kv_heads head_dim"],
        values: Float[Tensor, "batch length kv_heads head_dim"],
    ) -> Float[Tensor, "batch length heads head_dim"]:
        """Attend from each position to all positions visible to it."""
        ...


@runtime_checkable
class StackContext(Protocol):
    """The context of each layer of a stack."""

    def __getitem__(self, layer: int) -> LayerContext: ...


class StackSpec(NamedTuple):
    """Shape of a stack of layers, as contexts need it."""

    num_layers: int
    kv_heads: int
    head_dim: int
    theta: float
    """Base of the rotary frequencies."""
    scaling: RopeScaling | None
    window: int | None
    """Positions visible to a position, itself included; ``None`` for all before it."""

    @classmethod
    def of(cls, config: StackConfig, window: int | None) -> "StackSpec":
        """Return the shape of a stack with a configuration."""
        return cls(
            num_layers=config.num_layers,
            kv_heads=config.kv_heads,
            head_dim=config.head_width,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            window=window,
        )

    def rotation(
        self, positions: Int[Tensor, "batch length"]
    ) -> Complex[Tensor, "batch length 1 half"]:
        """Return rotary factors ``exp(i * position * theta ** (-2 j / head_dim))``.

        Angles are computed in fp64, so that positions in the millions keep full precision.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device)
        frequencies = self.theta ** (-exponents / self.head_dim)
        if self.scaling is not None:
            frequencies = scale_frequencies(frequencies, self.scaling)
        angles = positions[..., None].double() * frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, :, None]

    def over_rows(
        self,
        documents: Int[Tensor, "batch length"],
        positions: Int[Tensor, "batch length"],
        blocks: Int[Tensor, "batch length"] | None = None,
    ) -> "RowsContext":
        """Return the context of whole packed rows.

        Args:
            documents: document of each position.
            positions: position of each in its document.
            blocks: blocks of bytes that see one another; see :class:`bytelm.kernels.Mask`.
        """
        at = None if blocks is None else positions
        mask = kernels.Mask(documents, self.window, blocks, at)
        return RowsContext(self.rotation(positions), kernels.plan_attention(mask))


class RowsContext(NamedTuple):
    """Context of packed rows: the same in every layer."""

    factors: Complex[Tensor, "batch length 1 half"]
    plan: kernels.AttentionPlan

    def __getitem__(self, layer: int) -> "RowsContext":  # pyright: ignore
        """Return the context of any layer."""
        return self

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend under the rows' mask."""
        return kernels.attention(queries, keys, values, self.plan)


def scale_frequencies(
    frequencies: Float[Tensor, " half"], scaling: RopeScaling
) -> Float[Tensor, " half"]:
    """Return rotary frequencies scaled for a longer context.

    With ``linear`` scaling every frequency is divided by ``factor``. With ``llama3`` a frequency of
    wavelength ``w = 2 pi / frequency`` is left alone where ``w < original_context / high``, divided
    where ``w > original_context / low``, and interpolated in between.
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share_kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (share_kept + (1 - share_kept) / scaling.factor)


def rotate(
    x: Float[Tensor, "batch length heads head_dim"],
    factors: Complex[Tensor, "batch length 1 half"],
    layout: str = "interleaved",
) -> Float[Tensor, "batch length heads head_dim"]:
    """Rotate each pair of dimensions by its position's angle, in fp32.

    Pairs are ``(x[2j], x[2j + 1])``, or ``(x[j], x[j + head_dim / 2])`` with layout ``half``.
    """
    axis = -1 if layout == "interleaved" else -2
    pairs = x.float().unflatten(-1, (-1, 2) if axis == -1 else (2, -1))
    real, imaginary = pairs.unbind(axis)
    cos, sin = torch.view_as_real(factors).unbind(-1)
    rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), axis)
    return rotated.flatten(-2).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm, ``weight * x / sqrt(mean(x**2) + eps)``, in the dtype of ``x``."""

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions and, optionally, grouped key-value heads."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.kv_heads, config.head_width
        self.head_dim = head_dim
        self.kv_heads = kv_heads
        self.rope_layout = config.rope_layout
        self.split = (heads, kv_heads, kv_heads)
        self.qkv = nn.Linear(config.dim, sum(self.split) * head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(heads * head_dim, config.dim, bias=config.out_bias)
        self.query_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Float[Tensor, "batch length dim"], context: LayerContext
    ) -> Float[Tensor, "batch length dim"]:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        queries, keys, values = heads.split(self.split, dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries = rotate(queries, context.factors, self.rope_layout)
        keys = rotate(keys, context.factors, self.rope_layout)
        return self.out(context.attend(queries, keys, values).flatten(2))
