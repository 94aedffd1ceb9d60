"""Preparation on Ray: tasks read sections, and actors that hold the scorer write blocks.

Plain tasks and actors serve better here than Ray Data. Where a document goes depends on those
before it, so something must look at the blocks in reading order, which no operator of Ray Data
does; its own checkpoints need unique ids of all rows and read all inputs again. A block stays in
Ray's memory between a reader and a writer: this process sees its outline only.

A task whose process or node ends is run again, and gives the same blocks; an actor is started again
and writes the same shards, each of which replaces its file at once. So nothing is lost or repeated.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from bytelm.cluster import connect
from bytelm.data.dataset import Split
from bytelm.data.engines import Device, Work
from bytelm.data.journal import BlockRecord
from bytelm.data.records import Document
from bytelm.data.sections import Outline, Section, read_section
from bytelm.data.writing import Writer
from bytelm.errors import ConfigError, DataError

RETRIES = 3
"""Times that a task is run again after its process or node has ended."""
BLOCKS_AHEAD = 2
"""Blocks that a reader has ready, before it waits for them to be taken."""


def _read(section: Section, work: Work, folder: Path) -> Iterator[Any]:
    """Yield the outline of each block of a section, and its documents."""
    _enter(folder)
    for outline, documents in read_section(section, work.read, work.block_bytes):
        yield outline
        yield documents


class _Writing:
    """Writer in an actor."""

    def __init__(self, work: Work, folder: Path) -> None:
        _enter(folder)
        if not work.out.is_dir():
            raise DataError(
                f"{work.out.resolve()} is missing on {os.uname().nodename}: choose a folder that "
                "all nodes of the cluster share"
            )
        # As in other engines, for the same bits.
        torch.set_num_threads(1)
        self._writer: Writer = work.writer()

    def write(
        self, number: int, documents: list[Document], splits: list[Split | None]
    ) -> BlockRecord:
        return self._writer.write_block(number, documents, splits)


def _enter(folder: Path) -> None:
    """Make relative paths mean what they mean where the command was given."""
    with suppress(OSError):
        os.chdir(folder)


class _RayEngine:
    """Readers and writers on Ray; see :class:`bytelm.data.engines.Engine`."""

    def __init__(self, work: Work, num_workers: int) -> None:
        self.num_workers = num_workers
        self._work, self._folder = work, Path.cwd()
        actor = ray.remote(_Writing).options(
            num_cpus=1,
            num_gpus=int(work.device == "cuda"),
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        self._writers: list[Any] = [actor.remote(work, self._folder) for _ in range(num_workers)]
        self._loads = [0] * num_workers
        """Blocks of each writer that are not written."""
        # A reader mostly waits for writers, so it takes no processor from them.
        self._reader: Any = ray.remote(_read).options(
            num_cpus=0,
            num_returns="streaming",
            max_retries=RETRIES,
            scheduling_strategy="SPREAD",
            _generator_backpressure_num_objects=2 * BLOCKS_AHEAD,
        )

    def read(self, sections: Sequence[Section]) -> Iterator[Iterator[tuple[Outline, Any]]]:
        """Yield the blocks of each section, in order, while readers are ahead with later ones."""
        upcoming = iter(sections)
        started = deque(self._start(section) for section in islice(upcoming, self.num_workers))
        while started:
            yield self._blocks(started.popleft())
            started.extend(self._start(section) for section in islice(upcoming, 1))

    def _start(self, section: Section) -> Any:
        return self._reader.remote(section, self._work, self._folder)

    def _blocks(self, reading: Any) -> Iterator[tuple[Outline, Any]]:
        for outline in reading:
            yield ray.get(outline), next(reading)

    def write(
        self, number: int, documents: Any, splits: Sequence[Split | None]
    ) -> "Future[BlockRecord]":
        """Let the writer that has the least to do write a block."""
        index = min(range(self.num_workers), key=self._loads.__getitem__)
        self._loads[index] += 1
        future = self._writers[index].write.remote(number, documents, list(splits)).future()
        future.add_done_callback(lambda _: self._release(index))
        return future

    def _release(self, index: int) -> None:
        self._loads[index] -= 1


@contextmanager
def ray_engine(work: Work, workers: int | None) -> Iterator[_RayEngine]:
    """Yield an engine on a new Ray on this computer, or on the cluster at ``RAY_ADDRESS``.

    Args:
        work: what is to be done; its folder must be shared by all nodes.
        workers: number of writers; ``None`` for one per processor, or per GPU on ``cuda``.

    Raises:
        ConfigError: Ray cannot be reached, or has too few resources.
        DataError: an input cannot be read, or workers died several times.
    """
    try:
        connect(max(os.cpu_count() or 1, workers or 1))
        yield _RayEngine(work, _num_workers(work.device, workers))
    except RayTaskError as error:
        # The error of our own that ended a task.
        raise error.cause from None
    except RayError as error:
        what = " ".join(str(error).split())
        raise DataError(
            f"a worker of Ray died {RETRIES + 1} times, perhaps for lack of memory: run the same "
            "command again, which resumes where it stopped, with fewer --workers (or, from the "
            f"start, with --cut-bytes); Ray says: {what[:400]}"
        ) from None
    finally:
        ray.shutdown()


def _num_workers(device: Device, wanted: int | None) -> int:
    """Return the number of writers.

    Raises:
        ConfigError: Ray has too few processors or GPUs.
    """
    name = "CPU" if device == "cpu" else "GPU"
    room = int(ray.cluster_resources().get(name, 0))
    if (wanted or 1) > room:
        raise ConfigError(
            f"{wanted or 1} workers on {device} need as many {name}s, and Ray has {room}: choose "
            "fewer --workers, or another --device"
        )
    return wanted or room
