"""Many requests at once, each answered as if it were alone.

A step of the engine feeds one byte of every running request: scorer, encoder and decoder run over
all of them, the global transformer over those that close a patch. Between two steps requests join
and leave. Prompts are read in chunks, so that long ones do not stall the others, in a state of
their own, where they are kept for the prompts that begin like them (:mod:`.prefixes`). The memory
of the caches that grow is bounded and shared (:mod:`.pages`): if it is full, kept beginnings are
dropped, and then the request that began last waits again, and goes on where it was.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from bytelm import codec, cpu
from bytelm.errors import ConfigError
from bytelm.inference.continuation import Continuation, Prediction, check_options
from bytelm.inference.graphs import Strategy
from bytelm.inference.pages import PAGE, MemoryFullError, PagedMemory
from bytelm.inference.prefixes import MIN_SHARED, Prefixes, shared_length
from bytelm.inference.requests import Event, FairQueue, Job, Request, RequestTooLongError, Stats
from bytelm.inference.session import Decodable
from bytelm.inference.speculation import Speculation
from bytelm.inference.states import DecodingState, PatchedState

IDLE_FACTOR = 4
"""How many times the ids of prompts are read in a step in which nothing is decoded."""


class Reading:
    """A request whose prompt is being read in a slot."""

    def __init__(self, job: Job, slot: int, num_read: int) -> None:
        self.job, self.slot, self.num_read = job, slot, num_read
        self.ids = job.ids
        self.parts_at: set[int] = set()
        """Where other documents part from this one: its state is kept there."""

    @property
    def num_left(self) -> int:
        """Number of ids that are not read yet."""
        return len(self.ids) - self.num_read

    def next_end(self, budget: int) -> int:
        """Return where the next chunk of at most ``budget`` ids ends."""
        ends = [at for at in self.parts_at if at > self.num_read]
        return min(len(self.ids), self.num_read + budget, *ends)


class Engine:
    """Continuous batching of requests to one model; to be used by one thread at a time.

    Every request gets the bytes that it would get alone (as long as rounding, which depends on the
    size of a batch, does not change a choice).

    Args:
        model: language model, whose weights must not be moved while the engine is in use.
        num_slots: largest number of requests that are read or decoded at once.
        max_document_bytes: longest document, prompt and continuation together.
        num_positions: positions that key-value caches without a window have room for, all
            documents together: patches in a BLT, ids in a transformer. By default a quarter of what
            all slots could need, but enough for the longest document.
        num_kept: slots for prompts that are read, and for beginnings that are kept.
        prefill_ids: ids of prompts that are read in a step.
        strategy: how single ids are run; see :data:`bytelm.inference.Strategy`.
        speculate: let the decoder of a BLT draft bytes of a request that is alone, as many as are
            measured to pay (:mod:`.speculation`); its answer stays the same.

    Raises:
        ConfigError: a number is too small.
    """

    def __init__(
        self,
        model: Decodable,
        num_slots: int = 16,
        *,
        max_document_bytes: int = 8192,
        num_positions: int | None = None,
        num_kept: int = 16,
        prefill_ids: int = 256,
        strategy: Strategy = "auto",
        speculate: bool = False,
    ) -> None:
        longest = max_document_bytes + PAGE  # BOS, and the rest of a page
        if num_positions is None:
            num_positions = max(longest, num_slots * longest // 4)
        numbers = {"num_slots": num_slots, "num_kept": num_kept, "prefill_ids": prefill_ids}
        for name, number in {**numbers, "max_document_bytes": max_document_bytes}.items():
            if number < 1:
                raise ConfigError(f"{name} must be at least 1, not {number}")
        if num_positions < longest:
            raise ConfigError(
                f"num_positions {num_positions} leaves no room for a document of "
                f"{max_document_bytes} bytes: use at least {longest}"
            )
        self._model, self._num_slots, self._prefill_ids = model, num_slots, prefill_ids
        self._max_document_bytes = max_document_bytes
        self._device = model.device
        if num_slots > 1:
            cpu.compile_kernels(self._device)
        self._memory = PagedMemory(num_positions)
        self._state = model.new_state(num_slots, strategy, self._memory)
        self._prefixes = Prefixes(model.new_state(num_kept, strategy, self._memory))
        self._speculation = None
        if speculate and isinstance(self._state, PatchedState) and not self._state.is_captured:
            self._speculation = Speculation(self._state)
        self._queue = FairQueue()
        self._reading: list[Reading] = []
        # The first slots of the state, in this order: neighbours are read without copies.
        self._decoding: list[Job] = []
        self._must_wait = False
        self._is_timed = False  # whether this step is to decode without a draft, for comparison
        self._next_ticket = 0
        self._num_steps = self._bytes = self._ids_read = self._ids_reused = self._preempted = 0

    def submit(self, request: Request) -> int:
        """Queue a request, and return the ticket that its events have.

        Raises:
            ConfigError: an option is out of range.
            RequestTooLongError: the document could become longer than the engine has room for.
        """
        check_options(request.max_bytes, request.stop)
        size = len(request.prompt) + request.max_bytes
        if size > self._max_document_bytes:
            raise RequestTooLongError(
                f"a prompt of {len(request.prompt):,} bytes and {request.max_bytes:,} more are "
                f"over the limit of {self._max_document_bytes:,}: shorten the prompt, or ask for "
                "fewer bytes"
            )
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        units = self._model.units
        continuation = Continuation(
            request.max_bytes, request.sampling, request.stop, units.decode, request.num_top
        )
        prompt = units.encode(codec.encode(request.prompt))
        self._queue.add(Job(ticket, request, prompt, continuation))
        return ticket

    def cancel(self, ticket: int) -> None:
        """End a request without further events; its slot and memory are free at once."""
        if self._queue.cancel(ticket):
            return None
        for reading in self._reading:
            if reading.job.ticket == ticket:
                return self._stop_reading(reading)
        for slot, job in enumerate(self._decoding):
            if job.ticket == ticket:
                return self._leave([slot])
        return None

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._queue or self._reading or self._decoding)

    def stats(self) -> Stats:
        """Return what the engine is doing, and has done."""
        state, passes, bytes_moved = self._state, None, 0
        if isinstance(state, PatchedState):
            passes = dataclasses.replace(state.passes)
            bytes_moved = passes.bytes_moved(state.blt)
        return Stats(
            num_waiting=len(self._queue),
            num_reading=len(self._reading),
            num_decoding=len(self._decoding),
            num_steps=self._num_steps,
            bytes_generated=self._bytes,
            ids_read=self._ids_read,
            ids_reused=self._ids_reused,
            num_preempted=self._preempted,
            pages_used=self._memory.num_pages - self._memory.num_free,
            num_pages=self._memory.num_pages,
            num_drafted=self._speculation.num_drafted if self._speculation else 0,
            num_accepted=self._speculation.num_accepted if self._speculation else 0,
            passes=passes,
            bytes_moved=bytes_moved,
        )

    def forget(self) -> None:
        """Drop all beginnings that are kept for later requests."""
        while self._prefixes.drop():
            pass

    def step(self) -> list[Event]:
        """Admit requests, read prompts, and decode one id of every running request.

        An exception ends the requests of the batch that it occurred in, not the engine.
        """
        events: list[Event] = []
        self._admit(events)
        self._read(events)
        self._decode(events)
        self._num_steps += 1
        self._bytes += sum(len(event.part.data) for event in events if event.part)
        return events

    # Admission

    def _admit(self, events: list[Event]) -> None:
        if not (self._reading or self._decoding):
            self._must_wait = False
        while not self._must_wait and len(self._reading) + len(self._decoding) < self._num_slots:
            job = self._queue.take(self._is_ready)
            if job is None:
                return
            ended = [Event(job.ticket, part) for part in job.continuation.begin()]
            events.extend(ended)
            if not ended and not self._start(job, events):
                self._queue.put_back(job)
                return

    def _is_ready(self, job: Job) -> bool:
        """Whether a request has nothing to gain from a prompt that is being read."""
        ids = job.ids
        for reading in self._reading:
            shared = shared_length(ids, reading.ids)
            if shared >= MIN_SHARED and reading.num_read < shared:
                if shared < len(reading.ids):
                    reading.parts_at.add(shared)
                return False
        return True

    def _start(self, job: Job, events: list[Event]) -> bool:
        """Begin to read a prompt; return whether there was a slot."""
        ids = job.ids
        begun = self._prefixes.begin(ids)
        if begun is None:
            return False
        slot, num_read, prediction = begun
        self._ids_reused += num_read
        reading = Reading(job, slot, num_read)
        if prediction is not None:
            self._finish_reading(reading, prediction, events)
            return True
        shared = [shared_length(ids, kept.ids) for kept in self._prefixes.documents]
        reading.parts_at.update(at for at in shared if at >= MIN_SHARED)
        self._reading.append(reading)
        return True

    # Reading

    def _read(self, events: list[Event]) -> None:
        """Read chunks of prompts: half of them of the oldest, the rest of the shortest."""
        budget = self._prefill_ids * (1 if self._decoding else IDLE_FACTOR)
        if len(self._reading) > 1:
            budget -= self._read_chunk(self._reading[0], budget // 2 or 1, events)
        for reading in sorted(self._reading, key=lambda one: one.num_left):
            while budget > 0 and reading in self._reading:
                budget -= self._read_chunk(reading, budget, events)

    def _read_chunk(self, reading: Reading, budget: int, events: list[Event]) -> int:
        """Read the next ids of a prompt, and return how many."""
        begin, end = reading.num_read, reading.next_end(budget)
        ids = torch.from_numpy(reading.ids[begin:end]).to(self._device)
        try:
            logits = self._prefill(reading, ids)
        except Exception as error:
            self._stop_reading(reading)
            events.append(Event(reading.job.ticket, None, error))
            return end - begin
        if logits is None:
            return 0
        reading.num_read = end
        self._ids_read += end - begin
        if not reading.num_left:
            self._reading.remove(reading)
            prediction = self._predictions(self._prefixes.state, logits[-1:])[0]
            self._finish_reading(reading, prediction, events)
        elif end in reading.parts_at:
            self._prefixes.keep_copy(self._prefixes.state, reading.slot, reading.ids[:end])
        return end - begin

    def _prefill(self, reading: Reading, ids: Tensor) -> Tensor | None:
        """Read ids; return their logits, or ``None`` if the request had to give up its slot."""
        while reading in self._reading:
            try:
                return self._prefixes.state.prefill(reading.slot, ids)
            except MemoryFullError:
                self._make_room()
        return None

    def _finish_reading(
        self, reading: Reading, prediction: Prediction, events: list[Event]
    ) -> None:
        """Let a request whose prompt is read go on in the state that decodes."""
        job, slot = reading.job, len(self._decoding)
        self._choose(job, prediction, events)
        if not job.continuation.has_ended:
            self._state.copy(self._prefixes.state, reading.slot, slot)
            self._decoding.append(job)
        else:
            self._must_wait = False
        if job.has_failed:
            self._prefixes.give_back(reading.slot)
        else:
            self._prefixes.keep(reading.slot, reading.ids, prediction)

    def _stop_reading(self, reading: Reading) -> None:
        self._reading.remove(reading)
        self._prefixes.give_back(reading.slot)
        self._must_wait = False

    # Decoding

    def _decode(self, events: list[Event]) -> None:
        if not self._speculate(events):
            logits = self._decode_all(events)
            if logits is None:
                return
            predictions = self._predictions(self._state, logits)
            for job, prediction in zip(self._decoding, predictions, strict=True):
                self._choose(job, prediction, events)
        ended = [slot for slot, job in enumerate(self._decoding) if job.continuation.has_ended]
        for slot in ended:
            if not self._decoding[slot].has_failed:
                # The last id was not fed.
                ids = self._decoding[slot].ids[:-1]
                self._prefixes.keep_copy(self._state, slot, ids)
        self._leave(ended)

    def _speculate(self, events: list[Event]) -> bool:
        """Draft and verify bytes of a request that is alone; return whether any were."""
        speculation = self._speculation
        if speculation is None or len(self._decoding) != 1 or self._reading:
            return False
        job = self._decoding[0]
        length = min(speculation.lengths.begin(), job.continuation.num_left)
        if length == 1:
            self._is_timed = True
            return False
        try:
            speculation.run(
                job.continuation, length, lambda prediction: self._choose(job, prediction, events)
            )
        except MemoryFullError:
            return False
        except Exception as error:
            self._fail(job, error, events)
        return True

    def _decode_all(self, events: list[Event]) -> Tensor | None:
        """Feed the last id of every running request; return the logits, if any go on."""
        while self._decoding:
            last = [job.continuation.chosen[-1] for job in self._decoding]
            ids = torch.tensor(last, device=self._device)
            try:
                logits = self._state.decode(ids, range(len(last)))
                if self._speculation is not None and self._is_timed:
                    self._speculation.lengths.end(1, 0, 0)
                self._is_timed = False
                return logits
            except MemoryFullError:
                self._make_room()
            except Exception as error:
                events.extend(Event(job.ticket, None, error) for job in self._decoding)
                self._leave(range(len(last)))
        return None

    def _choose(self, job: Job, prediction: Prediction, events: list[Event]) -> None:
        """Sample the next id of a request."""
        try:
            for part in job.continuation.choose(prediction):
                events.append(Event(job.ticket, part))
        except Exception as error:
            self._fail(job, error, events)

    def _fail(self, job: Job, error: Exception, events: list[Event]) -> None:
        job.continuation.has_ended = job.has_failed = True
        events.append(Event(job.ticket, None, error))

    def _predictions(self, state: DecodingState, logits: Tensor) -> list[Prediction]:
        """Return the predictions of the last call of a state."""
        observed = getattr(state, "observed", None)
        rows = logits.cpu()
        entropies, begins = (
            [None] * len(rows) if values is None else values.tolist()
            for values in observed or (None, None)
        )
        return [Prediction(*row) for row in zip(rows.clone(), entropies, begins, strict=True)]

    # Leaving

    def _leave(self, slots: Sequence[int]) -> None:
        """Free slots, and move the last requests into them."""
        for slot in sorted(slots, reverse=True):
            job = self._decoding.pop()
            last = len(self._decoding)
            if slot != last:
                self._state.copy(self._state, last, slot)
                self._decoding[slot] = job
            self._state.reset(last)
            self._must_wait = False

    def _make_room(self) -> None:
        """Drop a kept beginning, or else let the request that began last wait again."""
        if self._prefixes.drop():
            return
        running = [*self._decoding, *(reading.job for reading in self._reading)]
        job = max(running, key=lambda one: one.ticket)
        if len(running) == 1:
            raise RuntimeError("a document alone must fit into the memory of its engine")
        for reading in self._reading:
            if reading.job is job:
                self._stop_reading(reading)
                break
        else:
            self._leave([self._decoding.index(job)])
        self._preempted += 1
        self._must_wait = True
        self._queue.put_back(job)
