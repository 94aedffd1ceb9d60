"""Likelihood of packed rows, in nats and in bits per byte.

::

    bpb = sum over bytes of -log2 p(byte | bytes before it)  /  number of bytes

Training, validation and evaluation all use these functions. The bytes are those of the text,
whatever units a model reads: the nats of a token are those of all its bytes. The end of a document
is a training target, but is not counted in bits per byte.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bytelm import codec
from bytelm.data import IGNORED, Batch, Row, make_batch
from bytelm.errors import NumericalError
from bytelm.lm import CausalLM
from bytelm.progress import ignore
from bytelm.training.distributed import World
from bytelm.units import Span

ROWS = 8
"""Rows measured at once."""


def position_nats(lm: CausalLM, batch: Batch) -> Float[Tensor, "batch ids"]:
    """Return the negative log-likelihood of each target, in nats; 0 on padding."""
    if lm.takes_targets:
        return lm(**batch.inputs, targets=batch.targets)
    return _target_nats(lm(**batch.inputs), batch)


def _target_nats(
    logits: Float[Tensor, "batch ids vocab"], batch: Batch
) -> Float[Tensor, "batch ids"]:
    flat = functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.unflatten(0, batch.targets.shape)


@dataclass
class Likelihood:
    """Likelihood of some text under a model."""

    nats: float = 0.0
    """Negative log-likelihood of the bytes."""
    num_bytes: int = 0
    num_units: int = 0
    """Patches or tokens, without counting overlaps of spans twice; 0 for byte models and learned
    patching rules."""
    num_positions: int = 0
    """Positions that make up the units: bytes, and a BOS for each document."""

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte; NaN if there is no text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @property
    def unit_bytes(self) -> float:
        """Mean bytes per patch or token; NaN if they are not counted."""
        return self.num_positions / self.num_units if self.num_units else math.nan

    def add(self, other: "Likelihood") -> None:
        """Add the likelihood of other text."""
        self.nats += other.nats
        self.num_bytes += other.num_bytes
        self.num_units += other.num_units
        self.num_positions += other.num_positions


def total(likelihoods: Iterable[Likelihood]) -> Likelihood:
    """Return the likelihood of several texts together."""
    result = Likelihood()
    for one in likelihoods:
        result.add(one)
    return result


class LabelledSpan(NamedTuple):
    """Span to measure, except its first ``num_seen`` positions, which were measured before."""

    label: str
    span: Span
    num_seen: int = 0


class SpanNats(NamedTuple):
    """Negative log-likelihood of the targets of a span, without those that it had seen."""

    one: LabelledSpan
    nats: NDArray[np.float64]
    """In nats, of each target: bytes or tokens, and the end of the document."""
    target_bytes: NDArray[np.int64]
    """Bytes of text in each target; 0 for the end of the document."""
    num_units: int
    """Units that begin at these targets."""
    is_greedy: NDArray[np.bool_] | None = None
    """Whether each target is what greedy sampling would choose, if that is wanted."""

    @property
    def likelihood(self) -> "Likelihood":
        """The likelihood of the bytes."""
        return Likelihood(
            nats=float(self.nats[self.target_bytes > 0].sum()),
            num_bytes=int(self.target_bytes.sum()),
            num_units=self.num_units,
            num_positions=self.one.span.num_positions - self.one.num_seen,
        )


def measure_spans(
    lm: CausalLM,
    spans: Iterable[LabelledSpan],
    *,
    context_bytes: int,
    report: Callable[[int], None] = ignore,
    world: World | None = None,
) -> dict[str, Likelihood]:
    """Return the likelihood of spans, summed by label.

    Args:
        lm: language model.
        spans: spans no longer than the context.
        context_bytes: bytes in a row.
        report: called with the bytes that this rank has measured so far, by all ranks as often.
        world: ranks that have the same spans, and share the work; ``None`` for one.

    Raises:
        NumericalError: a likelihood is not finite.
    """
    world = world or World()
    totals: dict[str, Likelihood] = {}
    done = 0
    for measured in _measure(lm, spans, context_bytes, world):
        for one in measured:
            likelihood = one.likelihood
            totals.setdefault(one.one.label, Likelihood()).add(likelihood)
            done += likelihood.num_bytes
        report(done)
    by_rank = world.gather(totals)
    labels = dict.fromkeys(label for each in by_rank for label in each)
    return {label: total(each[label] for each in by_rank if label in each) for label in labels}


def span_nats(
    lm: CausalLM, spans: Iterable[LabelledSpan], *, context_bytes: int, greedy: bool = False
) -> Iterator[SpanNats]:
    """Yield the nats of every target of spans, in their order; see :func:`measure_spans`.

    Args:
        lm: language model.
        spans: spans no longer than the context.
        context_bytes: bytes in a row.
        greedy: say of each target whether greedy sampling would choose it.

    Raises:
        NumericalError: a likelihood is not finite.
    """
    for measured in _measure(lm, spans, context_bytes, World(), greedy):
        yield from measured


Rows = list[tuple[Row, list[LabelledSpan]]]
"""Rows that are measured at once, and the spans in each."""


def _measure(
    lm: CausalLM,
    spans: Iterable[LabelledSpan],
    context_bytes: int,
    world: World,
    greedy: bool = False,
) -> Iterator[list[SpanNats]]:
    """Yield the nats of the spans in this rank's rows, for all rows that are measured at once."""
    for rows, counts in world.share(_pack(spans, lm, context_bytes)):
        nats, is_greedy = world.agree(lambda rows=rows: _finite_nats(lm, rows, greedy))
        yield list(_by_span(lm, rows, nats, is_greedy)) if counts else []


