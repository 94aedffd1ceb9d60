"""Progress on the console: bars with the latest metrics, or plain lines without a terminal."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from bytelm.data import PreparationState
from bytelm.progress import Callback, Progress

PLAIN_SECONDS = 10.0
"""Seconds between lines if the output is not a terminal."""
SLOW = 3.0
"""How many times slower than at its best a run is when a warning is due."""


class ConsoleProgress(Progress):
    """Progress of work of several parts, shown on a console.

    Args:
        console: the console.
        num_stages: number of stages, if the work has numbered ones.
    """

    def __init__(self, console: Console, num_stages: int = 0) -> None:
        self._console, self._num_stages, self._stage = console, num_stages, 0

    def stage(self, title: str) -> None:
        """Print a numbered heading."""
        self._stage += 1
        number = Text(f"{self._stage}/{self._num_stages}", style="bold")
        self._console.print(Text.assemble(number, "  ", title))

    def note(self, text: str) -> None:
        """Print a line, below a heading if there is one."""
        indent = "      " if self._num_stages else ""
        self._console.print(indent + text, highlight=False, markup=False, soft_wrap=True)

    def training(self, title: str) -> Callback:
        """Return a progress bar for a training run."""
        return TrainingBar(self._console, f"     {title}" if self._num_stages else title)

    @contextmanager
    def preparing(self) -> Iterator[Callable[[PreparationState], None]]:
        """Show a progress bar of the bytes of input."""
        with _byte_bar(self._console, "preparing") as show:

            def report(state: PreparationState) -> None:
                description = f"{state.documents:,} documents, {state.shards} shards"
                show(description, state.done_bytes, state.total_bytes or None)

            yield report

    @contextmanager
    def measuring(self, title: str) -> Iterator[Callable[[int, int | None], None]]:
        """Show a progress bar of bytes of text."""
        with _byte_bar(self._console, title) as show:
            yield lambda done, total: show(title, done, total)

    @contextmanager
    def counting(
        self, title: str, total: int, done: int = 0
    ) -> Iterator[Callable[[int, str], None]]:
        """Show a progress bar of ``total`` steps, of which some may be done."""
        bar = Bar(self._console, title, total, done)
        try:
            yield bar.update
        finally:
            bar.stop()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show a spinner with the time so far, or a line now and then without a terminal."""
        console = self._console
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
        )
        if console.is_terminal:
            with RichProgress(*columns, console=console, transient=True) as bar:
                bar.add_task(what, total=None)
                yield
            return
        ended = threading.Event()
        watch = threading.Thread(target=_print_while, args=(console, what, ended), daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()


def _print_while(console: Console, what: str, ended: threading.Event) -> None:
    """Print what is going on, and for how long, now and then."""
    began = time.monotonic()
    while not ended.wait(PLAIN_SECONDS):
        seconds = time.monotonic() - began
        console.print(f"{what}: {seconds:.0f} s", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _byte_bar(console: Console, title: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a progress bar of bytes, or lines of it without a terminal.

    Yields:
        A function to call with a description, the bytes done, and all bytes (if known).
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with RichProgress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        last_plain = time.monotonic()

        def show(description: str, done: int, total: int | None) -> None:
            nonlocal last_plain
            if console.is_terminal:
                bar.update(task, completed=done, total=total, description=description)
            elif time.monotonic() - last_plain > PLAIN_SECONDS:
                last_plain = time.monotonic()
                share = f"{min(done / total, 1.0):.0%}" if total else f"{done:,} bytes"
                console.print(
                    f"{description}, {share}", highlight=False, markup=False, soft_wrap=True
                )

        yield show


class TrainingBar(Callback):
    """Progress bar of a training run, with its latest metrics and a line for each validation.

    Args:
        console: the console.
        title: title of the bar.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._bar: Bar | None = None
        self._best, self._has_warned = 0.0, False

    def on_begin(self, step: int, steps: int) -> None:
        """Show the bar."""
        self._bar = Bar(self._console, self._title, steps, step)

    def on_extend(self, step: int, superseded: Path | None) -> None:
        """Print what happens to the run."""
        text = f"  extended from the checkpoint of step {step}"
        if superseded is not None:
            text += f": later ones, and the metrics so far, are in {superseded}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_damaged(self, checkpoint: Path, reason: str) -> None:
        """Print why the run resumes from an earlier checkpoint."""
        text = f"  {reason}: resuming from the checkpoint before it; it is kept as {checkpoint}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics."""
        assert self._bar is not None
        if "validation_bpb" in metrics:
            self._bar.note(f"  step {step}: held-out {metrics['validation_bpb']:.4f} bpb")
        else:
            self._bar.update(step, _figures(metrics))
            self._warn_if_slow(metrics["bytes_per_second"])

    def _warn_if_slow(self, rate: float) -> None:
        """Say once that steps became far slower, and what can be done."""
        self._best = max(self._best, rate)
        if self._has_warned or rate * SLOW > self._best:
            return
        self._has_warned = True
        assert self._bar is not None
        self._bar.note(
            f"  steps take {self._best / rate:.1f} times as long as before: other programs may be "
            "using the processors. A stopped run resumes where it was; --threads 1 of "
            "`bytelm train` is faster on a busy computer"
        )

    def on_end(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


class Bar:
    """Progress bar with the latest metrics, or lines of them without a terminal."""

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        self._console = console
        self._title, self._total = title, total
        # On a narrow terminal only the metrics wrap.
        whole = Column(no_wrap=True)
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("{task.description}", style="bold", markup=False, table_column=whole),
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column(ratio=1)),
        )
        self._progress = RichProgress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(title, total=total, completed=done, figures="")
        self._first = done
        self._began = self._last_plain = time.monotonic()
        self._progress.start()

    def update(self, done: int, figures: str) -> None:
        """Show the amount done, and metrics."""
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, figures=figures)
            return
        now = time.monotonic()
        if done < self._total and now - self._last_plain < PLAIN_SECONDS:
            return
        self._last_plain = now
        left = (now - self._began) / max(done - self._first, 1) * (self._total - done)
        minutes, seconds = divmod(round(left), 60)
        shown = " ".join(filter(None, (self._title, f"{done}/{self._total}", figures)))
        self.note(f"{shown}, {minutes}:{seconds:02d} left")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def _figures(metrics: Mapping[str, float]) -> str:
    figures = f"{metrics['bpb']:.3f} bpb  {_si(metrics['bytes_per_second'])}B/s"
    if "patch_size" in metrics:
        figures += f"  {metrics['patch_size']:.2f} bytes/patch"
        figures += f"  padded {metrics['padded_bytes']:.0%} bytes"
        figures += f" {metrics['padded_patches']:.0%} patches"
    return figures


def _si(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"
