"""Suite `memory`: the most a pass over one row holds beyond the model itself.

On the CPU every figure comes from a fresh process, `python -m benchmarks.memory`: the peak of its
resident memory (``VmHWM``), which Linux resets on request, less what was resident just before. On
CUDA it is what torch's allocator says. Gradients of the weights are part of forward + backward.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.model import forward, forward_backward
from benchmarks.settings import Settings
from benchmarks.subjects import Pair, build_pair, random_inputs, shape_of, takes_part

LENGTHS, QUICK_LENGTHS = (4096, 8192, 16384), (256,)
WARM_UP_BYTES, QUICK_WARM_UP_BYTES = 512, 64
ROOT = Path(__file__).parents[1]
CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
PASSES = {"forward": forward, "forward + backward": forward_backward}
QUICK_PASSES = ("forward + backward",)


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure each pass of each implementation alone."""
    if settings.device == "cpu" and not _can_reset():
        return {"note": "skipped: this system does not reset VmHWM", "measurements": []}
    measure = _in_fresh_process
    if settings.device == "cuda":
        measure = partial(peak_bytes, build_pair(shape_of(settings.quick), "cuda"))
    measurements = []
    for num_bytes in QUICK_LENGTHS if settings.quick else LENGTHS:
        for name in QUICK_PASSES if settings.quick else PASSES:
            report(f"memory: {name} of {num_bytes:,} bytes")
            peaks = {"ours": measure(settings, "ours", name, num_bytes)}
            if takes_part(settings, num_bytes):
                peaks["theirs"] = measure(settings, "theirs", name, num_bytes)
            measurements.append({"bytes": num_bytes, "pass": name, "peak_bytes": peaks})
    return {"measurements": measurements}


def _in_fresh_process(settings: Settings, subject: str, name: str, num_bytes: int) -> int:
    task = {"settings": asdict(settings), "subject": subject, "name": name, "num_bytes": num_bytes}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(task)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{subject}, {name} of {num_bytes} bytes: {result.stderr[-2000:]}")
    return int(result.stdout.split()[-1])


def peak_bytes(pair: Pair, settings: Settings, subject: str, name: str, num_bytes: int) -> int:
    """Peak memory of one pass, in this process, beyond what is there before it."""

    def prepare(length: int) -> Callable[[], object]:
        row = random_inputs(length, settings.device)
        return PASSES[name](pair, row, settings, subject == "theirs")[subject]

    prepare(QUICK_WARM_UP_BYTES if settings.quick else WARM_UP_BYTES)()
    run_pass = prepare(num_bytes)
    base = _reset(settings)
    run_pass()
    return _peak(settings) - base


def _reset(settings: Settings) -> int:
    """Forget the peak so far; memory in use."""
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _trim()
    CLEAR.write_text("5")
    return _peak(settings)


def _trim() -> None:
    """Give memory that was freed back, which a peak would otherwise grow into unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak(settings: Settings) -> int:
    if settings.device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    lines = STATUS.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _can_reset() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def main() -> None:
    """Measure what the one argument, JSON, describes, and print the peak in bytes."""
    task = json.loads(sys.argv[1])
    settings = Settings(**task.pop("settings"))
    torch.set_num_threads(settings.threads)
    pair = build_pair(shape_of(settings.quick), settings.device)
    print(peak_bytes(pair, settings, **task))


if __name__ == "__main__":
    main()
