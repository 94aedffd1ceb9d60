"""Units into which a model divides text: bytes, patches of bytes, or tokens.

A document is a sequence of byte ids (BOS, bytes, EOS), and a :class:`Span` is a stretch of one. A
:class:`Segment` holds the ids that a model reads for a span, and its targets. Packing, training,
evaluation and generation deal with the three kinds of unit through the protocol :class:`Units`.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelm import codec
from bytelm.errors import NumericalError
from bytelm.patching import Patcher, PatchSample, patch_statistics
from bytelm.tokens import Tokenizer

Ids = NDArray[np.int64]
Ranges = tuple[tuple[int, int], ...]
"""Ranges (begin, end) of a document's bytes, in order and not touching."""
IGNORED = -100
"""Target that is not trained on, nor measured: cross-entropy leaves it out."""


def trained_targets(ids: Ids, begin: int, ranges: Ranges) -> Ids:
    """Return the targets of a span of a document of which only some bytes are trained on.

    Each range is to be predicted as if the document ended with it: its bytes, then EOS. Other
    targets are :data:`IGNORED`. With the range (2, 4) of a document of six bytes::

        position   0    1    2    3    4    5    6
        read       BOS  b0   b1   b2   b3   b4   b5
        next       b0   b1   b2   b3   b4   b5   EOS
        target     -    -    b2   b3   EOS  -    -

    Args:
        ids: ids of the span's positions, and of the one after the last.
        begin: first position of the span.
        ranges: ranges of the document's bytes.

    Returns:
        ``int64[len(ids) - 1]``.
    """
    targets = np.full(len(ids) - 1, IGNORED, np.int64)
    for first, end in ranges:
        # The byte with index b is the target of position b.
        low, high = (min(max(at - begin, 0), len(targets)) for at in (first, end))
        targets[low:high] = ids[1 + low : 1 + high]
        if 0 <= end - begin < len(targets):
            targets[end - begin] = codec.EOS
    return targets


class Span(NamedTuple):
    """Stretch of a document: ``ids[i]`` is read, ``ids[i + 1]`` or ``targets[i]`` predicted."""

    document: int
    begin: int
    """First position; 0 is BOS."""
    ids: Ids
    """Ids of the positions, and of the one after the last."""
    entropies: NDArray[np.float32] | None
    targets: Ids | None = None
    """Target of each position; ``None`` for the id after it."""
    next_boundary: NDArray[np.bool_] | None = None
    """Whether the byte after each position starts a patch, if that is known already."""

    @property
    def num_positions(self) -> int:
        """Number of positions: the bytes, and BOS, that are read."""
        return len(self.ids) - 1

    def head(self, length: int) -> "Span":
        """Return the first ``length`` positions, or all if there are fewer."""
        if length >= self.num_positions:
            return self
        entropies = None if self.entropies is None else self.entropies[:length]
        targets = None if self.targets is None else self.targets[:length]
        boundary = None if self.next_boundary is None else self.next_boundary[:length]
        return Span(self.document, self.begin, self.ids[: length + 1], entropies, targets, boundary)


class Segment(NamedTuple):
    """Ids that a model reads for one span, and its targets."""

    ids: Ids
    targets: Ids
    """Target of each id; ``IGNORED`` if it is not trained on."""
    num_positions: Ids | None
    """Number of the span's ids after each id that its target encodes, or would if trained on;
    ``None`` if it is one everywhere."""
    next_boundary: NDArray[np.bool_] | None = None
    """Whether the byte after each starts a patch; ``None`` if rows carry no patches."""

    @property
    def size(self) -> int:
        """Number of the span's positions that it holds."""
        return len(self.targets) if self.num_positions is None else int(self.num_positions.sum())

    @property
    def begins(self) -> Ids:
        """Position in the span of the id before each target."""
        if self.num_positions is None:
            return np.arange(len(self.targets))
        return self.num_positions.cumsum() - self.num_positions

    @property
    def target_bytes(self) -> Ids:
        """Bytes of text in each target; 0 for the end of a document, and if not trained on."""
        is_text = self.targets >= codec.OFFSET
        if self.num_positions is None:
            return is_text.astype(np.int64)
        return self.num_positions * is_text


