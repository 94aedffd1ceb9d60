"""Products of a few rows with a matrix, as a step of several requests takes them.

Libraries choose their blocks for many rows, and a dot product or a sum of columns for one. Between
the two, with 2 to 32 rows, their products take up to twice as long as reading the matrix does:
measured on one core, 4 rows by 512 inputs and 3072 outputs in 0.58 instead of 1.27 ms. These
kernels read the matrix once, in the order in which it is stored, and need the package ``numba``;
without it, with many threads, or elsewhere, the products are those of ``torch``.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bytelm.cpu.compiling import compiled, is_worth_it

MAX_ROWS = 32
"""Rows up to which the kernel for matrices stored by columns is faster."""
MAX_ROWS_BY_ROWS = 8
"""Rows up to which the kernel for matrices stored by rows is faster."""


def accumulation(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
    out: Float[Tensor, "rows outputs"],
) -> Callable[[], object]:
    """Return a function that adds ``x @ weight.T`` to ``out``, with whatever they then hold."""
    chosen = _choose(weight, len(x))
    if chosen is None:
        return lambda: torch.addmm(out, x, weight.T, out=out)
    kernel, matrix = chosen
    arguments = [one.detach().numpy() for one in (x, matrix, out)]
    return lambda: kernel(*arguments)


def add_product(
    out: Float[Tensor, "rows outputs"],
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
) -> Float[Tensor, "rows outputs"]:
    """Add ``x @ weight.T`` to ``out``, and return it."""
    accumulation(x.contiguous(), weight, out)()
    return out


def _choose(weight: Tensor, rows: int) -> tuple[Callable[..., None], Tensor] | None:
    """Return a kernel that is faster for so many rows, and the matrix as it wants it."""
    if rows == 1 or not is_worth_it(weight):
        return None
    by_columns, by_rows = compiled_kernels()
    if weight.T.is_contiguous() and rows <= MAX_ROWS:
        return by_columns, weight.T
    if weight.is_contiguous() and rows <= MAX_ROWS_BY_ROWS:
        return by_rows, weight
    return None


@cache
def compiled_kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """Compile the kernels for matrices stored by columns and by rows."""

    # Without annotations: numba compiles the functions themselves, not ones that check types.
    def add_by_columns(x, columns, out):  # noqa: ANN001, ANN202  # pyright: ignore
        rows, inputs = x.shape
        outputs = columns.shape[1]
        whole = inputs // 4 * 4
        # Four columns times two rows fit into the registers.
        for k in range(0, whole, 4):
            for row in range(0, rows - 1, 2):
                a0, a1, a2, a3 = x[row, k], x[row, k + 1], x[row, k + 2], x[row, k + 3]
                b0, b1 = x[row + 1, k], x[row + 1, k + 1]
                b2, b3 = x[row + 1, k + 2], x[row + 1, k + 3]
                for n in range(outputs):
                    w0, w1 = columns[k, n], columns[k + 1, n]
                    w2, w3 = columns[k + 2, n], columns[k + 3, n]
                    out[row, n] += a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
                    out[row + 1, n] += b0 * w0 + b1 * w1 + b2 * w2 + b3 * w3
            if rows % 2:
                row = rows - 1
                a0, a1, a2, a3 = x[row, k], x[row, k + 1], x[row, k + 2], x[row, k + 3]
                for n in range(outputs):
                    w0, w1 = columns[k, n], columns[k + 1, n]
                    w2, w3 = columns[k + 2, n], columns[k + 3, n]
                    out[row, n] += a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
        for k in range(whole, inputs):
            for row in range(rows):
                for n in range(outputs):
                    out[row, n] += x[row, k] * columns[k, n]

    def add_by_rows(x, weight, out):  # noqa: ANN001, ANN202  # pyright: ignore
        rows, inputs = x.shape
        zero = np.float32(0)
        for n in range(len(weight)):
            row = 0
            while row + 4 <= rows:
                a, b, c, d = zero, zero, zero, zero
                for k in range(inputs):
                    w = weight[n, k]
                    a += w * x[row, k]
                    b += w * x[row + 1, k]
                    c += w * x[row + 2, k]
                    d += w * x[row + 3, k]
                out[row, n] += a
                out[row + 1, n] += b
                out[row + 2, n] += c
                out[row + 3, n] += d
                row += 4
            while row < rows:
                a = zero
                for k in range(inputs):
                    a += weight[n, k] * x[row, k]
                out[row, n] += a
                row += 1

    signature = "void(float32[:, ::1], float32[:, ::1], float32[:, ::1])"
    return compiled(add_by_columns, signature), compiled(add_by_rows, signature)
