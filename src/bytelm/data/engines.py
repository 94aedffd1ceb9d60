"""Engines of preparation: what reads sections and writes blocks, and in which processes.

:mod:`bytelm.data.preparation` decides in reading order where each document goes; an engine does the
rest, with the same functions as every other, :func:`read_section` and :meth:`Writer.write_block`.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    CancelledError,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.data.dataset import Split
from bytelm.data.inputs import ReadOptions
from bytelm.data.journal import BlockRecord
from bytelm.data.records import Document
from bytelm.data.sections import Outline, Section, read_section
from bytelm.data.writing import Writer, shards_of
from bytelm.errors import DataError
from bytelm.workers import ignore_sigint, shielded

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Work:
    """What all sections and blocks of a preparation have in common."""

    out: Path
    """Folder of the shards."""
    read: ReadOptions
    block_bytes: int
    scorer: Path | None
    """Checkpoint of the scorer, if entropies are wanted."""
    reset_at_newline: bool

    device: Device
    """Device that scores."""

    def writer(self) -> Writer:
        """Return a writer of blocks."""
        return Writer(self.out, self.scorer, self.reset_at_newline, self.device)


@runtime_checkable
class Engine(Protocol):
    """Reads sections, and writes blocks, perhaps several at once."""

    num_workers: int
    """Blocks that are written at once."""

    def read(self, sections: Sequence[Section]) -> Iterator[Iterator[tuple[Outline, Any]]]:
        """Yield the blocks of each section, in order, with what :meth:`write` needs of each.

        The blocks of a section must be taken before the next section.

        Raises:
            DataError: an input or a record cannot be read.
        """
        ...

    def write(
        self, number: int, documents: Any, splits: Sequence[Split | None]
    ) -> "Future[BlockRecord]":
        """Write a block that was read; see :meth:`bytelm.data.writing.Writer.write_block`."""
        ...


class _LocalEngine:
    """Reads, scores and writes in this process, one block after the other."""

    num_workers = 1

    def __init__(self, work: Work) -> None:
        self._work, self._writer = work, work.writer()

    def read(
        self, sections: Sequence[Section]
    ) -> Iterator[Iterator[tuple[Outline, list[Document]]]]:
        for section in sections:
            yield read_section(section, self._work.read, self._work.block_bytes)

    def write(
        self, number: int, documents: list[Document], splits: Sequence[Split | None]
    ) -> "Future[BlockRecord]":
        future: Future[BlockRecord] = Future()
        future.set_result(self._writer.write_block(number, documents, splits))
        return future


START_AFTER = 0.25
"""Seconds of scoring after which other processes are started; that takes them seconds."""


@dataclass
class _Part:
    """A group of documents, and who scores it."""

    group: list[Document]
    future: "Future[NDArray[np.float32]] | None" = None
    """Its entropies, if it was offered to other processes."""
    entropies: NDArray[np.float32] | None = None
    """Its entropies, if it was scored here."""

    def take(self) -> bool:
        """Whether it can be scored here, since no other process has begun to."""
        return self.future is None or self.future.cancel()

    def result(self) -> NDArray[np.float32]:
        """Return the entropies, and forget them."""
        entropies, self.entropies = self.entropies, None
        if entropies is None:
            assert self.future is not None
            entropies, self.future = self.future.result(), None
        return entropies


class _SharedEngine(_LocalEngine):
    """Reads in this thread, writes in another, and scores there and in other processes.

    Others take the groups of a block from the beginning, this process those at the end; the
    entropies of a group do not depend on who computes them. ::

        groups of a block     0 1 2 3 4 5 6 7
        other processes       > > > > >
        this process                    < < <

    Others that are still starting hold nothing up, and short preparations start none.
    """

    def __init__(self, work: Work, num_others: int) -> None:
        super().__init__(work)
        self._num_others = num_others
        self._pool = ProcessPoolExecutor(
            num_others,
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(work, os.getpid()),
        )
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._others: set[BaseProcess] = set()
        self._starts: list[Future[None]] = []
        """Done when another process has started."""
        self._scoring_since: float | None = None
        self._is_ended = threading.Event()

    def write(
        self, number: int, documents: list[Document], splits: Sequence[Split | None]
    ) -> "Future[BlockRecord]":
        groups = self._writer.groups(shards_of(number, documents, splits))
        parts = [_Part(group) for group in groups]
        if self._has_others():
            self._offer(parts)
        return self._thread.submit(self._write, number, documents, splits, parts)

    def end(self) -> None:
        """End all work; what is not finished is lost."""
        self._is_ended.set()
        for one in tuple(self._others):  # a thread may be adding to it
            # They may still be starting, which takes seconds.
            one.kill()
        self._thread.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def _write(
        self,
        number: int,
        documents: list[Document],
        splits: Sequence[Split | None],
        parts: list[_Part],
    ) -> BlockRecord:
        self._score(parts)
        entropies = (part.result() for part in parts)
        return self._writer.write_block(number, documents, splits, entropies)

    def _score(self, parts: list[_Part]) -> None:
        """Score parts from the end, until others have begun with all that are left."""
        if self._scoring_since is None:
            self._scoring_since = time.monotonic()
        for index in reversed(range(len(parts))):
            if not self._starts and time.monotonic() - self._scoring_since > START_AFTER:
                self._starts = [self._submit(_do_nothing) for _ in range(self._num_others)]
            if self._has_others():
                self._offer(parts[: index + 1])
            if not parts[index].take():
                return
            parts[index].entropies = np.concatenate(list(self._entropies(parts[index].group)))

    def _entropies(self, group: list[Document]) -> Iterator[NDArray[np.float32]]:
        for entropies in self._writer.score(group):
            if self._is_ended.is_set():
                raise CancelledError
            yield entropies

    def _has_others(self) -> bool:
        return any(one.done() for one in self._starts)

    def _offer(self, parts: list[_Part]) -> None:
        for part in parts:
            if part.future is None:
                part.future = self._submit(_score_in_worker, part.group)

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        before = set(active_children())
        # The pool starts a process here if all others are busy.
        with shielded():
            future = self._pool.submit(function, *arguments)
        self._others.update(set(active_children()) - before)
        return future


@contextmanager
def local_engine(work: Work, num_workers: int) -> Iterator[Engine]:
    """Yield an engine of processes on this computer, of which this process is one.

    Raises:
        OSError: a file cannot be written.
        DataError: a worker died.
    """
    with _one_thread():
        if num_workers == 1 or work.scorer is None:
            yield _LocalEngine(work)
            return
        engine = _SharedEngine(work, num_workers - 1)
        try:
            yield engine
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, perhaps for lack of memory: run the same command again, "
                "which resumes where it stopped, with fewer --workers (or, from the start, with "
                "--cut-bytes)"
            ) from None
        finally:
            engine.end()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread in the block: more may give other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_writer: Writer | None = None


def _start_worker(work: Work, parent: int) -> None:
    global _writer
    ignore_sigint()
    torch.set_num_threads(1)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    _writer = work.writer()


def _die_with(parent: int) -> None:
    """End this worker when its parent process has ended, even by SIGKILL."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _do_nothing() -> None:
    """Be done when a process has started."""


def _score_in_worker(group: list[Document]) -> NDArray[np.float32]:
    assert _writer is not None
    return np.concatenate(list(_writer.score(group)))
