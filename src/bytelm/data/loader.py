"""Loader of training batches: shuffled, mixed and packed, resumable, independent of the ranks.

Documents are cut into spans of a row's bytes; an epoch is a random permutation of all spans, so
long documents are shuffled as thoroughly as short ones. Row ``r`` of every optimiser step is filled
by its own stream: stream ``r`` of ``R`` takes spans ``r, r + R, r + 2R, ...`` of the endless
concatenation of epochs. A stream's state is a few integers, and a rank runs only the streams of its
own rows, so the rows of a step are the same at any world size.

If only some bytes of a document are trained on, such as a response, a span of it is not cut at the
end of a row but begins a new one, since the rest would be trained on without its prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.dataset import Dataset
from bytelm.data.packing import Batch, Row, make_batch
from bytelm.errors import DataError
from bytelm.units import Span, Units


class SpanOrder:
    """Spans of some documents, in a new random order every epoch.

    Args:
        lengths: bytes of every document.
        documents: indices of the documents to cut into spans.
        size: positions in a span, BOS included; the last of a document may have fewer.
    """

    def __init__(self, lengths: NDArray[np.int64], documents: NDArray[np.int64], size: int) -> None:
        self.documents = documents
        # A document of n bytes has n + 1 positions: BOS and all bytes.
        counts = -(-(lengths[documents] + 1) // size)
        self._ends = np.cumsum(counts)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.mean_bytes = float((lengths[documents] + 1).sum()) / max(len(self), 1)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

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
        row = int(np.searchsorted(self._ends, span, side="right"))
        first = int(self._ends[row - 1]) if row else 0
        return int(self.documents[row]), span - first


@dataclass
class _StreamState:
    """Position of one stream."""

    draws: list[int]
    """Spans taken from each component of the mixture."""
    document: int = 0
    """Document of the span in progress."""
    begin: int = 0
    """Next position of the span in progress."""
    end: int = 0
    """End of the span in progress; a new one is drawn when ``begin`` has reached it."""


@dataclass
class LoaderState:
    """State of a loader, from which it can resume; ready for JSON."""

    step: int
    streams: list[dict[str, Any]] = field(default_factory=list)


class Loader:
    """Loader of training batches, one per optimiser step.

    Args:
        dataset: prepared data, with entropies if the units need them.
        units: units of the model.
        row_bytes: bytes in a row.
        row_units: units in a row; ``None`` for no limit.
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
        self._seed = seed
        self._num_streams = rows_per_step
        self._rows = range(rank, rows_per_step, world_size)
        self._components, self._chances = _mix(dataset, row_bytes, mixture)
        self.step = 0
        self._streams = {r: _StreamState([0] * len(self._components)) for r in self._rows}

    def next_batch(self) -> Batch:
        """Return this rank's rows of the next step."""
        rows = [self._fill(r) for r in self._rows]
        self.step += 1
        return make_batch(rows)

    def state(self) -> LoaderState:
        """Return the state after the batches loaded so far."""
        return LoaderState(self.step, [asdict(self._streams[r]) for r in self._rows])

    def restore(self, state: LoaderState) -> None:
        """Resume from the state of a loader with the same settings.

        Raises:
            DataError: the state has another number of rows.
        """
        if len(state.streams) != len(self._rows):
            raise DataError(
                f"the saved position has {len(state.streams)} rows a step on each rank, not "
                f"{len(self._rows)}: resume with the same data.rows_per_step and number of ranks"
            )
        self.step = state.step
        streams = [_StreamState(**s) for s in state.streams]
        self._streams = dict(zip(self._rows, streams, strict=True))

    @property
    def epochs(self) -> float:
        """Epochs so far, as the ratio of spans drawn to all spans."""
        drawn = sum(sum(s.draws) for s in self._streams.values())
        return drawn / sum(map(len, self._components))

    def _fill(self, number: int) -> Row:
        row = Row(self._max_bytes, self._row_units, self._units)
        state = self._streams[number]
        while not row.is_full:
            if state.begin >= state.end:
                self._draw(number, state)
            is_masked = self._dataset.trained(state.document) is not None
            limit = self._max_bytes - (0 if is_masked else row.num_bytes)
            span = self._span(state, limit)
            if is_masked and row.spans and not row.has_room(span):
                break
            state.begin += row.add(span)
        return row

    def _span(self, state: _StreamState, limit: int) -> Span:
        end = min(state.end, state.begin + limit)
        entropies = None
        if self._units.needs_entropies:
            entropies = self._dataset.entropies(state.document, state.begin, end)
        ids = self._dataset.ids(state.document, state.begin, end + 1)
        targets = self._dataset.targets(state.document, state.begin, ids)
        return Span(state.document, state.begin, ids, entropies, targets)

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
        state.document = document
        state.begin = span * self._row_bytes
        num_positions = int(self._dataset.lengths[document]) + 1
        state.end = min(state.begin + self._row_bytes, num_positions)


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
