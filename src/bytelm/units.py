"""Units: how a model divides text - into bytes, patches of bytes, or tokens.

Documents are sequences of byte ids (BOS, bytes, EOS), and a :class:`Span` is consecutive positions
of one. What a model reads and predicts of it is a :class:`Segment`. The three strategies here are
all that packing, training, evaluation and generation need to know of the difference.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelm import codec
from bytelm.patching import Patcher, PatchSample, patch_statistics
from bytelm.tokens import Tokenizer

Ids = NDArray[np.int64]


class Span(NamedTuple):
    """Consecutive positions of a document: ``ids[i]`` is read, ``ids[i + 1]`` predicted."""

    document: int
    begin: int
    """First position; 0 is BOS."""
    ids: Ids
    """One more than there are positions."""
    entropies: NDArray[np.float32] | None

    @property
    def num_positions(self) -> int:
        """Bytes (or BOS) read."""
        return len(self.ids) - 1

    def head(self, length: int) -> "Span":
        """Return the first ``length`` positions, or all if there are fewer."""
        entropies = None if self.entropies is None else self.entropies[:length]
        return self._replace(ids=self.ids[: length + 1], entropies=entropies)


class Segment(NamedTuple):
    """What a model reads of one span, and predicts."""

    ids: Ids
    targets: Ids
    num_positions: Ids
    """How many of the span's ids each target stands for."""
    next_boundary: NDArray[np.bool_] | None = None
    """For models of patches: whether the byte after each starts one."""

    @property
    def target_bytes(self) -> Ids:
        """Bytes of text in each target: none in the end of a document."""
        return np.where(self.targets == codec.EOS, 0, self.num_positions)


@runtime_checkable
class Units(Protocol):
    """A way to divide text."""

    name: str
    """What they are called: bytes, patches or tokens."""
    needs_entropies: bool
    """Whether spans must carry entropies."""
    has_budget: bool
    """Whether rows have a budget of units beside that of bytes."""
    margin: float
    """Budget of a row over the units that its bytes need on average."""
    byte_room: float
    """Bytes that a row may hold over its nominal number: rows of tokens close on tokens."""
    sample_bytes: int
    """Text that :meth:`mean_bytes` is measured on."""
    fingerprint: str
    """What tells these units from others of their kind that data does not tell apart."""

    def encode(self, ids: Ids) -> Ids:
        """Return the ids that a model reads of byte ids."""
        ...

    def decode(self, chosen: int) -> bytes:
        """Return the bytes of an id that a model predicts: none of a special one."""
        ...

    def segment(self, span: Span, room: int | None = None, cut: int = 0) -> Segment:
        """Divide a span, or as much of its beginning as there is room for.

        Args:
            span: of at least one position.
            room: most units; ``None`` for no limit.
            cut: where above 0, no unit of several positions lies on both sides of this one.
        """
        ...

    def count(self, segment: Segment, seen: int = 0) -> int:
        """Count the units that begin after the first ``seen`` targets; 0 for bytes."""
        ...

    def row_length(self, num_bytes: int, budget: int | None) -> int:
        """Return the number of ids in a padded row."""
        ...

    def mean_bytes(self, documents: Sequence[tuple[Tensor, Tensor | None]]) -> float:
        """Return the mean byte ids per unit of (ids, entropies) pairs."""
        ...


class ByteUnits:
    """Every byte by itself."""

    name: str = "bytes"
    needs_entropies = False
    has_budget = False
    margin = 1.0
    byte_room = 1.0
    sample_bytes = 0
    fingerprint = ""

    def encode(self, ids: Ids) -> Ids:
        """Return the ids as they are."""
        return ids

    def decode(self, chosen: int) -> bytes:
        """Return the byte of an id."""
        return codec.decode([chosen])

    def segment(self, span: Span, room: int | None = None, cut: int = 0) -> Segment:
        """Return all of a span."""
        return Segment(span.ids[:-1], span.ids[1:], np.ones(span.num_positions, np.int64))

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
    """Bytes, in patches that a rule finds."""

    name: str = "patches"
    has_budget = True
    margin = 1.1
    sample_bytes = 4_000_000

    def __init__(self, patcher: Patcher) -> None:
        self.patcher = patcher
        self.needs_entropies = patcher.needs_entropies

    def segment(self, span: Span, room: int | None = None, cut: int = 0) -> Segment:
        """Return as many whole patches of a span, taken as a document, as there is room for."""
        boundary = self._boundaries(span)
        starts = np.flatnonzero(boundary[:-1]) + 1
        if room is not None and len(starts) >= room:
            span = span.head(int(starts[room - 1]))
        whole = super().segment(span)
        return whole._replace(next_boundary=boundary[: span.num_positions])

    def _boundaries(self, span: Span) -> NDArray[np.bool_]:
        ids = torch.from_numpy(span.ids[:-1])[None]
        entropies = None
        if self.needs_entropies:
            assert span.entropies is not None
            entropies = torch.from_numpy(span.entropies)[None]
        return self.patcher.next_boundary(ids, entropies)[0].numpy()

    def count(self, segment: Segment, seen: int = 0) -> int:
        """Count patches; one counts where it begins."""
        assert segment.next_boundary is not None
        return int(segment.next_boundary[max(seen - 1, 0) : -1].sum()) + (seen == 0)

    def mean_bytes(self, documents: Sequence[tuple[Tensor, Tensor | None]]) -> float:
        """Return the mean bytes per patch."""
        return patch_statistics(self.patcher, PatchSample.join(documents)).mean_size


class TokenUnits:
    """Byte-pair tokens: the same spans of the same documents, cut after they are chosen."""

    name: str = "tokens"
    needs_entropies = False
    has_budget = True
    margin = 1.0
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
        """Return as many tokens of what a span predicts as there is room for.

        The byte before them, whatever token it was part of, is all that is known of the text
        before.
        """
        parts = [span.ids[1 : 1 + cut], span.ids[1 + cut :]]
        targets = np.concatenate([self.tokenizer.encode(part) for part in parts])[:room]
        ids = np.concatenate([span.ids[:1], targets[:-1]])
        return Segment(ids, targets, self.tokenizer.num_ids(targets))

    def count(self, segment: Segment, seen: int = 0) -> int:
        """Count tokens."""
        return len(segment.targets) - seen

    def row_length(self, num_bytes: int, budget: int | None) -> int:
        """Return the budget of tokens."""
        assert budget is not None
        return budget

    def mean_bytes(self, documents: Sequence[tuple[Tensor, Tensor | None]]) -> float:
        """Return the mean byte ids per token."""
        ids = [ids.numpy() for ids, _ in documents]
        return sum(map(len, ids)) / sum(len(self.encode(one)) for one in ids)
