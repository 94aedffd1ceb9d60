"""Part `hardware`: what the device can do at best, to hold the other figures against."""

from functools import partial
from typing import Any

import torch

from benchmarks.parts.notes import Notes, Target
from benchmarks.summary import clocks, minimum
from benchmarks.timing import measure

DATASHEET = {"H100": 989e12, "H200": 989e12}
"""Dense bf16 FLOP/s by the vendor."""
REPEATS = 10


def run(target: Target, notes: Notes) -> None:
    """Rates of matrix products and of copying."""
    for precision in ("bfloat16", "float32"):
        with notes.attempt(precision):
            notes.put(f"{precision} FLOP/s", matmul_rate(target, precision))
    with notes.attempt("copy"):
        notes.put("copy, bytes/s read and written", copy_rate(target))
    if target.device == "cuda":
        notes.put("memory", dict(zip(("free", "total"), torch.cuda.mem_get_info(), strict=True)))
        notes.put("datasheet bfloat16 FLOP/s", datasheet_rate())


def matmul_rate(target: Target, precision: str = "bfloat16") -> float:
    """FLOP/s of a large square product of random matrices."""
    size = 128 if target.tiny else 8192
    dtype = getattr(torch, precision)
    a, b = (torch.randn(size, size, device=target.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best(target, partial(torch.mm, a, b))


def copy_rate(target: Target) -> float:
    """Bytes per second, those read and those written counted."""
    count = 2**16 if target.tiny else 2**30
    a = torch.zeros(count, dtype=torch.float32, device=target.device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _best(target, partial(b.copy_, a))


def datasheet_rate() -> float | None:
    """The vendor's bf16 rate of this device, where it is known here."""
    name = torch.cuda.get_device_name()
    return next((rate for chip, rate in DATASHEET.items() if chip in name), None)


def _best(target: Target, call: Any) -> float:
    """Seconds of the fastest call."""
    samples = measure({"call": call}, 2 if target.tiny else REPEATS, target.device)["call"]
    return minimum(samples, clocks(samples)[0])
