"""Normalised projections and the feed-forward, with the least memory kept for their gradients.

Eager PyTorch keeps every intermediate of ``W RMSNorm(x)`` and of SwiGLU for the backward pass, and
walks over all of them in main memory. On the CPU the functions here keep their inputs alone, work
on a few rows at a time, which stay in the cache, and compute the rest again in the backward pass.
Everywhere else (on CUDA ``torch.compile`` does the same and better), and for the tests, there are
their twins, ``reference_*``, in plain PyTorch; they can also be differentiated twice.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

NORM_EPS = 1e-5
CHUNK = 1024
"""Rows at a time; 512 to 2,048 are equally fast."""


def norm_linear(
    x: Float[Tensor, "*shape dim"], norm: Float[Tensor, " dim"], weight: Float[Tensor, "out dim"]
) -> Float[Tensor, "*shape out"]:
    """``weight @ (norm * x / sqrt(mean(x**2) + eps))`` for each vector."""
    if not is_eager_cpu(x):
        return reference_norm_linear(x, norm, weight)
    return _apply(_NormLinear, x, norm, weight)


def rotary_projection(
    x: Float[Tensor, "batch length dim"],
    norm: Float[Tensor, " dim"],
    weight: Float[Tensor, "out dim"],
    factors: Complex[Tensor, "batch length 1 half"],
) -> tuple[
    Float[Tensor, "batch length heads head_dim"],
    Float[Tensor, "batch length heads head_dim"],
    Float[Tensor, "batch length heads head_dim"],
]:
    """Queries and keys, rotated, and values, of normalised vectors.

    Args:
        x: not normalised yet.
        norm: weight of the norm.
        weight: rows of the queries, the keys and the values, by head.
        factors: rotary factor of each position and pair of dimensions.
    """
    if not is_eager_cpu(x):
        return reference_rotary_projection(x, norm, weight, factors)
    return _apply(_RotaryProjection, x, norm, weight, factors)


def feed_forward(
    x: Float[Tensor, "*shape dim"],
    norm: Float[Tensor, " dim"],
    gate_up: Float[Tensor, "two_hidden dim"],
    down: Float[Tensor, "dim hidden"],
) -> Float[Tensor, "*shape dim"]:
    """SwiGLU of normalised vectors: ``down(silu(gate(n)) * up(n))`` with ``n = RMSNorm(x)``."""
    if not is_eager_cpu(x):
        return reference_feed_forward(x, norm, gate_up, down)
    return _apply(_FeedForward, x, norm, gate_up, down)


def rotate(
    x: Float[Tensor, "batch length heads head_dim"],
    factors: Complex[Tensor, "batch length 1 half"],
) -> Float[Tensor, "batch length heads head_dim"]:
    """Rotate each pair ``(x[2j], x[2j+1])`` by its position's angle, in fp32."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = torch.view_as_real(factors).unbind(-1)
    rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return rotated.flatten(-2).to(x.dtype)


