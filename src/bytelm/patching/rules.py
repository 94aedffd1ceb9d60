"""Patching rules: where patches begin.

A rule answers one question at one byte: does the *next* byte start a patch? It may look at that
byte, the byte before it, their entropies and the position: a pointwise function
(:class:`Context` in, boolean out). Applying it to a whole batch or to one byte at a time is
therefore the same computation on tensors of different shapes, which makes every rule incremental
(the patching of a prefix is the prefix of the patching, paper section 2.4) by construction.

The entropy at byte ``i`` is that of the model's prediction of byte ``i + 1``, in nats, so
"``entropy[i] > threshold``" reads "byte ``i + 1`` starts a patch".
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.config import (
    BytePatching,
    CombinedPatching,
    EntropyPatching,
    MonotonicPatching,
    PatchingConfig,
    SpacePatching,
    StaticPatching,
)
from bytelm.errors import PatchingError
from bytelm.patching.boundaries import row_positions


class Context(NamedTuple):
    """What a rule may look at to decide whether the byte after each byte starts a patch."""

    positions: Int[Tensor, "*shape"]
    """Index of the byte in its document."""
    ids: Int[Tensor, "*shape"]
    previous_ids: Int[Tensor, "*shape"]
    """Id before it; meaningless at position 0."""
    entropies: Float[Tensor, "*shape"] | None
    """Entropy, in nats, of the prediction of the byte after it."""
    previous_entropies: Float[Tensor, "*shape"] | None
    """Entropy at the byte before it; meaningless at position 0."""


@runtime_checkable
class Rule(Protocol):
    """A patching rule."""

    needs_entropies: ClassVar[bool]
    """Whether :class:`Context` must carry entropies."""

    def __call__(self, context: Context) -> Bool[Tensor, "*shape"]:
        """Whether the byte after each byte starts a patch. Position 0 is decided elsewhere."""
        ...


@dataclass(frozen=True)
class ByteRule:
    """Every byte is a patch."""

    needs_entropies: ClassVar[bool] = False

    def __call__(self, context: Context) -> Bool[Tensor, "*shape"]:
        return torch.ones_like(context.ids, dtype=torch.bool)


@dataclass(frozen=True)
class StaticRule:
    """Patches begin at every multiple of ``length`` (MegaByte; paper section 2.1)."""

    length: int
    needs_entropies: ClassVar[bool] = False

    def __call__(self, context: Context) -> Bool[Tensor, "*shape"]:
        return (context.positions + 1) % self.length == 0


@dataclass(frozen=True)
class SpaceRule:
    """A patch begins after the first of a run of space-like bytes (SpaceByte; section 2.2).

    A byte is space-like unless it is a Latin letter, a digit or a UTF-8 continuation byte; so the
    lead byte of a multi-byte character is. Special ids are space-like, and a patch also begins
    after each of them. The rest of a run of space-like bytes begins the next patch.
    """

    needs_entropies: ClassVar[bool] = False

    def __call__(self, context: Context) -> Bool[Tensor, "*shape"]:
        ends = is_space_like(context.ids) & ~is_space_like(context.previous_ids)
        return ends | (context.ids < codec.OFFSET)


@dataclass(frozen=True)
class EntropyRule:
    """Patches begin where the next byte is hard to predict (paper section 2.3).

    With ``H`` the entropies, the byte after byte ``i`` starts a patch if

    * ``H[i] > threshold`` (the global rule, with ``threshold`` alone),
    * ``H[i] - H[i-1] > increase`` (the approximate monotonic rule, with ``increase`` alone),
    * both (the combined rule).

    The released checkpoints use the global rule. (Under the other two the official code also
    starts a patch at the third position of every document, whatever the entropies; these do not.)
    """

    threshold: float | None = None
    increase: float | None = None
    needs_entropies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.threshold is None and self.increase is None:
            raise ValueError("an entropy rule needs a threshold, an increase or both")

    def __call__(self, context: Context) -> Bool[Tensor, "*shape"]:
        entropies, previous = context.entropies, context.previous_entropies
        if entropies is None or previous is None:
            raise ValueError("an entropy rule needs entropies")
        if self.increase is None:
            assert self.threshold is not None
            return entropies > self.threshold
        rises = entropies - previous > self.increase
        return rises if self.threshold is None else rises & (entropies > self.threshold)


def is_space_like(ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Neither a Latin letter nor a digit nor a UTF-8 continuation byte (special ids are)."""
    byte = ids - codec.OFFSET
    lower = byte | 0x20
    is_letter = (lower >= ord("a")) & (lower <= ord("z"))
    is_digit = (byte >= ord("0")) & (byte <= ord("9"))
    is_continuation = (byte >= 0x80) & (byte < 0xC0)
    return ~(is_letter | is_digit | is_continuation) | (ids < codec.OFFSET)


