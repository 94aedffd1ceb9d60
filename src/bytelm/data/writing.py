"""Score and write shards as Arrow files, in worker processes."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from bytelm import codec
from bytelm.checkpoint import load_scorer
from bytelm.data.dataset import (
    ENTROPIES,
    SCHEMA,
    TRAINED,
    ShardRecord,
    SourceTotal,
    Split,
)
from bytelm.data.records import Document
from bytelm.errors import DataError
from bytelm.patching import Scorer
from bytelm.scoring import check_entropies, group_by_size, score_documents
from bytelm.scoring.documents import CHUNK
from bytelm.storage import atomic_file, file_hash
from bytelm.workers import ignore_sigint, shielded

SCORED_TOGETHER = 65_536
"""Positions of short documents that are scored at once."""


@dataclass(frozen=True)
class Shard:
    """Documents of one file."""

    name: str
    split: Split
    documents: list[Document]


@contextmanager
def writers(
    out: Path, scorer: Path | None, *, reset_at_newline: bool, num_workers: int
) -> Iterator[Callable[[Shard], "Future[ShardRecord]"]]:
    """Yield a function that submits shards to worker processes, or to this one if it is the only.

    Args:
        out: folder of the shards.
        scorer: checkpoint of the scorer, if entropies are wanted.
        reset_at_newline: whether a newline begins a new context for the scorer.
        num_workers: number of processes; 1 for this one.

    Raises:
        OSError: a file cannot be written.
        DataError: a worker died.
    """
    arguments = (out, scorer, reset_at_newline)
    if num_workers == 1:
        writer = Writer(*arguments)

        def run(shard: Shard) -> "Future[ShardRecord]":
            future: Future[ShardRecord] = Future()
            future.set_result(writer.write(shard))
            return future

        yield run
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(*arguments, os.getpid()),
    )
    workers: set[BaseProcess] = set()

    def submit(shard: Shard) -> "Future[ShardRecord]":
        before = set(active_children())
        # The pool starts a process here if all others are busy.
        with shielded():
            future = pool.submit(_write_in_worker, shard)
        workers.update(set(active_children()) - before)
        return future

    try:
        yield submit
    except KeyboardInterrupt:
        # The next preparation writes the shards in progress.
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


class Writer:
    """Writer of shards, which scores their documents."""

    def __init__(self, out: Path, scorer: Path | None, reset_at_newline: bool) -> None:
        self._out = out
        self._scorer: Scorer | None = None
        if scorer is not None:
            self._scorer, _ = load_scorer(scorer, reset_at_newline=reset_at_newline)

    def write(self, shard: Shard) -> ShardRecord:
        """Write one shard atomically, and return its record.

        Raises:
            OSError: the file cannot be written.
            NumericalError: an entropy is not finite.
        """
        columns = [
            _column([d.data for d in shard.documents], pa.large_binary(), np.int64),
            _column([d.source.encode() for d in shard.documents], pa.string(), np.int32),
        ]
        schema = SCHEMA
        if any(d.trained is not None for d in shard.documents):
            schema = schema.append(TRAINED)
            ranges = [[{"begin": a, "end": b} for a, b in d.ranges] for d in shard.documents]
            columns.append(pa.array(ranges, TRAINED.type))
        if self._scorer is not None:
            schema = schema.append(ENTROPIES)
            columns.append(_entropy_column(self._scorer, shard.documents))
        path = self._out / shard.name
        with (
            atomic_file(path) as temporary,
            temporary.open("wb") as file,
            pa.ipc.new_file(file, schema) as writer,
        ):
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return ShardRecord(
            file=shard.name,
            split=shard.split,
            documents=len(shard.documents),
            text_bytes=sum(len(d.data) for d in shard.documents),
            file_bytes=path.stat().st_size,
            sha256=file_hash(path),
            sources=_totals(shard.documents),
        )


def _column(values: list[bytes], kind: pa.DataType, offset: type[np.integer]) -> pa.Array:
    """Return a column of bytes or strings.

    ``pa.array`` of a list imports pandas where it is installed, which takes longer than the rest of
    a short preparation.
    """
    text = b"".join(values)
    assert len(text) <= np.iinfo(offset).max, "a shard is far smaller"
    offsets = np.zeros(len(values) + 1, offset)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.Array.from_buffers(kind, len(values), buffers)


def _totals(documents: list[Document]) -> dict[str, SourceTotal]:
    """Return the size of each source, by name, sorted."""
    by_source: dict[str, list[Document]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document)
    totals = {}
    for name, group in sorted(by_source.items()):
        trained = None
        if any(d.trained is not None for d in group):
            trained = sum(end - begin for d in group for begin, end in d.ranges)
        text_bytes = sum(len(d.data) for d in group)
        totals[name] = SourceTotal(
            documents=len(group), text_bytes=text_bytes, trained_bytes=trained
        )
    return totals


def _entropy_column(scorer: Scorer, documents: list[Document]) -> pa.Array:
    """Return the entropies of all documents, using little memory apart from the result's."""
    lengths = [len(document.data) + 1 for document in documents]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    values = np.empty(offsets[-1], np.float32)
    at = 0
    for group in group_by_size(documents, lambda one: len(one.data) + 1, SCORED_TOGETHER):
        for part in _entropies(scorer, group):
            values[at : at + len(part)] = part
            at += len(part)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))


def _entropies(scorer: Scorer, documents: list[Document]) -> Iterator[NDArray[np.float32]]:
    """Yield the entropies of documents in order, of a single document in parts to save memory."""

    def name(index: int) -> str:
        one = documents[index]
        return f"the document of source {one.source!r} that begins with {one.data[:32]!r}"

    if len(documents) > 1:
        ids = [torch.from_numpy(codec.encode(one.data)) for one in documents]
        yield from (one.float().numpy() for one in score_documents(scorer, ids, name=name))
        return
    state, data = scorer.new_state(), documents[0].data
    for begin in range(0, max(len(data), 1), CHUNK):
        ids = codec.encode(data[begin : begin + CHUNK], bos=begin == 0)
        entropies = state.prefill(0, torch.from_numpy(ids)).float()
        # The first id is BOS, whose entropy is that of byte 0.
        check_entropies(entropies, name(0), begin + (begin > 0))
        yield entropies.numpy()


_writer: Writer | None = None


def _start_worker(out: Path, scorer: Path | None, reset_at_newline: bool, parent: int) -> None:
    global _writer
    ignore_sigint()
    torch.set_num_threads(1)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    _writer = Writer(out, scorer, reset_at_newline)


def _die_with(parent: int) -> None:
    """End this worker when its parent process has ended, even by SIGKILL."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _write_in_worker(shard: Shard) -> ShardRecord:
    assert _writer is not None
    return _writer.write(shard)
