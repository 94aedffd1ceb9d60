"""Where metrics go: a JSON Lines file always, TensorBoard if asked for, a line on the screen."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from bytelm.errors import ConfigError

PLAIN_SECONDS = 10.0
"""Between lines where the output is not a terminal."""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Metrics that a :class:`JsonlSink` wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@runtime_checkable
class Sink(Protocol):
    """Somewhere metrics go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class JsonlSink:
    """One JSON object a line; what an earlier run wrote after ``resume_at`` bytes is dropped.

    A number that is not finite becomes null: JSON has no other word for it.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        if path.exists():
            # A power cut may have lost the end of the file: keep what is left of whole lines.
            kept = path.read_bytes()[:resume_at]
            os.truncate(path, kept.rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def position(self) -> int:
        """Bytes in the file, all of them on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Scalars for TensorBoard.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise ConfigError(
                "train.tensorboard needs TensorBoard: install bytelm[track]"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class LiveLine:
    """A progress bar with the latest figures; plain lines where there is no terminal."""

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        self._console = console
        self._title, self._total = title, total
        self._last_plain = time.monotonic()
        # On a narrow terminal the figures wrap; how far things are is always there whole.
        whole = Column(no_wrap=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}", table_column=whole),
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1)),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(escape(title), total=total, completed=done, figures="")
        self._first, self._began = done, time.monotonic()

    def __enter__(self) -> "LiveLine":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, done: int, figures: str) -> None:
        """Show how far things are."""
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, figures=figures)
            return
        now = time.monotonic()
        if done < self._total and now - self._last_plain < PLAIN_SECONDS:
            return
        self._last_plain = now
        left = (now - self._began) / max(done - self._first, 1) * (self._total - done)
        minutes, seconds = divmod(round(left), 60)
        self._console.print(
            f"{self._title} {done}/{self._total} {figures}, {minutes}:{seconds:02d} left",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


@runtime_checkable
class Preparation(Protocol):
    """How far a preparation of data is."""

    done_bytes: int
    total_bytes: int
    documents: int
    shards: int


@contextmanager
def preparation_bar(console: Console) -> Iterator[Callable[[Preparation], None]]:
    """A bar for the bytes of input read, and what to call with news."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("preparing", total=None)
        last_plain = time.monotonic()

        def report(state: Preparation) -> None:
            nonlocal last_plain
            description = f"{state.documents:,} documents, {state.shards} shards"
            if console.is_terminal:
                progress.update(
                    task,
                    completed=state.done_bytes,
                    total=state.total_bytes or None,
                    description=description,
                )
            elif time.monotonic() - last_plain > PLAIN_SECONDS:
                last_plain = time.monotonic()
                share = f", {state.done_bytes / state.total_bytes:.0%}" if state.total_bytes else ""
                console.print(f"{description}{share}", highlight=False)

        yield report
