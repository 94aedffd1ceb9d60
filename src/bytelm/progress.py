"""Callbacks: what long work tells those who watch it.

Training has :class:`Callback`, which also records metrics (:mod:`bytelm.tracking`); work of several
parts, such as the quickstart and a study, has :class:`Progress`. Nothing here prints: the command
line's are in :mod:`bytelm.display`, and any program can have its own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class StopTraining(Exception):
    """Raised by a callback: the run ends with a checkpoint, and can be resumed."""


class Callback:
    """Told of the events of a training run; every method does nothing unless overridden.

    ::

        class StopWhenGood(Callback):
            def on_metrics(self, step, metrics):
                if metrics.get("validation_bpb", 9.0) < 1.5:
                    raise StopTraining

        train(recipe, folder, callbacks=[StopWhenGood()])
    """

    def on_begin(self, step: int, steps: int) -> None:
        """A run begins, or resumes, after ``step`` of ``steps`` steps."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics are there: of the steps since the last, or of held-out text (``validation_``).

        Raises:
            StopTraining: to end the run.
        """

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint was saved."""

    def on_end(self) -> None:
        """The run has ended: finished, stopped or failed."""


class Progress:
    """Told how work of several parts goes on; this one keeps it to itself."""

    def stage(self, title: str) -> None:
        """Begin another part of the work."""

    def note(self, text: str) -> None:
        """Mention something worth a line."""

    def training(self, title: str) -> Callback:
        """Return the callback of a training run."""
        return Callback()

    @contextmanager
    def preparing(self) -> Iterator[Callable[[Any], None]]:
        """Yield what :func:`bytelm.data.prepare` is to report to."""
        yield lambda state: None

    @contextmanager
    def counting(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Yield what to call with how much of ``total`` is done, and a word on it."""
        yield lambda done, what: None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Do something of unknown length."""
        yield
