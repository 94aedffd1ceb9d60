"""Time and memory of a slice of a run.

Memory is that of the process alone: anonymous pages on Linux, so that pages of memory-mapped text
and entropies, which any program may reuse, do not count. Time is both wall-clock time and the time
of the processors; on a busy machine the first exceeds the second.
"""

import re
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

INTERVAL = 0.1
"""Seconds between two measurements of memory."""
STATUS = Path("/proc/self/status")
ANONYMOUS, RESIDENT, DEVICE = "anonymous", "resident", "device"
"""Kinds of memory that a peak may be of."""


class Resources:
    """Time and peak memory of what runs within ``with``.

    On CUDA memory is what torch has allocated on the device; on Linux, the anonymous pages of this
    process, measured every :data:`INTERVAL` seconds; elsewhere, the peak of its resident pages,
    which counts mapped files too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._peak = 0

    def __enter__(self) -> "Resources":
        self._began = time.monotonic(), time.process_time()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def record(self) -> dict[str, Any]:
        """Return the seconds, the seconds of processors, the peak of memory and its kind."""
        wall, processors = self._began
        peak, kind = self._memory()
        return {
            "seconds": time.monotonic() - wall,
            "cpu_seconds": time.process_time() - processors,
            "peak_bytes": peak,
            "memory": kind,
        }

    def _memory(self) -> tuple[int, str]:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device), DEVICE
        now = anonymous_bytes()
        if now is not None:
            return max(self._peak, now), ANONYMOUS
        import resource  # not there on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, RESIDENT

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            now = anonymous_bytes()
            if now is None:
                return
            self._peak = max(self._peak, now)


def anonymous_bytes(status: Path = STATUS) -> int | None:
    """Return the anonymous memory of this process in bytes; ``None`` if the system does not say."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text("ascii"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