@runtime_checkable
class Units(Protocol):
    """Division of text into the units that a model reads."""

    name: str
    """Name of the units: bytes, patches or tokens."""
    needs_entropies: bool
    """Whether spans must carry entropies."""
    has_budget: bool
    """Whether rows have a budget of units as well as one of bytes."""
    byte_room: float
    """Ratio of the bytes that a row may hold to its nominal number. It exceeds 1 for tokens, whose
    rows are closed by the budget of tokens."""
    sample_bytes: int
    """Bytes of text that :meth:`mean_bytes` is measured on."""
    fingerprint: str
    """Hash that distinguishes units of one kind, such as those of two tokenizers."""

    def encode(self, ids: Ids) -> Ids:
        """Return the ids that a model reads for byte ids."""
        ...

    def decode(self, chosen: int) -> bytes:
        """Return the bytes of an id that a model predicts; a special id has none."""
        ...

    def segment(self, span: Span, room: int | None = None, cut: int = 0) -> Segment:
        """Divide a span, or as much of its beginning as there is room for.

        The targets of the segment are those of the span, if it has any.

        Args:
            span: a span of at least one position.
            room: maximum number of units; ``None`` for no limit.
            cut: if above 0, a target index that no token may extend across.
        """
        ...

    def count(self, segment: Segment, seen: int = 0) -> int:
        """Return the number of units that begin after the first ``seen`` targets; 0 for bytes."""
        ...

    def row_length(self, num_bytes: int, budget: int | None) -> int:
        """Return the number of ids in a padded row."""
        ...

    def mean_bytes(self, documents: Sequence[tuple[Tensor, Tensor | None]]) -> float:
        """Return the mean number of byte ids per unit in (ids, entropies) pairs."""
        ...


class ByteUnits:
    """Bytes: every byte is a unit."""

    name: str = "bytes"
    needs_entropies = False
    has_budget = False
    byte_room = 1.0
    sample_bytes = 0
    fingerprint = ""

    def encode(self, ids: Ids) -> Ids:
        """Return the ids as they are."""
        return ids

    def decode(self, chosen: int) -> bytes:
        """Return the byte of an id."""
        return codec.BYTES[chosen]

    def segment(self, span: Span, room: int | None = None, cut: int = 0) -> Segment:
        """Return the whole span; bytes have no budget of units."""
        targets = span.ids[1:] if span.targets is None else span.targets
        return Segment(span.ids[:-1], targets, None)

    def count(self, segment: Segment, seen: int = 0) -> int:
        """Return 0: bytes are counted as positions."""
        return 0

    def row_length(self, num_bytes: int, budget: int | None) -> int:
        """Return the bytes of a row."""
        return num_bytes

    def mean_bytes(self, documents: Sequence[tuple[Tensor, Tensor | None]]) -> float:
        """Return 1."""
        return 1.0


