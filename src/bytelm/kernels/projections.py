"""Fused normalised projections and feed-forward for CPUs, which save little for backward.

Eager PyTorch saves every intermediate of ``W RMSNorm(x)`` and of SwiGLU for the backward pass, and
reads and writes all of them in main memory. The functions here save only their inputs, process
chunks of vectors that fit into the CPU's cache, and recompute the rest in the backward pass. On
CUDA, ``torch.compile`` is better. :mod:`bytelm.cpu` replaces the equivalent modules of a model,
which serve as references, with these functions.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK = 1024
"""Vectors per chunk; 512 to 2,048 are equally fast."""


def norm_linear(
    x: Float[Tensor, "*shape dim"],
    norm: Float[Tensor, " dim"],
    weight: Float[Tensor, "out dim"],
    eps: float,
) -> Float[Tensor, "*shape out"]:
    """Return ``weight @ RMSNorm(x)``, with ``RMSNorm(x) = norm * x / sqrt(mean(x**2) + eps)``."""
    return _apply(_NormLinear, x, norm, weight, eps)


def rotary_projection(
    x: Float[Tensor, "batch length dim"],
    norm: Float[Tensor, " dim"],
    weight: Float[Tensor, "out dim"],
    factors: Complex[Tensor, "batch length 1 half"],
    kv_heads: int,
    eps: float,
) -> tuple[
    Float[Tensor, "batch length heads head_dim"],
    Float[Tensor, "batch length kv_heads head_dim"],
    Float[Tensor, "batch length kv_heads head_dim"],
]:
    """Return rotated queries, rotated keys, and values of ``RMSNorm(x)``.

    Args:
        x: vectors before the norm.
        norm: weight of the norm.
        weight: matrix of queries, keys and values, by head.
        factors: rotary factor of each position and pair of dimensions ``2j``, ``2j + 1``.
        kv_heads: number of key heads, and of value heads.
        eps: epsilon of the norm.
    """
    return _apply(_RotaryProjection, x, norm, weight, factors, kv_heads, eps)


def feed_forward(
    x: Float[Tensor, "*shape dim"],
    norm: Float[Tensor, " dim"],
    gate_up: Float[Tensor, "two_hidden dim"],
    down: Float[Tensor, "dim hidden"],
    eps: float,
) -> Float[Tensor, "*shape dim"]:
    """Return the SwiGLU feed-forward ``down(silu(gate(n)) * up(n))`` with ``n = RMSNorm(x)``."""
    return _apply(_FeedForward, x, norm, gate_up, down, eps)


def is_eager_cpu(x: Tensor) -> bool:
    """Whether the fused CPU functions support ``x``: eager fp32 or fp64, without autocast."""
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Run a function, bypassing autograd if gradients are disabled."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(None, *arguments)


def _normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Return the RMSNorm of vectors."""
    if len(x) != 1:
        unit, _ = _normalise(x, eps)
        return unit.mul_(norm)
    # The overhead of calls dominates for a single vector: make as few as possible.
    vector = x[0]
    return (x * norm).mul_((float(vector.dot(vector)) / vector.shape[0] + eps) ** -0.5)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return vectors scaled to a root mean square of 1, and the scales."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


