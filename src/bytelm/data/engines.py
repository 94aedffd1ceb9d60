"""Engines of preparation: what reads sections and writes blocks, and in which processes.

:mod:`bytelm.data.preparation` decides in reading order where each document goes; an engine does the
rest, with the same functions as every other, :func:`read_section` and :meth:`Writer.write_block`.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from bytelm.data.dataset import Split
from bytelm.data.inputs import ReadOptions
from bytelm.data.journal import BlockRecord
from bytelm.data.records import Document
from bytelm.data.sections import Outline, Section, read_section
from bytelm.data.writing import Writer
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
    """Reads in this process, and writes in worker processes, or here if one is wanted."""

    def __init__(
        self, work: Work, num_workers: int, submit: Callable[..., "Future[BlockRecord]"]
    ) -> None:
        self.num_workers = num_workers
        self._work, self._submit = work, submit

    def read(
        self, sections: Sequence[Section]
    ) -> Iterator[Iterator[tuple[Outline, list[Document]]]]:
        for section in sections:
            yield read_section(section, self._work.read, self._work.block_bytes)

    def write(
        self, number: int, documents: list[Document], splits: Sequence[Split | None]
    ) -> "Future[BlockRecord]":
        return self._submit(number, documents, splits)


@contextmanager
def local_engine(work: Work, num_workers: int) -> Iterator[Engine]:
    """Yield an engine of processes on this computer.

    Raises:
        OSError: a file cannot be written.
        DataError: a worker died.
    """
    if num_workers == 1:
        writer = work.writer()

        def run(
            number: int, documents: list[Document], splits: Sequence[Split | None]
        ) -> "Future[BlockRecord]":
            future: Future[BlockRecord] = Future()
            with _one_thread():
                future.set_result(writer.write_block(number, documents, splits))
            return future

        yield _LocalEngine(work, 1, run)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(work, os.getpid()),
    )
    workers: set[BaseProcess] = set()

    def submit(
        number: int, documents: list[Document], splits: Sequence[Split | None]
    ) -> "Future[BlockRecord]":
        before = set(active_children())
        # The pool starts a process here if all others are busy.
        with shielded():
            future = pool.submit(_write_in_worker, number, documents, splits)
        workers.update(set(active_children()) - before)
        return future

    try:
        yield _LocalEngine(work, num_workers, submit)
    except KeyboardInterrupt:
        # The next preparation writes the blocks in progress.
        for worker in workers:
            worker.kill()
        raise
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, perhaps for lack of memory: run the same command again, which "
            "resumes where it stopped, with fewer --workers (or, from the start, with --cut-bytes)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


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


def _write_in_worker(
    number: int, documents: list[Document], splits: Sequence[Split | None]
) -> BlockRecord:
    assert _writer is not None
    return _writer.write_block(number, documents, splits)