class PatchUnits(ByteUnits):
    """Patches: bytes, grouped by a patching rule."""

    name: str = "patches"
    has_budget = True
    sample_bytes = 4_000_000

    def __init__(self, patcher: Patcher) -> None:
        self.patcher = patcher
        self.needs_entropies = patcher.needs_entropies

    def segment(self, span: Span, room: int | None = None, cut: int = 0) -> Segment:
        """Return as many whole patches as there is room for; the span is patched as a document."""
        boundary = span.next_boundary
        if boundary is None:
            (boundary,) = self.next_boundaries([span])
        if room is not None:
            starts = boundary[:-1].nonzero()[0]
            if len(starts) >= room:
                span = span.head(int(starts[room - 1]) + 1)
        whole = super().segment(span)
        return whole._replace(next_boundary=boundary[: span.num_positions])

    def next_boundaries(self, spans: Sequence[Span]) -> list[NDArray[np.bool_]]:
        """Return, for each of some spans, whether the byte after each position starts a patch.

        Each is patched as a document, but all in the operations for one, as a packed row. With
        short spans these cost more than their bytes.
        """
        lengths = [span.num_positions for span in spans]
        ends = list(accumulate(lengths))
        positions = np.arange(ends[-1])
        for begin, end in pairwise(ends):
            positions[begin:end] -= begin
        entropies = None
        if self.needs_entropies:
            entropies = _row([_entropies(span) for span in spans])
            if not entropies.isfinite().all():
                raise _not_finite(spans)
        ids = _row([span.ids[:-1] for span in spans])
        boundary = self.patcher.next_boundary_at(_row([positions]), ids, entropies)[0].numpy()
        return [boundary[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def count(self, segment: Segment, seen: int = 0) -> int:
        """Return the number of patches that begin after the first ``seen`` targets."""
        assert segment.next_boundary is not None
        return int(segment.next_boundary[max(seen - 1, 0) : -1].sum()) + (seen == 0)

    def mean_bytes(self, documents: Sequence[tuple[Tensor, Tensor | None]]) -> float:
        """Return the mean bytes per patch."""
        return patch_statistics(self.patcher, PatchSample.join(documents)).mean_size


def _row(parts: list[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))[None]


def _entropies(span: Span) -> NDArray[np.float32]:
    assert span.entropies is not None
    return span.entropies


def _not_finite(spans: Sequence[Span]) -> NumericalError:
    """Return the error for entropies that are not finite, which earlier versions stored as well."""
    span = next(span for span in spans if not np.isfinite(_entropies(span)).all())
    index = int(np.argmin(np.isfinite(_entropies(span))))
    return NumericalError(
        f"the entropy of byte {span.begin + index:,} of document {span.document:,} is "
        f"{_entropies(span)[index]}: the scorer was damaged; prepare the data again with another"
    )


class TokenUnits:
    """Byte-pair tokens: spans are the same as for bytes, and are tokenised when they are packed."""

    name: str = "tokens"
    needs_entropies = False
    has_budget = True
    byte_room = 2.0
    sample_bytes = 1_000_000

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.fingerprint = tokenizer.fingerprint

    def encode(self, ids: Ids) -> Ids:
        """Return the tokens of byte ids."""
        return self.tokenizer.encode(ids)

    def decode(self, chosen: int) -> bytes:
        """Return the bytes of a token."""
        return self.tokenizer.decode(chosen)

    def segment(self, span: Span, room: int | None = None, cut: int = 0) -> Segment:
        """Return as many tokens of a span's targets as there is room for.

        The first id read is the byte before them, not the token that it was part of. No token
        extends across the beginning or end of a range that is trained on: the text before it is
        tokenised by itself, as a prompt is when text is generated.
        """
        cuts = {cut} if span.targets is None else {cut, *_range_ends(span.ids, span.targets)}
        parts = np.split(span.ids[1:], sorted(cuts))
        tokens = np.concatenate([self.tokenizer.encode(part) for part in parts])[:room]
        num_ids = self.tokenizer.num_ids(tokens)
        ids = np.concatenate([span.ids[:1], tokens[:-1]])
        if span.targets is None:
            return Segment(ids, tokens, num_ids)
        chosen = span.targets[np.cumsum(num_ids) - num_ids]
        return Segment(ids, np.where(chosen < codec.OFFSET, chosen, tokens), num_ids)

    def count(self, segment: Segment, seen: int = 0) -> int:
        """Return the number of tokens after the first ``seen``."""
        return len(segment.targets) - seen

    def row_length(self, num_bytes: int, budget: int | None) -> int:
        """Return the budget of tokens."""
        assert budget is not None
        return budget

    def mean_bytes(self, documents: Sequence[tuple[Tensor, Tensor | None]]) -> float:
        """Return the mean byte ids per token."""
        ids = [ids.numpy() for ids, _ in documents]
        return sum(map(len, ids)) / sum(len(self.encode(one)) for one in ids)


def _range_ends(ids: Ids, targets: Ids) -> list[int]:
    """Return where ranges that are trained on begin and end, as indices of targets."""
    in_range = targets == ids[1:]
    changes = 1 + np.flatnonzero(in_range[1:] != in_range[:-1])
    # The end of an empty range is no change.
    ends = np.flatnonzero((targets == codec.EOS) & ~in_range)
    return [*changes.tolist(), *ends.tolist()]
