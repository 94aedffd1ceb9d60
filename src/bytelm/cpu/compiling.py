"""Kernels that the package ``numba``, where it is installed, compiles for the CPU."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

MAX_THREADS = 2
"""Threads of ``torch`` up to which its operations are slower than a kernel, which has one."""


def is_worth_it(like: torch.Tensor) -> bool:
    """Whether there are kernels for tensors of this kind, faster than operations of ``torch``."""
    is_fitting = like.is_cpu and like.dtype == torch.float32
    return is_fitting and torch.get_num_threads() <= MAX_THREADS and has_numba()


@cache
def has_numba() -> bool:
    """Whether ``numba`` can be imported."""
    return importlib.util.find_spec("numba") is not None


@cache
def kernels() -> Any:
    """Return the module of kernels, importing ``numba``.

    Raises:
        ImportError: ``numba`` is not installed.
    """
    return importlib.import_module("bytelm.cpu.kernels")


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function of arrays and numbers, once for all processes if files can be written."""
    import numba

    # Sums in any order, so that they are vectorised; NaN and infinity stay what they are.
    fastmath = {"reassoc", "contract", "nsz"}
    options: dict[str, Any] = {"fastmath": fastmath, "nogil": True, "boundscheck": False}
    compile_function: Any = numba.njit
    try:
        return compile_function(**options, cache=True)(function)
    except RuntimeError:  # no folder for what is compiled can be written to
        return compile_function(**options)(function)