def _norm_backward(grad: Tensor, unit: Tensor, scale: Tensor, norm: Tensor, out: Tensor) -> Tensor:
    """Write the gradient of the norm's input to ``out``, and return that of its weight ``w``.

    With ``u = s x``, ``s = 1 / sqrt(mean(x**2) + eps)``, and ``g`` the gradient of ``w u``::

        dL/dx = s (w g - u mean(w g u))
        dL/dw = sum over vectors of g u

    Args:
        grad: ``g``; overwritten.
        unit: ``u``, from :func:`_normalise`.
        scale: ``s``, from the same.
        norm: ``w``.
        out: receives ``dL/dx``.
    """
    along = grad * unit
    mean = (along @ norm).div_(unit.shape[-1])[:, None]
    torch.addcmul(grad.mul_(norm), unit, mean, value=-1, out=out).mul_(scale)
    return along.sum(0)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(x, norm, weight)
            ctx.eps = eps
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = x.reshape(-1, x.shape[-1])
        for chunk, result in row_chunks(rows, _rows(out)):
            torch.mm(_normed(chunk, norm, eps), weight.T, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, norm, weight = ctx.saved_tensors
        rows = grad.reshape(-1, weight.shape[0])
        return *_norm_linear_backward(rows, x, norm, weight, ctx.eps), None


def _norm_linear_backward(
    grad: Tensor, x: Tensor, norm: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input and of both weights, given that of the output."""
    grad_x, grad_norm, grad_weight = (
        _empty_rows(x),
        torch.zeros_like(norm),
        torch.zeros_like(weight),
    )
    rows = x.reshape(-1, x.shape[-1])
    for chunk, grad_out, out in row_chunks(rows, grad, _rows(grad_x)):
        unit, scale = _normalise(chunk, eps)
        grad_weight.addmm_(grad_out.T, unit * norm)
        grad_norm += _norm_backward(grad_out @ weight, unit, scale, norm, out)
    return grad_x, grad_norm, grad_weight


class _RotaryProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        weight: Tensor,
        factors: Tensor,
        kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if ctx is not None:
            ctx.save_for_backward(x, norm, weight, factors)
            ctx.kv_heads, ctx.eps = kv_heads, eps
        heads = _NormLinear.forward(None, x, norm, weight, eps)
        heads = heads.unflatten(-1, (-1, 2 * factors.shape[-1]))
        # Queries and keys are rotated in place; the last heads are the values.
        _pairs(heads[:, :, :-kv_heads]).mul_(factors)
        queries, keys, values = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), 2)
        return queries, keys, values

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, norm, weight, factors = ctx.saved_tensors
        grad = torch.cat((queries, keys, values), 2)
        _pairs(grad[:, :, : -ctx.kv_heads]).mul_(factors.conj())
        rows = grad.reshape(-1, weight.shape[0])
        return *_norm_linear_backward(rows, x, norm, weight, ctx.eps), None, None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float
    ) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(x, norm, gate_up, down)
            ctx.eps = eps
        out = _empty_rows(x)
        rows = x.reshape(-1, x.shape[-1])
        for chunk, result in row_chunks(rows, _rows(out)):
            gate, up = (_normed(chunk, norm, eps) @ gate_up.T).chunk(2, dim=-1)
            torch.mm(functional.silu(gate).mul_(up), down.T, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, norm, gate_up, down = ctx.saved_tensors
        grad_x = _empty_rows(x)
        grad_norm, grad_gate_up, grad_down = (torch.zeros_like(w) for w in (norm, gate_up, down))
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        for chunk, grad_out, out in row_chunks(rows, grad, _rows(grad_x)):
            unit, scale = _normalise(chunk, ctx.eps)
            normed = unit * norm
            both = normed @ gate_up.T
            gate, up = both.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            grad_down.addmm_(grad_out.T, silu * up)
            grad_hidden = grad_out @ down
            # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
            slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
            grad_gate = slope.mul_(up).mul_(grad_hidden)
            torch.mul(grad_hidden, silu, out=up)
            gate.copy_(grad_gate)
            grad_gate_up.addmm_(both.T, normed)
            grad_norm += _norm_backward(both @ gate_up, unit, scale, norm, out)
        return grad_x, grad_norm, grad_gate_up, grad_down, None


def row_chunks(*tensors: Tensor, size: int = CHUNK) -> Iterable[tuple[Tensor, ...]]:
    """Return corresponding chunks of several tensors along the first axis."""
    if len(tensors[0]) <= size:
        return (tensors,)
    return zip(*(x.split(size) for x in tensors), strict=True)


def _empty_rows(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
