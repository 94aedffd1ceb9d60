"""Loader of training batches: shuffled, mixed and packed, resumable, independent of the ranks.

Documents are cut into spans of a row's bytes; an epoch is a random permutation of all spans, so
long documents are shuffled as thoroughly as short ones. Row ``r`` of every optimiser step is filled
by its own stream: stream ``r`` of ``R`` takes spans ``r, r + R, r + 2R, ...`` of the endless
concatenation of epochs. A stream's state is a few integers, and a rank runs only the streams of its
own rows, so the rows of a step are the same at any world size.

A stream fills its rows with spans in their order, or balances them (:mod:`bytelm.data.balancing`):
it has several spans in progress, and each row takes the oldest, and another that fills it up.

If only some bytes of a document are trained on, such as a response, a span of it is not cut at the
end of a row but begins a new one, since the rest would be trained on without its prompt.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bytelm.config import Packing
from bytelm.data.balancing import Counts, best_cut
from bytelm.data.dataset import Dataset
from bytelm.data.packing import Batch, Row, make_batch
from bytelm.errors import DataError
from bytelm.units import PatchUnits, Span, Units

PATCHED_TOGETHER = 2**15
"""Positions of short spans that are patched together: what a processor's cache holds."""
OPEN_SPANS = 16
"""Spans in progress in each stream whose rows are balanced; fewer leave more padding."""


