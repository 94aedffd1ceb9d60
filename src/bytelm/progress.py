"""Callbacks that long work reports its progress to.

A training run reports to :class:`Callback`, which metrics writers also implement
(:mod:`bytelm.tracking`); work of several parts, such as the quickstart and a study, reports to
:class:`Progress`. Nothing here prints: the command line's implementations are in
:mod:`bytelm.display`, and programs can have their own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def ignore(done: int) -> None:
    """Ignore a report of the amount of work that is done."""


class StopTraining(Exception):
    """Raised by a callback to end a run with a checkpoint, from which it can be resumed.

    Any method of a callback may raise it. The step in progress is completed first, with its
    metrics and its events to other callbacks; a validation that is due follows when the run is
    resumed.
    """


class BeginCooldown(Exception):
    """Raised by a callback to begin the cooldown of a wsd schedule, or to change its end.

    Checkpoints record it, so that their recipe is that of the run as it was.

    Args:
        steps: steps that remain, all of the cooldown.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(f"{steps} steps remain")
        self.steps = steps


class Callback:
    """Receiver of the events of a training run; every method does nothing unless overridden.

    A method may raise :class:`StopTraining` to end the run, or :class:`BeginCooldown` to end it
    after a cooldown.

    ::

        class StopWhenGood(Callback):
            def on_metrics(self, step, metrics):
                if metrics.get("validation_bpb", 9.0) < 1.5:
                    raise StopTraining

        train(recipe, folder, callbacks=[StopWhenGood()])
    """

    def on_begin(self, step: int, steps: int) -> None:
        """Called when a run begins, or resumes after ``step`` of ``steps`` steps."""

    def on_extend(self, step: int, superseded: Path | None) -> None:
        """Called before ``on_begin`` when a run is given more steps.

        Args:
            step: step of the checkpoint that it is extended from.
            superseded: folder that later checkpoints were moved to, if there were any.
        """

    def on_damaged(self, checkpoint: Path, reason: str) -> None:
        """Called before ``on_begin`` for a newer checkpoint that a run cannot resume from.

        Args:
            checkpoint: its folder, which was renamed.
            reason: what is wrong with it.
        """

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called with the metrics since the last call, or of held-out text (``validation_*``)."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Called when a checkpoint has been saved in ``folder``."""

    def on_end(self) -> None:
        """Called when the run has finished, stopped or failed."""


class Progress:
    """Receiver of the progress of work of several parts; this one ignores it."""

    def stage(self, title: str) -> None:
        """Begin the next part of the work."""

    def note(self, text: str) -> None:
        """Report a line of text."""

    def training(self, title: str) -> Callback:
        """Return the callback of a training run."""
        return Callback()

    @contextmanager
    def preparing(self) -> Iterator[Callable[[Any], None]]:
        """Yield the function that :func:`bytelm.data.prepare` reports to."""
        yield lambda state: None

    @contextmanager
    def measuring(self, title: str) -> Iterator[Callable[[int, int | None], None]]:
        """Yield a function to call with the bytes done, and of how many (if known)."""
        yield lambda done, total: None

    @contextmanager
    def counting(
        self, title: str, total: int, done: int = 0
    ) -> Iterator[Callable[[int, str], None]]:
        """Yield a function to call with the amount of ``total`` done, and a short description.

        Args:
            title: what is counted.
            total: the amount of work.
            done: the part of it that an earlier run has done.
        """
        yield lambda done, what: None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show that work of unknown length is in progress."""
        yield
