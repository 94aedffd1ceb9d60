"""Abort a run in which a rank hangs, and say which rank it is.

Without it, the other ranks would wait until a collective operation times out, and none would know
for whom. A thread of each rank meets the threads of the others now and then. That of a process
that is stopped or lost does not arrive. If a rank's training hangs, its thread arrives with the
number of points that training has passed, which is less than those of the ranks that wait for it::

    rank 0   rows  block 0  block 1 (waits)     3 points
    rank 1   rows  block 0  (hangs)             2 points: named

The backward pass of a block has two points: before the weights are gathered, and before gradients
are summed (:func:`bytelm.training.parallel.shard`).
"""

import faulthandler
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from torch import distributed

from bytelm.training.distributed import World

PAUSE = 5.0
"""Seconds between two meetings of the threads, at most."""
GRACE = 5.0
"""Seconds that rank 0 has to name a rank before the others name rank 0."""


@contextmanager
def watched(world: World, seconds: float | None) -> Iterator[None]:
    """Watch the ranks during a block, and end this process if one of them hangs.

    Args:
        world: the ranks.
        seconds: time without progress after which a rank hangs; ``None`` to watch nothing.
    """
    if world.size == 1 or seconds is None:
        yield
        return
    watchdog = Watchdog(world, seconds)
    try:
        yield
    finally:
        watchdog.end()


class Watchdog:
    """Thread of a rank that watches all ranks; see :func:`watched`."""

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._seconds = world, seconds
        self._apart = world.apart(timedelta(seconds=seconds))
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End the watch, on all ranks."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        passed, since = None, time.monotonic()
        while True:
            is_ended = self._ended.wait(min(PAUSE, self._seconds / 4))
            try:
                self._meet()
                found = self._apart.gather((self._world.num_points, is_ended))
            except RuntimeError as error:
                self._report_missing(str(error))
                return
            if any(ended for _, ended in found):
                return
            now = [points for points, _ in found]
            if now != passed:
                passed, since = now, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                self._report_hung(now)

    def _meet(self) -> None:
        timeout = timedelta(seconds=self._seconds)
        distributed.monitored_barrier(self._apart.group, timeout, wait_all_ranks=True)

    def _report_missing(self, error: str) -> None:
        """End the process because of ranks whose threads do not arrive."""
        if self._ended.is_set():
            # Training has ended here, perhaps because of the same rank.
            return
        ranks = missing_ranks(error)
        if ranks is None:
            # Rank 0 knows more, if it is not the one.
            time.sleep(GRACE)
        lost = "not answered: a process or a node is stopped or lost"
        abort(f"{_name(ranks or [0])} {lost}; {RESUME}")

    def _report_hung(self, points: list[int]) -> None:
        """End the process because of ranks whose training has stopped before the others'."""
        if self._world.rank in hung_ranks(points):
            # Where it hangs, for those who read the logs.
            faulthandler.dump_traceback()
        abort(f"{hung_message(points, self._seconds)}; {RESUME}")


RESUME = "the same command resumes from the last checkpoint"


def missing_ranks(error: str) -> list[int] | None:
    """Return the ranks that an error of ``monitored_barrier`` names; only rank 0 gets them."""
    found = re.search(r"Ranks ([\d, ]+) failed", error)
    return None if found is None else [int(rank) for rank in found[1].split(",")]


def hung_ranks(points: list[int]) -> list[int]:
    """Return the ranks that have passed fewer points than others."""
    return [rank for rank, count in enumerate(points) if count == min(points) < max(points)]


def hung_message(points: list[int], seconds: float) -> str:
    """Return what to say of ranks that have passed no more points for some time."""
    what = f"made no progress for {seconds:g} s (train.hang_seconds)"
    ranks = hung_ranks(points)
    if not ranks:
        return f"no rank has {what}, and all are at the same point"
    return f"{_name(ranks)} {what}, and the others wait"


def _name(ranks: list[int]) -> str:
    is_one = len(ranks) == 1
    return f"rank{'' if is_one else 's'} {', '.join(map(str, ranks))} {'has' if is_one else 'have'}"


def _abort(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    # The main thread waits for a rank that does not come: nothing else ends it.
    os._exit(1)


abort: Callable[[str], None] = _abort
