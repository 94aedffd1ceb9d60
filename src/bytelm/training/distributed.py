"""The ranks that train together: sums over them, decisions of rank 0, errors and stops of all.

Training asks one :class:`World` for everything that concerns the other ranks. A world of one
answers from the rank itself, without communication. ::

    with join("cpu") as world:
        (total,) = world.sum(local)                # over all ranks
        start = world.decide(find_checkpoint)      # rank 0 looks, all get the answer
        setup = world.agree(set_up)                # all set up; an error of one is raised on all

Every rank makes the same calls in the same order.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import distributed

from bytelm.errors import BytelmError, ConfigError
from bytelm.ranks import Place, find_place
from bytelm.stopping import Stopped, Stopping

T = TypeVar("T")


class World:
    """One rank among those that train together; by default the only one.

    Args:
        place: rank and number of ranks, of which a process group exists; ``None`` for one alone.
    """

    def __init__(self, place: Place | None = None) -> None:
        place = place or Place()
        self.rank, self.size, self.local_rank = place.rank, place.size, place.local_rank
        self.group: Any = None
        """Process group of the ranks; ``None`` for the default one."""
        self.num_points = 0
        """Points of training passed, which tell where a rank hangs."""
        self._raised: BytelmError | None = None

    def apart(self, timeout: timedelta | None = None) -> "World":
        """Return a world of the same ranks for another thread, whose calls have their own order.

        Args:
            timeout: how long a rank may wait for the others; ``None`` for torch's own.
        """
        world = World(Place(self.rank, self.size, self.local_rank))
        if self.size > 1:
            world.group = distributed.new_group(timeout=timeout, backend="gloo")
        return world

    def mark(self) -> None:
        """Note that training has passed a point, before this rank waits for the others."""
        self.num_points += 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files, prints and calls callbacks."""
        return self.rank == 0

    def sum(self, *values: int | float) -> list[Any]:
        """Return the sum of each value over all ranks; integers stay integers."""
        if self.size == 1:
            return list(values)
        self.mark()
        totals = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(totals, group=self.group)
        pairs = zip(totals.tolist(), values, strict=True)
        return [round(total) if isinstance(value, int) else total for total, value in pairs]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order."""
        return [value] if self.size == 1 else self._exchange(value)

    def decide(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0, and return its result on all ranks.

        Raises:
            BytelmError: the function raised it.
        """
        if self.size == 1:
            return function()
        value = self._try(function) if self.is_main else None
        return self._exchange(value)[0]

    def agree(self, function: Callable[[], T]) -> T:
        """Call a function on every rank, and return this rank's result.

        Raises:
            BytelmError: the function raised it on some rank; it is that of the first.
        """
        if self.size == 1:
            return function()
        value = self._try(function)
        self._exchange(None)
        return value

    def _try(self, function: Callable[[], T]) -> T:
        """Call a function, and tell all ranks of its error before it is raised."""
        try:
            return function()
        except BytelmError as error:
            if error is not self._raised:
                self._exchange(None, error)
            raise

    def _exchange(self, value: Any, error: BytelmError | None = None) -> list[Any]:
        """Return the values of all ranks, or raise the first error.

        Whatever a rank waits for, it learns of the error of another here.
        """
        self.mark()
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, (value, error), group=self.group)
        self._raised = next((error for _, error in found if error is not None), None)
        if self._raised is not None:
            raise self._raised from None
        return [value for value, _ in found]

    def share(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Deal items to the ranks in turns, as many to each.

        Yields:
            An item of this rank, and whether it counts. In the last round, ranks for which none is
            left get the last item as well: sharded models need all ranks in every forward pass. ::

                items a b c, 2 ranks      rank 0: a, c      rank 1: b, (c)
        """
        iterator = iter(items)
        while dealt := list(islice(iterator, self.size)):
            is_left = self.rank < len(dealt)
            yield dealt[self.rank if is_left else -1], is_left

    def check_shares(self, rows_per_step: int) -> None:
        """Check that the ranks can have equally many rows of a step.

        Raises:
            ConfigError: they cannot.
        """
        if rows_per_step % self.size:
            more = -(-rows_per_step // self.size) * self.size
            raise ConfigError(
                f"data.rows_per_step is {rows_per_step}, which {self.size} ranks cannot share "
                f"equally: set it to a multiple of {self.size}, such as {more}, or start another "
                "number of ranks"
            )

    def stopping(self, time_limit: float | None = None) -> Stopping:
        """Return the requests to stop of a run; see :class:`SharedStopping`."""
        return Stopping(time_limit) if self.size == 1 else SharedStopping(self, time_limit)


class SharedStopping(Stopping):
    """Requests to stop that ranks obey together, after the same step.

    A signal may reach one rank before another. What was requested counts from the next
    :meth:`agree` on, and nothing is interrupted, since a rank that abandoned its work would leave
    the others waiting for it. More signals change nothing: launchers kill after a while.
    """

    def __init__(self, world: World, time_limit: float | None = None) -> None:
        super().__init__(time_limit)
        self._world = world
        self._wanted: str | None = None

    def request(self, reason: str) -> None:
        """Request a stop, on which the ranks will agree."""
        self._wanted = self._wanted or reason

    def agree(self) -> None:
        """Let all ranks know of the requests so far; the reason is that of the first rank."""
        super().agree()
        (num_requests,) = self._world.sum(int(self._wanted is not None))
        if num_requests and self.reason is None:
            wanted = self._world.gather(self._wanted)
            self.reason = next(reason for reason in wanted if reason is not None)

    def check(self) -> None:
        """Interrupt work if the ranks have agreed on a stop.

        Raises:
            Stopped: they have.
        """
        if self.reason:
            raise Stopped(self.reason)

    def check_together(self) -> None:
        """Agree, and check."""
        self.agree()
        self.check()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run a block, which is completed."""
        yield

    def _start_alarm(self) -> None:
        return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)


@contextmanager
def join(device: str, timeout: timedelta | None = None) -> Iterator[World]:
    """Join the ranks that torchrun or SLURM started, or the process group that exists already.

    Args:
        device: ``cpu`` or ``cuda``.
        timeout: how long a rank may wait for the others; ``None`` for torch's own.

    Raises:
        ConfigError: the node has fewer GPUs than ranks.
    """
    if distributed.is_initialized():
        size, local = distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
        yield World(Place(distributed.get_rank(), size, local))
        return
    place = find_place()
    if place.size == 1:
        yield World()
        return
    if device == "cuda":
        num_gpus = torch.cuda.device_count()
        # SLURM may show each task its own GPU only.
        index = place.local_rank if num_gpus > 1 else 0
        if index >= num_gpus:
            raise ConfigError(
                f"rank {place.rank} has no GPU: the node has {num_gpus}; start as many ranks on a "
                "node as it has GPUs"
            )
        torch.cuda.set_device(index)
    distributed.init_process_group(
        # What ranks agree on is exchanged between processors, whatever computes.
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{place.address}" if place.address else None,
        rank=place.rank,
        world_size=place.size,
        timeout=timeout,
    )
    try:
        yield World(place)
    finally:
        distributed.destroy_process_group()