def reference_norm_linear(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    """Twin of :func:`norm_linear`."""
    normed = functional.rms_norm(x, norm.shape, norm.to(x.dtype), NORM_EPS)
    return functional.linear(normed, weight)


def reference_rotary_projection(
    x: Tensor, norm: Tensor, weight: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of :func:`rotary_projection`."""
    head_dim = 2 * factors.shape[-1]
    heads = reference_norm_linear(x, norm, weight).unflatten(-1, (-1, head_dim))
    queries, keys, values = heads.chunk(3, dim=2)
    return rotate(queries, factors), rotate(keys, factors), values


def reference_feed_forward(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Twin of :func:`feed_forward`."""
    gate, up = reference_norm_linear(x, norm, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down)


def is_eager_cpu(x: Tensor) -> bool:
    """Whether the functions with gradients of their own are meant for ``x``."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _apply(function: type[torch.autograd.Function], *arguments: Tensor) -> Any:
    """Run a function, past autograd's bookkeeping where no gradient is wanted."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(None, *arguments)


def _normed(x: Tensor, norm: Tensor) -> Tensor:
    """Normalised rows."""
    if len(x) != 1:
        unit, _ = _normalise(x)
        return unit.mul_(norm)
    # A single row costs more in calls than in arithmetic: as few of them as possible.
    row = x[0]
    return (x * norm).mul_((float(row.dot(row)) / len(row) + NORM_EPS) ** -0.5)


def _normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to unit root mean square, and the scales."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()
    return x * scale, scale


def _norm_backward(grad: Tensor, unit: Tensor, scale: Tensor, norm: Tensor, out: Tensor) -> Tensor:
    """Write the gradient of the rows to ``out`` and return that of the norm's weight.

    Args:
        grad: gradient of ``norm * unit``; overwritten.
        unit: from :func:`_normalise`, with ``scale``.
        scale: as above.
        norm: weight of the norm.
        out: where the gradient goes.
    """
    along = grad * unit
    mean = (along @ norm).div_(unit.shape[-1])[:, None]
    torch.addcmul(grad.mul_(norm), unit, mean, value=-1, out=out).mul_(scale)
    return along.sum(0)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx | None, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(x, norm, weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        rows = x.reshape(-1, x.shape[-1])
        for chunk, result in row_chunks(rows, _rows(out)):
            torch.mm(_normed(chunk, norm), weight.T, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, norm, weight = ctx.saved_tensors
        return _norm_linear_backward(grad.reshape(-1, weight.shape[0]), x, norm, weight)


def _norm_linear_backward(
    grad: Tensor, x: Tensor, norm: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input and of both weights, from that of the output's rows."""
    grad_x, grad_norm, grad_weight = (
        _empty_rows(x),
        torch.zeros_like(norm),
        torch.zeros_like(weight),
    )
    rows = x.reshape(-1, x.shape[-1])
    for chunk, grad_out, out in row_chunks(rows, grad, _rows(grad_x)):
        unit, scale = _normalise(chunk)
        grad_weight.addmm_(grad_out.T, unit * norm)
        grad_norm += _norm_backward(grad_out @ weight, unit, scale, norm, out)
    return grad_x, grad_norm, grad_weight


class _RotaryProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx | None, x: Tensor, norm: Tensor, weight: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if ctx is not None:
            ctx.save_for_backward(x, norm, weight, factors)
        heads = _NormLinear.forward(None, x, norm, weight)
        heads = heads.unflatten(-1, (3, -1, 2 * factors.shape[-1]))
        _pairs(heads[:, :, :2]).mul_(factors[:, :, None])
        queries, keys, values = heads.unbind(2)
        return queries, keys, values

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, norm, weight, factors = ctx.saved_tensors
        grad = torch.stack((queries, keys, values), 2)
        _pairs(grad[:, :, :2]).mul_(factors[:, :, None].conj())
        rows = grad.reshape(-1, weight.shape[0])
        return *_norm_linear_backward(rows, x, norm, weight), None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx | None, x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        if ctx is not None:
            ctx.save_for_backward(x, norm, gate_up, down)
        out = _empty_rows(x)
        rows = x.reshape(-1, x.shape[-1])
        for chunk, result in row_chunks(rows, _rows(out)):
            gate, up = (_normed(chunk, norm) @ gate_up.T).chunk(2, dim=-1)
            torch.mm(functional.silu(gate).mul_(up), down.T, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, norm, gate_up, down = ctx.saved_tensors
        grad_x = _empty_rows(x)
        grad_norm, grad_gate_up, grad_down = (torch.zeros_like(w) for w in (norm, gate_up, down))
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        for chunk, grad_out, out in row_chunks(rows, grad, _rows(grad_x)):
            unit, scale = _normalise(chunk)
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
        return grad_x, grad_norm, grad_gate_up, grad_down


def row_chunks(*tensors: Tensor, size: int = CHUNK) -> Iterable[tuple[Tensor, ...]]:
    """Corresponding rows of several tensors, a few at a time."""
    if len(tensors[0]) <= size:
        return (tensors,)
    return zip(*(x.split(size) for x in tensors), strict=True)


def _empty_rows(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
