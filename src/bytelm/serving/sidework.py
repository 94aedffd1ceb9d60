"""The thread for work on whole texts, which must hold up neither the event loop nor the engine."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bytelm.serving.errors import QueueFullError

T = TypeVar("T")
MAX_OPEN = 32
"""Most pieces of work that are in progress or waiting."""


class AbandonedError(Exception):
    """Raised in the thread when no one waits for the result any more."""


class Sidework:
    """Thread that does one piece of work after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "bytelm-sidework")
        self._num_open = 0

    def close(self) -> None:
        """End the thread after the piece in progress."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Callable[[Callable[[int], None]], T]) -> T:
        """Return the result of a piece of work; called in the event loop.

        Args:
            work: what to do. It is given a function to call now and then with the amount that is
                done, which ends it if no one waits any more.

        Raises:
            QueueFullError: too much work is waiting.
        """
        if self._num_open >= MAX_OPEN:
            raise QueueFullError
        abandoned = threading.Event()

        def check(done: int) -> None:
            if abandoned.is_set():
                raise AbandonedError

        self._num_open += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, check)
        finally:
            abandoned.set()
            self._num_open -= 1
