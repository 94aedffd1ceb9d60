"""Traces of some steps by torch's profiler, and snapshots of GPU memory.

::

    RUN/profile/rank-0.json            trace: chrome://tracing or ui.perfetto.dev show it
    RUN/profile/rank-0-memory.pickle   allocations on CUDA, for docs.pytorch.org/memory_viz
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"
MAX_ALLOCATIONS = 100_000
"""Allocations of memory that are remembered."""


class Profiler:
    """Profiler of the steps of one rank.

    Args:
        run: folder of the run.
        steps: first and last step to profile; ``None`` for none.
        rank: number of the rank.
    """

    def __init__(self, run: Path, steps: tuple[int, int] | None, rank: int) -> None:
        self._folder, self._steps, self._rank = run / FOLDER, steps, rank
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Begin if this is the first of the steps; called before each."""
        if self._steps is None or self._profile is not None or step != self._steps[0]:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def end(self, step: int | None = None) -> None:
        """Write the files if this is the last of the steps, or training ends (``None``)."""
        if self._profile is None or self._steps is None or step not in (None, self._steps[1]):
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"rank-{self._rank}.json"))
        if torch.cuda.is_available():
            path = self._folder / f"rank-{self._rank}-memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
