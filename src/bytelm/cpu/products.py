"""Products of a few rows with a matrix, as a step of several requests takes them.

Libraries choose their blocks for many rows, and a dot product or a sum of columns for one. Between
the two, with 2 to 32 rows, their products take up to twice as long as reading the matrix does:
measured on one core, 4 rows by 512 inputs and 3072 outputs in 0.58 instead of 1.27 ms. These
kernels read the matrix once, in the order in which it is stored, and need the package ``numba``;
without it, with many threads, or elsewhere, the products are those of ``torch``.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bytelm.cpu.compiling import is_worth_it, kernels

MAX_ROWS = 32
"""Rows up to which the kernel for matrices stored by columns is faster."""
MAX_ROWS_BY_ROWS = 8
"""Rows up to which the kernel for matrices stored by rows is faster."""


def add_product(
    out: Float[Tensor, "rows outputs"],
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "outputs inputs"],
) -> Float[Tensor, "rows outputs"]:
    """Add ``x @ weight.T`` to ``out``, and return it."""
    chosen = choose(weight, len(x))
    if chosen is None:
        return torch.addmm(out, x, weight.T, out=out)
    kernel, matrix = chosen
    kernel(*(one.detach().numpy() for one in (x.contiguous(), matrix, out)))
    return out


def norm_linear_of_few(
    x: Float[Tensor, "*shape dim"],
    norm: Float[Tensor, " dim"],
    weight: Float[Tensor, "outputs dim"],
    eps: float,
) -> Float[Tensor, "*shape outputs"] | None:
    """Return :func:`bytelm.kernels.norm_linear` of the slots of one patch of each of several rows.

    ``None`` if there is no kernel for that, and for a single row: what a document alone gets does
    not depend on how its weights are stored.
    """
    rows = x.shape[:-1].numel()
    is_step = x.dim() == 4 and x.shape[0] > 1 and x.shape[1] == 1 and not torch.is_grad_enabled()
    if not is_step or weight.is_contiguous() or choose(weight, rows) is None:
        return None
    out = torch.empty(*x.shape[:-1], weight.shape[0])
    given = x.reshape(rows, -1), norm, weight
    normed = np.empty((rows, x.shape[-1]), np.float32)
    arrays = (one.detach().numpy() for one in given)
    kernels().norm_linear(*arrays, eps or 0.0, normed, out.view(rows, -1).numpy())
    return out


def choose(weight: Tensor, rows: int) -> tuple[Callable[..., None], Tensor] | None:
    """Return a kernel that is faster for so many rows, and the matrix as it wants it."""
    if rows == 1 or not is_worth_it(weight):
        return None
    if weight.T.is_contiguous() and rows <= MAX_ROWS:
        return kernels().add_by_columns, weight.T
    if weight.is_contiguous() and rows <= MAX_ROWS_BY_ROWS:
        return kernels().add_by_rows, weight
    return None
