"""Taking times: one process, subjects in turn, every sample kept."""

import gc
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.settings import Device

Sample = dict[str, float]
"""Seconds by clock: ``wall``, ``cpu`` of this process and, on CUDA, ``device`` between events."""
Samples = dict[str, list[Sample]]
"""By subject."""


def time_once(run: Callable[[], object], device: Device) -> Sample:
    """Run a function and time it, to the end of what it started on the device."""
    events = []
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if events:
        events[1].record()
        torch.cuda.synchronize()
    sample = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    if events:
        sample["device"] = events[0].elapsed_time(events[1]) / 1e3
    return sample


def measure(subjects: Mapping[str, Callable[[], object]], repeats: int, device: Device) -> Samples:
    """Time each subject ``repeats`` times, in turn: a, b, a, b, ...; one run each is thrown away.

    What slows the machine for a while then slows all of them, and the ratio of neighbours stands.
    """
    for run in subjects.values():
        run()
    samples: Samples = {name: [] for name in subjects}
    for _ in range(repeats):
        for name, run in subjects.items():
            gc.collect()
            samples[name].append(time_once(run, device))
    return samples