def _finite_nats(
    lm: CausalLM, rows: Rows, greedy: bool
) -> tuple[Float[Tensor, "batch ids"], Bool[Tensor, "batch ids"] | None]:
    batch = make_batch([row for row, _ in rows]).to(lm.device)
    is_greedy = None
    with torch.no_grad():
        if greedy:
            logits = lm(**batch.inputs)
            nats = _target_nats(logits, batch)
            logits[..., list(codec.NEVER_SAMPLED)] = -math.inf
            is_greedy = (logits.argmax(-1) == batch.targets).cpu()
        else:
            nats = position_nats(lm, batch)
        nats = nats.double().cpu()
    if not nats.isfinite().all():
        raise _not_finite(rows, nats)
    return nats, is_greedy


def _by_span(
    lm: CausalLM,
    rows: Rows,
    nats: Float[Tensor, "batch ids"],
    is_greedy: Bool[Tensor, "batch ids"] | None,
) -> Iterator[SpanNats]:
    for index, ((row, contents), row_nats) in enumerate(zip(rows, nats.numpy(), strict=True)):
        chosen = None if is_greedy is None else is_greedy[index].numpy()
        begin = 0
        for segment, one in zip(row.segments, contents, strict=True):
            end = begin + len(segment.targets)
            # Exact for tokens too: no token extends across ``num_seen``.
            seen = int(np.searchsorted(segment.begins, one.num_seen))
            yield SpanNats(
                one,
                row_nats[begin + seen : end],
                segment.target_bytes[seen:],
                lm.units.count(segment, seen),
                None if chosen is None else chosen[begin + seen : end],
            )
            begin = end


def _not_finite(rows: Rows, nats: Float[Tensor, "batch ids"]) -> NumericalError:
    """Return an error that names the first byte whose likelihood is not finite."""
    number, index = (~nats.isfinite()).nonzero()[0].tolist()
    row, contents = rows[number]
    ends = np.cumsum([len(segment.targets) for segment in row.segments])
    which = int(np.searchsorted(ends, index, "right"))
    segment, one = row.segments[which], contents[which]
    inside = index - (int(ends[which]) - len(segment.targets))
    at = one.span.begin + int(segment.begins[inside])
    return NumericalError(
        f"the loss of byte {at:,} of a document of {one.label!r} is {float(nats[number, index])}: "
        "the model's weights are damaged, or its training diverged; use an earlier checkpoint"
    )


def _pack(spans: Iterable[LabelledSpan], lm: CausalLM, context_bytes: int) -> Iterator[Rows]:
    """Yield groups of rows with whole spans; rows are as long as the longest of their group."""
    rows: Rows = []
    for one in spans:
        if not rows or rows[-1][0].num_bytes + one.span.num_positions > context_bytes:
            if len(rows) == ROWS:
                yield _trimmed(rows)
                rows = []
            rows.append((Row(context_bytes, None, lm.units), []))
        rows[-1][0].add(one.span, one.num_seen)
        rows[-1][1].append(one)
    if rows:
        yield _trimmed(rows)


def _trimmed(rows: Rows) -> Rows:
    longest = max(row.num_bytes for row, _ in rows)
    for row, _ in rows:
        row.max_bytes = longest
    return rows