@dataclass(frozen=True)
class Patcher:
    """A rule and, optionally, a longest patch.

    A patch that the rule leaves longer than ``max_length`` is cut, from its start, into pieces of
    ``max_length`` and a remainder, which keeps the patching incremental. The first byte of a
    document is always a patch of its own.
    """

    rule: Rule
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {self.max_length}")

    @property
    def needs_entropies(self) -> bool:
        """Whether :meth:`next_boundary` must be given entropies."""
        return self.rule.needs_entropies

    def next_boundary(
        self,
        ids: Int[Tensor, "batch bytes"],
        entropies: Float[Tensor, "batch bytes"] | None = None,
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Bool[Tensor, "batch bytes"]:
        """Whether the byte after each byte starts a patch, for whole documents.

        Args:
            ids: packed rows; every document begins in its row.
            entropies: entropy of the prediction of the byte after each, where the rule needs it.
            documents: document of each byte; ``None`` for one document a row.
        """
        if documents is None:
            documents = torch.zeros_like(ids)
        positions = row_positions(documents)
        previous = None if entropies is None else entropies.roll(1, 1)
        context = Context(positions, ids, ids.roll(1, 1), entropies, previous)
        decision = self.rule(context) | (positions == 0)
        if self.max_length is None:
            return decision
        starts = decision.roll(1, 1) | (positions == 0)
        return _limit_lengths(decision, starts, self.max_length, positions.new_zeros(()))[0]

    def stream(self) -> "PatcherStream":
        """Apply the rule to one document as it arrives."""
        return PatcherStream(self)


class PatcherStream:
    """Boundary decisions for one document, fed in pieces of any length.

    What :meth:`feed` returns, concatenated over the pieces, is :meth:`Patcher.next_boundary` of
    the whole: the state is the last id and entropy, the position, and how long the rule's current
    patch already is.
    """

    def __init__(self, patcher: Patcher) -> None:
        self._patcher = patcher
        self._position = 0
        self._previous_id: Tensor | None = None
        self._previous_entropy: Tensor | None = None
        self._previous_decision: Tensor | None = None
        self._open_length: Tensor | None = None

    def feed(
        self, ids: Int[Tensor, " bytes"], entropies: Float[Tensor, " bytes"] | None = None
    ) -> Bool[Tensor, " bytes"]:
        """Whether the byte after each of ``ids``, the document's next bytes, starts a patch."""
        if not len(ids):
            return torch.zeros_like(ids, dtype=torch.bool)
        begin = self._position
        positions = torch.arange(begin, begin + len(ids), device=ids.device)
        context = Context(
            positions,
            ids,
            _shift(ids, self._previous_id),
            entropies,
            None if entropies is None else _shift(entropies, self._previous_entropy),
        )
        decision = self._patcher.rule(context)
        if begin == 0:
            decision = decision | (positions == 0)
        limited = decision
        if self._patcher.max_length is not None:
            starts = _shift(decision, self._previous_decision) | (positions == 0)
            carried = positions.new_zeros(()) if self._open_length is None else self._open_length
            limited, self._open_length = _limit_lengths(
                decision, starts, self._patcher.max_length, carried
            )
        self._position += len(ids)
        self._previous_id = ids[-1:]
        self._previous_entropy = None if entropies is None else entropies[-1:]
        self._previous_decision = decision[-1:]
        return limited


def build_patcher(config: PatchingConfig) -> Patcher:
    """The patcher a configuration describes.

    Raises:
        PatchingError: a threshold has not been calibrated yet.
    """
    return Patcher(_build_rule(config), config.max_length)


def _build_rule(config: PatchingConfig) -> Rule:
    match config:
        case BytePatching():
            return ByteRule()
        case StaticPatching():
            return StaticRule(config.length)
        case SpacePatching():
            return SpaceRule()
        case EntropyPatching(threshold=float(threshold)):
            return EntropyRule(threshold=threshold)
        case MonotonicPatching(increase=float(increase)):
            return EntropyRule(increase=increase)
        case CombinedPatching(threshold=float(threshold)):
            return EntropyRule(threshold=threshold, increase=config.increase)
    raise PatchingError(f"the {config.kind} rule has no threshold yet: give one, or calibrate it")


def _shift(values: Tensor, previous: Tensor | None) -> Tensor:
    """``values`` one position later, ``previous`` (anything, where there is none) in front."""
    first = values[:1] if previous is None else previous
    return first if len(values) == 1 else torch.cat((first, values[:-1]))


def _limit_lengths(
    decision: Bool[Tensor, "*batch bytes"],
    starts: Bool[Tensor, "*batch bytes"],
    max_length: int,
    carried: Int[Tensor, ""],
) -> tuple[Bool[Tensor, "*batch bytes"], Int[Tensor, "*batch"]]:
    """Also end a patch at every ``max_length`` bytes since the rule last started one.

    Args:
        decision: whether the rule starts a patch after each byte.
        starts: whether it started one at each byte.
        max_length: longest patch.
        carried: bytes that the patch open at the first column already had.

    Returns:
        The decisions, and the bytes since the rule last started a patch, the last one included.
    """
    num_bytes = decision.shape[-1]
    index = torch.arange(num_bytes, device=decision.device)
    last_start = torch.where(starts, index, -carried).cummax(-1).values
    limited = decision | ((index - last_start + 1) % max_length == 0)
    return limited, num_bytes - last_start[..., -1]
