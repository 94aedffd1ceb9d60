"""Requests to an engine, what it answers, and the queue they wait in."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bytelm.errors import ConfigError
from bytelm.inference.continuation import Continuation, Generated
from bytelm.inference.sampling import GREEDY, Sampling
from bytelm.inference.states import Passes

LOOK_AHEAD = 32
"""Requests of a client, from the first, that are looked at for one that can begin."""


class RequestTooLongError(ConfigError):
    """A request that an engine has no room for, however long it waits."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: bytes
    """Any bytes."""
    max_bytes: int
    """Maximum number of bytes to generate."""
    sampling: Sampling = GREEDY
    """How each id is sampled."""
    stop: Sequence[bytes] = ()
    """Byte strings that end generation."""
    num_top: int | None = None
    """Report choices, each with this many of the most probable ids; ``None`` for none."""
    client: str = ""
    """Who asks. Requests of one client begin in order; clients take turns."""


class Event(NamedTuple):
    """Part of the answer to a request."""

    ticket: int
    part: Generated | None
    """The next part; its ``finish`` is set in the last one."""
    error: Exception | None = None
    """What ended the request instead."""


@dataclass(frozen=True)
class Stats:
    """What an engine is doing, and has done since it was made."""

    num_waiting: int
    num_reading: int
    """Requests whose prompts are being read."""
    num_decoding: int
    num_steps: int
    """Byte steps."""
    bytes_generated: int
    ids_read: int
    """Ids of prompts that were read."""
    ids_reused: int
    """Ids of prompts that were not, since another document began with them."""
    num_preempted: int
    """Times that a request gave its memory to another and waited again."""
    pages_used: int
    """Pages of memory in use, also by the beginnings that are kept for later requests."""
    num_pages: int
    num_drafted: int
    """Bytes that the decoder drafted for requests that were alone."""
    num_accepted: int
    """Of these, bytes that decoding without drafts would have chosen."""
    passes: Passes | None = None
    """How often each part of a BLT was run to decode; prompts are not counted."""
    bytes_moved: int = 0
    """Bytes of a BLT's weights that these passes read (:meth:`Passes.bytes_moved`)."""


class Job:
    """A request at work."""

    def __init__(
        self,
        ticket: int,
        request: Request,
        prompt: Int[np.ndarray, " ids"],
        continuation: Continuation,
    ) -> None:
        self.ticket = ticket
        self.request = request
        self.continuation = continuation
        self.has_failed = False
        """Whether an exception ended it, so that its slot may hold anything."""
        self._prompt = prompt

    @property
    def ids(self) -> Int[np.ndarray, " ids"]:
        """Ids of the prompt and of all that was sampled."""
        chosen = np.array(self.continuation.chosen, dtype=self._prompt.dtype)
        return np.concatenate((self._prompt, chosen))


class FairQueue:
    """Queue of requests in which clients take turns."""

    def __init__(self) -> None:
        self._jobs: dict[str, deque[Job]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def __iter__(self) -> Iterator[Job]:
        for jobs in self._jobs.values():
            yield from jobs

    def add(self, job: Job) -> None:
        """Add a request behind those of its client."""
        self._jobs.setdefault(job.request.client, deque()).append(job)

    def put_back(self, job: Job) -> None:
        """Add a request that was taken before all others."""
        client = job.request.client
        jobs = self._jobs.pop(client, deque())
        jobs.appendleft(job)
        self._jobs = {client: jobs, **self._jobs}

    def take(self, is_ready: Callable[[Job], bool]) -> Job | None:
        """Take the next request that can begin, if there is one; its client is last from now."""
        for client, jobs in self._jobs.items():
            index = _first(is_ready(job) for job in islice(jobs, LOOK_AHEAD))
            if index is not None:
                job = jobs[index]
                del jobs[index], self._jobs[client]
                if jobs:
                    self._jobs[client] = jobs
                return job
        return None

    def cancel(self, ticket: int) -> bool:
        """Remove a request, and return whether it was there."""
        for client, jobs in self._jobs.items():
            job = next((job for job in jobs if job.ticket == ticket), None)
            if job is not None:
                jobs.remove(job)
                if not jobs:
                    del self._jobs[client]
                return True
        return False


def _first(values: Iterable[bool]) -> int | None:
    return next((index for index, value in enumerate(values) if value), None)
