"""Patching rules, which decide where patches begin.

A rule decides at each byte whether the *next* byte starts a patch. Most rules are pointwise: the
decision depends on that byte, the byte before it, their entropies, the encoder's state and the
position (:class:`Seen`). Applying such a rule to a whole batch or to one byte at a time is the same
computation on tensors of different shapes. A :class:`StatefulRule` also has a memory of the
document so far. Either way the patching of a prefix is the prefix of the patching (paper section
2.4), by construction.

The entropy at byte ``i`` is that of the model's prediction of byte ``i + 1``, in nats, so
"``entropy[i] > threshold``" reads "byte ``i + 1`` starts a patch".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.config import (
    RULES,
    BytePatching,
    CombinedPatching,
    EntropyPatching,
    MonotonicPatching,
    PatchingConfig,
    SpacePatching,
    StaticPatching,
)
from bytelm.errors import PatchingError

ConfigT = TypeVar("ConfigT", bound=PatchingConfig)


class Seen(NamedTuple):
    """Inputs of a rule's decisions at some bytes."""

    positions: Int[Tensor, "*shape"]
    """Index of the byte in its document."""
    ids: Int[Tensor, "*shape"]
    previous_ids: Int[Tensor, "*shape"]
    """Id before it; meaningless at position 0."""
    entropies: Float[Tensor, "*shape"] | None = None
    """Entropy, in nats, of the prediction of the byte after it."""
    previous_entropies: Float[Tensor, "*shape"] | None = None
    """Entropy at the byte before it; meaningless at position 0."""
    states: Float[Tensor, "*shape dim"] | None = None
    """The encoder's state at the byte, for rules that are part of the model."""


@runtime_checkable
class Rule(Protocol):
    """Pointwise patching rule.

    It may be a module with weights of its own, which are trained and saved with the model.
    """

    needs_entropies: ClassVar[bool]
    """Whether :class:`Seen` must carry entropies."""

    def __call__(self, seen: Seen) -> Bool[Tensor, "*shape"]:
        """Decide whether the byte after each byte starts a patch; position 0 always does."""
        ...


@runtime_checkable
class StatefulRule(Protocol):
    """Patching rule with a memory of the document so far."""

    needs_entropies: ClassVar[bool]
    """Whether :class:`Seen` must carry entropies."""

    def start(self) -> Any:
        """Return the memory of an empty document."""
        ...

    def advance(self, seen: Seen, memory: Any) -> tuple[Bool[Tensor, " bytes"], Any]:
        """Decide for the next bytes of a document.

        Args:
            seen: inputs at consecutive bytes, at least one.
            memory: memory of the bytes before; it must not be changed in place.

        Returns:
            Whether the byte after each byte starts a patch, and the memory after the last of them.
        """
        ...


def needs_states(rule: Rule | StatefulRule) -> bool:
    """Whether a rule reads the encoder's states; rules may declare it as an attribute."""
    return bool(getattr(rule, "needs_states", False))


@dataclass(frozen=True)
class ByteRule:
    """Every byte is a patch."""

    needs_entropies: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Bool[Tensor, "*shape"]:
        return torch.ones_like(seen.ids, dtype=torch.bool)


@dataclass(frozen=True)
class StaticRule:
    """Patches begin at every multiple of ``length`` (MegaByte; paper section 2.1)."""

    length: int
    needs_entropies: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Bool[Tensor, "*shape"]:
        return (seen.positions + 1) % self.length == 0


@dataclass(frozen=True)
class SpaceRule:
    """A patch begins after the first of a run of space-like bytes (SpaceByte; section 2.2).

    A byte is space-like unless it is a Latin letter, a digit or a UTF-8 continuation byte; so the
    lead byte of a multi-byte character is. Special ids are space-like, and a patch also begins
    after each of them. The rest of a run of space-like bytes begins the next patch.
    """

    needs_entropies: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Bool[Tensor, "*shape"]:
        # Together, since for short documents the number of operations decides.
        is_space, follows_space = is_space_like(torch.stack((seen.ids, seen.previous_ids)))
        return (is_space & ~follows_space) | (seen.ids < codec.OFFSET)


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

    def __call__(self, seen: Seen) -> Bool[Tensor, "*shape"]:
        entropies, previous = seen.entropies, seen.previous_entropies
        if entropies is None or previous is None:
            raise ValueError("an entropy rule needs entropies")
        if self.increase is None:
            assert self.threshold is not None
            return entropies > self.threshold
        rises = entropies - previous > self.increase
        return rises if self.threshold is None else rises & (entropies > self.threshold)


def is_space_like(ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Whether ids are neither Latin letters, digits nor UTF-8 continuation bytes."""
    # Byte ids are small: 16 bits are compared several times as fast as 64.
    byte = ids.to(torch.int16) - codec.OFFSET
    lower = byte | 0x20
    is_letter = (lower >= ord("a")) & (lower <= ord("z"))
    is_digit = (byte >= ord("0")) & (byte <= ord("9"))
    is_continuation = (byte >= 0x80) & (byte < 0xC0)
    return ~(is_letter | is_digit | is_continuation) | (byte < 0)


@singledispatch
def build_rule(config: PatchingConfig) -> Rule | StatefulRule:
    """Return the rule of a configuration.

    Raises:
        PatchingError: a threshold has not been calibrated yet.
    """
    raise TypeError(f"no rule is registered for {type(config).__name__}")


def register_rule(config: type[ConfigT], build: Callable[[ConfigT], Rule | StatefulRule]) -> None:
    """Register a patching rule for recipes, checkpoints, commands and ``LanguageModel.patch``.

    Args:
        config: class of its configuration, with a ``kind`` of its own.
        build: returns the rule of a configuration.

    Raises:
        ConfigError: the kind is taken.
    """
    RULES.add(config)
    build_rule.register(config, build)


def _with_threshold(config: Any, **values: float | None) -> EntropyRule:
    if config.needs_calibration:
        raise PatchingError(
            f"the {config.kind} rule has no threshold yet: give one, or calibrate it"
        )
    return EntropyRule(**values)


register_rule(BytePatching, lambda config: ByteRule())
register_rule(StaticPatching, lambda config: StaticRule(config.length))
register_rule(SpacePatching, lambda config: SpaceRule())
register_rule(EntropyPatching, lambda config: _with_threshold(config, threshold=config.threshold))
register_rule(MonotonicPatching, lambda config: _with_threshold(config, increase=config.increase))
register_rule(
    CombinedPatching,
    lambda config: _with_threshold(config, threshold=config.threshold, increase=config.increase),
)
