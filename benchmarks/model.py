"""Suite `model`: the comparison model over whole rows, forward and forward + backward."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.settings import Settings
from benchmarks.subjects import (
    Inputs,
    Pair,
    build_pair,
    our_logits,
    random_inputs,
    shape_of,
    takes_part,
    their_logits,
)
from benchmarks.timing import Samples, measure
from bytelm.accounting import TRAINING_FACTOR, forward_flops

LENGTHS, QUICK_LENGTHS = (1024, 2048, 4096, 8192, 16384), (64, 128)
PEAK_SHAPE = (4096, 512, 1536)
"""Rows, inner and columns of the matrix product that stands for what the processor can do."""
PEAK_CALLS = 10
TOLERANCE = 1e-3
"""Largest difference of logits, whose standard deviation is about 1, between the two."""


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Time both implementations at every length."""
    pair = build_pair(shape_of(settings.quick), settings.device)
    results: dict[str, Any] = {
        "parameters": pair.num_parameters,
        "matmul": _matmul(settings),
        "gaps": {},
        "measurements": [],
    }
    for num_bytes in QUICK_LENGTHS if settings.quick else LENGTHS:
        row = random_inputs(num_bytes, settings.device)
        with_theirs = takes_part(settings, num_bytes)
        if with_theirs:
            results["gaps"][str(num_bytes)] = _gap(pair, row, settings)
        for name, passes in (("forward", forward), ("forward + backward", forward_backward)):
            report(f"model: {name} of {num_bytes:,} bytes")
            subjects = passes(pair, row, settings, with_theirs)
            samples = measure(subjects, settings.repeats, settings.device)
            flops = _flops(pair, row, name)
            results["measurements"].append(_measurement(row, name, flops, samples))
    results["matmul"]["samples"] += _matmul(settings)["samples"]
    return results


def forward(
    pair: Pair, row: Inputs, settings: Settings, with_theirs: bool
) -> dict[str, Callable[[], object]]:
    """Logits without gradients."""
    subjects: dict[str, Callable[[], object]] = {
        "ours": torch.no_grad()(partial(our_logits, pair.ours.blt, row, settings.precision))
    }
    if with_theirs:
        subjects["theirs"] = torch.no_grad()(partial(their_logits, pair.theirs, row))
    return subjects


def forward_backward(
    pair: Pair, row: Inputs, settings: Settings, with_theirs: bool
) -> dict[str, Callable[[], object]]:
    """Gradients of the cross-entropy for all weights of the BLT; clearing them counts as well."""

    def ours() -> None:
        next_id_loss(our_logits(pair.ours.blt, row, settings.precision), row.ids).backward()
        pair.ours.blt.zero_grad(set_to_none=True)

    def theirs() -> None:
        next_id_loss(their_logits(pair.theirs, row), row.ids).backward()
        pair.theirs.zero_grad(set_to_none=True)

    return {"ours": ours, "theirs": theirs} if with_theirs else {"ours": ours}


def next_id_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of the ids after each."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def _gap(pair: Pair, row: Inputs, settings: Settings) -> float:
    """Largest difference of logits; the two must compute the same thing to be compared."""
    ours = our_logits(pair.ours.blt, row, settings.precision)
    gap = float((ours - their_logits(pair.theirs, row)).abs().max())
    if settings.precision == "float32":
        assert gap < TOLERANCE, f"logits of {row.num_bytes} bytes differ by {gap}"
    return gap


def _flops(pair: Pair, row: Inputs, name: str) -> int:
    parts = forward_flops(pair.config, row.num_bytes, row.patches.num_patches)
    forward_only = sum(part.total for part in parts.values())
    return forward_only * (TRAINING_FACTOR if "backward" in name else 1)


def _measurement(row: Inputs, name: str, flops: int, samples: Samples) -> dict[str, Any]:
    return {
        "bytes": row.num_bytes,
        "patches": row.patches.num_patches,
        "pass": name,
        "flops": flops,
        "samples": samples,
    }


def _matmul(settings: Settings) -> dict[str, Any]:
    """The rate of one plain matrix product, before and after everything else."""
    rows, inner, columns = PEAK_SHAPE
    dtype = getattr(torch, settings.precision)
    a = torch.randn(rows, inner, device=settings.device, dtype=dtype)
    b = torch.randn(inner, columns, device=settings.device, dtype=dtype)

    def products() -> None:
        for _ in range(PEAK_CALLS):
            torch.mm(a, b)

    samples = measure({"matmul": products}, settings.repeats, settings.device)
    flops = 2 * rows * inner * columns * PEAK_CALLS
    return {"shape": list(PEAK_SHAPE), "flops": flops, "samples": samples["matmul"]}