class SpanOrder:
    """Spans of some documents, in a new random order every epoch.

    Args:
        lengths: bytes of every document.
        documents: indices of the documents to cut into spans.
        size: positions in a span, BOS included; the last of a document may have fewer.
    """

    def __init__(self, lengths: NDArray[np.int64], documents: NDArray[np.int64], size: int) -> None:
        self.documents = documents
        self._size = size
        # A document of n bytes has n + 1 positions: BOS and all bytes.
        self._positions = lengths[documents] + 1
        self._ends = np.cumsum(-(-self._positions // size))
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.mean_bytes = float(self._positions.sum()) / max(len(self), 1)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def lengths(self) -> NDArray[np.int64]:
        """Return the length of each span."""
        lengths = np.full(len(self), self._size, np.int64)
        # The last span of a document has what the others leave.
        lengths[self._ends - 1] = (self._positions - 1) % self._size + 1
        return lengths

    def at(self, index: int, seed: Sequence[int]) -> tuple[int, int]:
        """Return the span at ``index`` of the endless sequence: its document, and number in it."""
        epoch, at = divmod(index, len(self))
        if epoch not in self._orders:
            # Streams are never more than one epoch apart.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            generator = np.random.Generator(
                np.random.Philox(np.random.SeedSequence([*seed, epoch]))
            )
            self._orders[epoch] = generator.permutation(len(self))
        span = int(self._orders[epoch][at])
        row = int(self._ends.searchsorted(span, side="right"))
        first = int(self._ends[row - 1]) if row else 0
        return int(self.documents[row]), span - first


class _Rest(NamedTuple):
    """What is left of a span."""

    document: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.end - self.begin


@dataclass
class _StreamState:
    """Position of one stream."""

    draws: list[int]
    """Spans taken from each component of the mixture."""
    open: list[_Rest] = field(default_factory=list)
    """Spans in progress, the oldest first. Rows take the first; if they are balanced, any of the
    first :data:`OPEN_SPANS`."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "_StreamState":
        """Return a saved state; in earlier versions, one span was in progress."""
        if "open" in data:
            return cls(data["draws"], [_Rest(*rest) for rest in data["open"]])
        rest = _Rest(data["document"], data["begin"], data["end"])
        return cls(data["draws"], [rest] if rest.begin < rest.end else [])

    def advance(self, index: int, positions: int) -> None:
        """Use up positions of a span in progress."""
        rest = self.open.pop(index)
        if rest.begin + positions < rest.end:
            self.open.insert(index, rest._replace(begin=rest.begin + positions))


@dataclass
class LoaderState:
    """State of a loader, from which it can resume; ready for JSON."""

    step: int
    streams: list[dict[str, Any]] = field(default_factory=list)
    """State of the stream of each row."""

    @classmethod
    def join(cls, states: "Sequence[LoaderState]") -> "LoaderState":
        """Return the state with the streams of all ranks, from those of the ranks in order."""
        size = len(states)
        num_rows = sum(len(state.streams) for state in states)
        streams = [states[r % size].streams[r // size] for r in range(num_rows)]
        return cls(states[0].step, streams)


class Loader:
    """Loader of training batches, one per optimiser step.

    Args:
        dataset: prepared data, with entropies if the units need them.
        units: units of the model.
        row_bytes: bytes in a row.
        row_units: units in a row; ``None`` for no limit.
        packing: how rows with budgets of bytes and of units are filled; others are filled in order.
        rows_per_step: rows in a step, over all ranks.
        mixture: relative shares of bytes by source name; ``None`` for the shares of the data.
        seed: seed of the order.
        rank: rank of this process, which loads rows ``rank, rank + world_size, ...``.
        world_size: number of processes.

    Raises:
        DataError: the data is empty, lacks entropies, has too few rows for the ranks, or the
            mixture names an unknown source.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        units: Units,
        row_bytes: int,
        row_units: int | None,
        rows_per_step: int,
        packing: Packing = "in-order",
        mixture: dict[str, float] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if units.needs_entropies and not dataset.has_entropies:
            raise DataError(
                f"{dataset.folder} has no entropies, which the patching rule needs: prepare it "
                "with --scorer, or choose another rule"
            )
        if world_size > rows_per_step:
            raise DataError(
                f"{rows_per_step} rows a step cannot be shared by {world_size} ranks: raise "
                "data.rows_per_step"
            )
        self._dataset = dataset
        self._units = units
        self._row_bytes = row_bytes
        self._row_units = row_units if units.has_budget else None
        self._max_bytes = row_bytes
        if self._row_units is not None:
            self._max_bytes = math.ceil(units.byte_room * row_bytes)
        has_two_budgets = self._row_units is not None and units.byte_room == 1.0
        self._is_balanced = packing == "balanced" and has_two_budgets
        self._spans: dict[_Rest, Span] = {}
        """Spans in progress that were patched together, in order."""
        self._boundaries: dict[_Rest, NDArray[np.bool_]] = {}
        """The same if rows are balanced: of many more spans, which are read again."""
        self._counts: dict[_Rest, Counts | None] = {}
        self._seed = seed
        self._num_streams = rows_per_step
        self._rows = range(rank, rows_per_step, world_size)
        self._components, self._chances = _mix(dataset, row_bytes, mixture)
        self.step = 0
        self._streams = {r: _StreamState([0] * len(self._components)) for r in self._rows}

    def next_batch(self) -> Batch:
        """Return this rank's rows of the next step."""
        self._patch_ahead()
        rows = [self._fill(r) for r in self._rows]
        self.step += 1
        return make_batch(rows)

    def draw_lengths(self, count: int) -> NDArray[np.int64]:
        """Return the lengths of some spans, drawn at random as the mixture has them."""
        generator = np.random.default_rng(self._seed)
        lengths = [spans.lengths() for spans in self._components]
        chosen = np.searchsorted(self._chances, generator.random(count), side="right")
        drawn = [generator.choice(one, int((chosen == n).sum())) for n, one in enumerate(lengths)]
        return generator.permutation(np.concatenate(drawn))

    def state(self) -> LoaderState:
        """Return the state after the batches loaded so far, with the streams of this rank."""
        return LoaderState(self.step, [asdict(self._streams[r]) for r in self._rows])

    def restore(self, state: LoaderState) -> None:
        """Resume from the state of loaders with the same settings, on any number of ranks.

        Args:
            state: state with the streams of all ranks; see :meth:`LoaderState.join`.

        Raises:
            DataError: the state has another number of rows.
        """
        if len(state.streams) != self._num_streams:
            raise DataError(
                f"the saved position has {len(state.streams)} rows a step, not "
                f"{self._num_streams}: resume with the same data.rows_per_step"
            )
        self.step = state.step
        self._streams = {r: _StreamState.from_json(state.streams[r]) for r in self._rows}

    @property
    def epochs(self) -> float:
        """Epochs so far, as the ratio of spans drawn to all spans.

        Of the spans in progress in a stream, only one counts.
        """
        drawn = sum(sum(s.draws) - len(s.open[1:]) for s in self._streams.values())
        return drawn / sum(map(len, self._components))

    def _patch_ahead(self) -> None:
        """Patch the spans that the next rows may take, many at once: alone, short ones cost more.

        Without it the rows are the same: what is not known is patched when it is taken.
        """
        if not isinstance(self._units, PatchUnits):
            return
        some, num_positions = list[tuple[_Rest, Span]](), 0
        for rest in self._upcoming():
            some.append((rest, self._span(rest, self._max_bytes)))
            num_positions += rest.size
            if num_positions >= PATCHED_TOGETHER:
                self._patch(some)
                some, num_positions = [], 0
        self._patch(some)

    def _patch(self, some: Sequence[tuple[_Rest, Span]]) -> None:
        """Patch some spans in one call."""
        assert isinstance(self._units, PatchUnits)
        if some:
            found = self._units.next_boundaries([span for _, span in some])
            for (rest, span), boundary in zip(some, found, strict=True):
                if self._is_balanced:
                    self._boundaries[rest] = boundary
                else:
                    self._spans[rest] = span._replace(next_boundary=boundary)

    def _upcoming(self) -> Iterator[_Rest]:
        """Draw spans until there are enough to fill a row of each stream; yield the new ones."""
        known = self._boundaries if self._is_balanced else self._spans
        wanted = OPEN_SPANS if self._is_balanced else 0
        for number, state in self._streams.items():
            size = sum(rest.size for rest in state.open[wanted:])
            while len(state.open) < wanted or size < self._max_bytes:
                self._draw(number, state)
                size += state.open[-1].size if len(state.open) > wanted else 0
            yield from (rest for rest in state.open if rest not in known)

    def _fill(self, number: int) -> Row:
        row = Row(self._max_bytes, self._row_units, self._units)
        state = self._streams[number]
        wanted, add = (OPEN_SPANS, self._balance) if self._is_balanced else (1, self._add_next)
        while not row.is_full:
            while len(state.open) < wanted:
                self._draw(number, state)
            if not add(row, state):
                break
        return row

    def _add_next(self, row: Row, state: _StreamState) -> bool:
        """Add as much as fits of the oldest span; return whether anything was added."""
        rest = state.open[0]
        is_masked = self._is_masked(rest)
        limit = self._max_bytes - (0 if is_masked else row.num_bytes)
        known = self._spans.pop(rest, None)
        span = self._span(rest, limit) if known is None else known.head(limit)
        if is_masked and row.spans and not row.has_room(span):
            return False
        state.advance(0, row.add(span))
        return True

    def _balance(self, row: Row, state: _StreamState) -> bool:
        """Fill a row with the oldest span and another; return whether anything was added.

        If both are too short, or do not fit well, the oldest is added as a whole.
        """
        known = [self._count(rest) for rest in state.open[:OPEN_SPANS]]
        if known[0] is None:
            return self._add_whole(row, state)
        assert row.budget is not None
        room, room_units = self._max_bytes - row.num_bytes, row.budget - row.num_units
        chosen = [i for i, counts in enumerate(known) if counts is not None]
        cut = best_cut([counts for counts in known if counts is not None], room, room_units)
        leaves_room = len(known[0]) <= room and known[0][-1] < room_units - 1
        if cut is None or (cut.misfit > 1 and leaves_room):
            return self._add_part(row, state, 0, room)
        if cut.partner is None:
            return self._add_part(row, state, 0, cut.length)
        # The partner first, whose index holds until the oldest span is used up.
        self._add_part(row, state, chosen[cut.partner], room - cut.length)
        return row.is_full or self._add_part(row, state, 0, cut.length)

    def _add_whole(self, row: Row, state: _StreamState) -> bool:
        """Add the first span of which only some bytes are trained on and which fits as a whole."""
        for index, rest in enumerate(state.open[:OPEN_SPANS]):
            if self._count(rest) is None and row.has_room(self._span(rest, self._max_bytes)):
                return self._add_part(row, state, index, self._max_bytes)
        return not row.spans and self._add_part(row, state, 0, self._max_bytes)

    def _add_part(self, row: Row, state: _StreamState, index: int, limit: int) -> bool:
        """Add as much as fits of the beginning of a span in progress."""
        rest = state.open[index]
        state.advance(index, row.add(self._span(rest, limit)))
        self._counts.pop(rest, None)
        self._boundaries.pop(rest, None)
        return True

    def _is_masked(self, rest: _Rest) -> bool:
        """Whether only some bytes of a span's document are trained on."""
        return self._dataset.trained(rest.document) is not None

    def _count(self, rest: _Rest) -> Counts | None:
        """Return the patches in the beginnings of a span; ``None`` if it must not be cut."""
        if rest not in self._counts and self._is_masked(rest):
            self._counts[rest] = None
        elif rest not in self._counts:
            segment = self._units.segment(self._span(rest, self._max_bytes))
            assert segment.next_boundary is not None
            counts = np.zeros(len(segment.next_boundary) + 1, np.int32)
            counts[1:] = 1
            counts[2:] += np.cumsum(segment.next_boundary[:-1], dtype=np.int32)
            self._counts[rest] = counts
        return self._counts[rest]

    def _span(self, rest: _Rest, limit: int) -> Span:
        """Return the beginning of a span in progress, at most ``limit`` positions."""
        document, begin = rest.document, rest.begin
        end = min(rest.end, begin + limit)
        entropies = None
        if self._units.needs_entropies and rest not in self._boundaries:
            entropies = self._dataset.entropies(document, begin, end)
        ids = self._dataset.ids(document, begin, end + 1)
        targets = self._dataset.targets(document, begin, ids)
        boundary = self._boundaries.get(rest)
        if boundary is not None:
            boundary = boundary[: end - begin]
        return Span(document, begin, ids, entropies, targets, boundary)

    def _draw(self, number: int, state: _StreamState) -> None:
        """Draw the stream's next span."""
        component = 0
        if len(self._components) > 1:
            draw = sum(state.draws)
            # The counter holds row and draw, so a number does not depend on the order of draws.
            bits = np.random.Philox(key=self._seed, counter=[0, 0, number, draw])
            chance = np.random.Generator(bits).random()
            component = int(np.searchsorted(self._chances, chance, side="right"))
        spans = self._components[component]
        index = number + self._num_streams * state.draws[component]
        document, span = spans.at(index, [self._seed, component])
        state.draws[component] += 1
        begin = span * self._row_bytes
        num_positions = int(self._dataset.lengths[document]) + 1
        state.open.append(_Rest(document, begin, min(begin + self._row_bytes, num_positions)))


def _mix(
    dataset: Dataset, row_bytes: int, mixture: dict[str, float] | None
) -> tuple[list[SpanOrder], NDArray[np.float64]]:
    """Return the mixture's components, and the cumulative chance of drawing from each."""
    if not len(dataset):
        raise DataError(f"{dataset.folder} holds no training documents")
    if mixture is None:
        everything = np.arange(len(dataset), dtype=np.int64)
        return [SpanOrder(dataset.lengths, everything, row_bytes)], np.ones(1)
    components, shares = [], []
    for name, share in mixture.items():
        if name not in dataset.source_names:
            known = ", ".join(dataset.source_names)
            raise DataError(f"data.mixture names {name!r}, which is not one of the sources {known}")
        chosen = np.flatnonzero(dataset.source_ids == dataset.source_names.index(name))
        spans = SpanOrder(dataset.lengths, chosen.astype(np.int64), row_bytes)
        if not len(spans):
            raise DataError(f"source {name!r} of data.mixture has no training documents: remove it")
        components.append(spans)
        # Shares are of bytes: of a source with smaller spans, more spans are drawn.
        shares.append(share / spans.mean_bytes)
    chances = np.cumsum(shares) / np.sum(shares)
    chances[-1] = 1.0
    return components, chances
