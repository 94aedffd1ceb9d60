"""The thread that owns the engine, and the answers that it hands to the event loop.

An engine is used by one thread at a time, and a step of it takes longer than an event loop may
wait. So one thread takes commands from a queue, runs steps while there are requests, and hands
what they yield to the event loop, where :class:`Answers` are read.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from bytelm.inference import Event, Generated, Request, Stats
from bytelm.serving.errors import EngineFailedError, QueueFullError, StoppingError

log = logging.getLogger(__name__)
STOP_SECONDS = 10.0
"""Longest time to wait for the thread to end."""


@runtime_checkable
class EngineLike(Protocol):
    """What the worker needs of a :class:`bytelm.inference.Engine`."""

    def submit(self, request: Request) -> int:
        """Queue a request, and return its ticket."""
        ...

    def cancel(self, ticket: int) -> None:
        """End a request without further events."""
        ...

    def step(self) -> list[Event]:
        """Continue all requests."""
        ...

    def stats(self) -> Stats:
        """Return what the engine is doing, and has done."""
        ...


Part = tuple[int, Generated]
"""Index of a request among those submitted together, and the next part of its answer."""


class Answers:
    """Answers to requests that were submitted together; an asynchronous iterator of their parts.

    Iteration raises what ended a request, and ends when all requests have.
    """

    def __init__(self, worker: "Worker", num_requests: int) -> None:
        self._worker = worker
        self._parts: asyncio.Queue[Part | Exception] = asyncio.Queue()
        self._num_unread = num_requests
        self.num_open = num_requests
        """Requests that the engine has not ended."""
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the engine has accepted all requests; or has what it refused them with."""

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> Part:
        if not self._num_unread:
            raise StopAsyncIteration
        found = await self._parts.get()
        if isinstance(found, Exception):
            self._num_unread = 0
            raise found
        if found[1].finish is not None:
            self._num_unread -= 1
        return found

    @property
    def is_complete(self) -> bool:
        """Whether all parts have been read."""
        return not self._num_unread

    def receive(self, found: Part | Exception) -> None:
        """Take what the engine yielded; called in the event loop."""
        self._parts.put_nowait(found)

    def cancel(self) -> None:
        """End the requests that the engine has not ended."""
        if self.num_open:
            self._worker.cancel(self)


class Worker:
    """Thread that runs an engine; all methods are for the event loop.

    Args:
        engine: the engine, which nothing else may use.
        max_open: largest number of requests in progress or waiting.
        on_step: called, in the thread, with the seconds that each step took.
    """

    def __init__(
        self,
        engine: EngineLike,
        max_open: int = 256,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        self._engine, self._max_open, self._on_step = engine, max_open, on_step
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._num_open = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="bytelm-engine", daemon=True)
        # Only the thread uses these.
        self._running: dict[int, tuple[Answers, int]] = {}
        self.stats = engine.stats()
        """What the engine was doing after its last step."""

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def end_all(self) -> None:
        """End all requests because the server stops."""
        self._commands.put(partial(self._fail_all, StoppingError()))

    async def stop(self) -> None:
        """Cancel all requests and end the thread."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Submit requests that are answered together.

        Raises:
            QueueFullError: too many requests are in progress or waiting.
        """
        if self._num_open + len(requests) > self._max_open:
            raise QueueFullError
        answers = Answers(self, len(requests))
        self._num_open += len(requests)
        self._commands.put(partial(self._submit, answers, list(requests)))
        return answers

    def cancel(self, answers: Answers) -> None:
        """End requests; the engine frees their slots before its next step."""
        self._close(answers, answers.num_open)
        self._commands.put(partial(self._cancel, answers))

    def _close(self, answers: Answers, count: int) -> None:
        self._num_open -= count
        answers.num_open -= count

    def _deliver(self, found: Sequence[tuple[Answers, Part | Exception]]) -> None:
        """Hand out what a step yielded; runs in the event loop."""
        for answers, one in found:
            if not answers.num_open:  # cancelled in the meantime
                continue
            if isinstance(one, Exception) or one[1].finish is not None:
                self._close(answers, 1)
            answers.receive(one)

    def _reply(self, answers: Answers, error: Exception | None) -> None:
        """Say whether requests were accepted; runs in the event loop."""
        if error is not None:
            self._close(answers, answers.num_open)
        if answers.accepted.done():
            return
        if error is None:
            answers.accepted.set_result(None)
        else:
            answers.accepted.set_exception(error)

    # In the thread

    def _run(self) -> None:
        while self._obey():
            if self._running:
                self._step()
        self._fail_all(StoppingError())

    def _obey(self) -> bool:
        """Run the commands that have arrived, waiting for one if there is nothing else to do."""
        while True:
            try:
                command = self._commands.get(block=not self._running)
            except queue.Empty:
                return True
            if command is None:
                return False
            try:
                command()
                self.stats = self._engine.stats()
            except Exception:
                log.exception("a command to the engine failed")

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the event loop."""
        assert self._loop is not None
        # A loop that was closed has no one left to tell.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _submit(self, answers: Answers, requests: list[Request]) -> None:
        tickets: list[int] = []
        try:
            for request in requests:
                tickets.append(self._engine.submit(request))
        except Exception as error:
            for ticket in tickets:
                self._engine.cancel(ticket)
            self._post(self._reply, answers, error)
            return
        for index, ticket in enumerate(tickets):
            self._running[ticket] = answers, index
        self._post(self._reply, answers, None)

    def _cancel(self, answers: Answers) -> None:
        for ticket in [t for t, (owner, _) in self._running.items() if owner is answers]:
            self._engine.cancel(ticket)
            del self._running[ticket]

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            events = self._engine.step()
        except Exception:
            log.exception("a step of the engine failed")
            self._fail_all(EngineFailedError("a step of the engine failed"))
            return
        if self._on_step is not None:
            self._on_step(time.perf_counter() - began)
        self.stats = self._engine.stats()
        found: list[tuple[Answers, Part | Exception]] = []
        for event in events:
            if event.ticket not in self._running:
                continue
            answers, index = self._running[event.ticket]
            if event.part is not None:
                found.append((answers, (index, event.part)))
            if event.error is not None:
                log.error("a request failed", exc_info=event.error)
                found.append((answers, EngineFailedError(str(event.error))))
            if event.error is not None or (event.part and event.part.finish is not None):
                del self._running[event.ticket]
        if found:
            self._post(self._deliver, found)

    def _fail_all(self, error: Exception) -> None:
        """End all requests, since it is not known which of them an exception belongs to."""
        failed = list(self._running.items())
        self._running.clear()
        for ticket, _ in failed:
            try:
                self._engine.cancel(ticket)
            except Exception:
                log.exception("request %d could not be cancelled", ticket)
        if failed:
            self._post(self._deliver, [(answers, error) for _, (answers, _) in failed])
        self.stats = self._engine.stats()
