"""Record which checkpoint of a run has the lowest held-out bits per byte."""

from collections.abc import Mapping
from pathlib import Path

from bytelm.layout import BEST, best_step, step_folder
from bytelm.progress import Callback
from bytelm.storage import read_json, write_json

BPB = "validation_bpb"


class BestCheckpoint(Callback):
    """Callback that records the best checkpoint of a run, which is then kept.

    A step counts once it is both saved and validated, in either order. Of equals the first is best,
    so a resumed run records what an uninterrupted one does.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._best = float("inf")
        if best_step(run) is not None:
            self._best = float(read_json(run / BEST)[BPB])
        self._validated: dict[int, float] = {}

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the step if it was validated now, and is saved already."""
        if BPB in metrics:
            self._validated[step] = metrics[BPB]
            self._record(step)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Record the step if it was validated before it was saved."""
        self._record(step)

    def _record(self, step: int) -> None:
        bpb = self._validated.get(step)
        if bpb is not None and bpb < self._best and step_folder(self._run, step).is_dir():
            self._best = bpb
            write_json(self._run / BEST, {"step": step, BPB: bpb})
