"""Apply patching rules to packed rows, and to documents as they arrive."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from bytelm.config import PatchingConfig
from bytelm.patching.boundaries import row_positions
from bytelm.patching.rules import Rule, Seen, StatefulRule, build_rule, needs_states
from bytelm.slots import CompoundState, Slots, SlotTensors, assign, select


@dataclass(frozen=True)
class Patcher:
    """A patching rule with an optional maximum patch length.

    A patch longer than ``max_length`` is cut, from its start, into patches of ``max_length`` and a
    remainder, so patching stays incremental. The first byte of a document is always a patch by
    itself.
    """

    rule: Rule | StatefulRule
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {self.max_length}")

    @property
    def needs_entropies(self) -> bool:
        """Whether :meth:`next_boundary` must be given entropies."""
        return self.rule.needs_entropies

    @property
    def needs_states(self) -> bool:
        """Whether :meth:`next_boundary` must be given the encoder's states."""
        return needs_states(self.rule)

    @property
    def is_learned(self) -> bool:
        """Whether patches must be found in the forward pass.

        That is so if the rule reads the encoder's states, or has tensors of its own, which change
        in training and are on the model's device.
        """
        if not isinstance(self.rule, nn.Module):
            return self.needs_states
        return self.needs_states or any(True for _ in _tensors(self.rule))

    @cached_property
    def _is_stateful(self) -> bool:
        # Checking for a protocol takes longer than patching a short document.
        return isinstance(self.rule, StatefulRule)

    def next_boundary(
        self,
        ids: Int[Tensor, "batch bytes"],
        entropies: Float[Tensor, "batch bytes"] | None = None,
        documents: Int[Tensor, "batch bytes"] | None = None,
        states: Float[Tensor, "batch bytes dim"] | None = None,
    ) -> Bool[Tensor, "batch bytes"]:
        """Decide, for whole documents, whether the byte after each byte starts a patch.

        Args:
            ids: packed rows; every document begins in its row.
            entropies: entropy, in nats, of the prediction of the byte after each, if the rule needs
                it.
            documents: document of each byte; ``None`` for one document per row.
            states: the encoder's states, if the rule needs them.
        """
        if documents is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        else:
            positions = row_positions(documents)
        return self.next_boundary_at(positions, ids, entropies, states)

    def next_boundary_at(
        self,
        positions: Int[Tensor, "batch bytes"],
        ids: Int[Tensor, "batch bytes"],
        entropies: Float[Tensor, "batch bytes"] | None = None,
        states: Float[Tensor, "batch bytes dim"] | None = None,
    ) -> Bool[Tensor, "batch bytes"]:
        """Decide the same, from the position of each byte in its document."""
        previous = None if entropies is None else entropies.roll(1, 1)
        seen = Seen(positions, ids, ids.roll(1, 1), entropies, previous, states)
        rule: Any = self.rule
        decision = _by_document(rule, seen) if self._is_stateful else rule(seen)
        decision = decision | (positions == 0)
        if self.max_length is None:
            return decision
        starts = decision.roll(1, 1) | (positions == 0)
        return _limit_lengths(decision, starts, self.max_length, positions.new_zeros(()))[0]

    def new_state(self, num_slots: int = 1, device: torch.device | None = None) -> "PatcherState":
        """Return a state with ``num_slots`` empty documents."""
        return PatcherState(self, num_slots, device or torch.device("cpu"))


def build_patcher(config: PatchingConfig) -> Patcher:
    """Return the patcher of a configuration.

    Raises:
        PatchingError: a threshold has not been calibrated yet.
    """
    return Patcher(build_rule(config), config.max_length)


class PatcherState(CompoundState):
    """State of a patcher over slots.

    The results of :meth:`prefill` and :meth:`decode` for a document, concatenated, are those of
    :meth:`Patcher.next_boundary` for the whole document.
    """

    def __init__(self, patcher: Patcher, num_slots: int, device: torch.device) -> None:
        self._patcher = patcher
        integer, number = torch.zeros((), dtype=torch.long), torch.zeros(())
        # "since": bytes since the rule last started a patch, 0 if it starts one at the next byte.
        initial = {"position": integer, "id": integer, "entropy": number, "since": integer}
        self._last = SlotTensors(num_slots, initial, device)
        self._memory = _Memory(patcher.rule, num_slots)
        super().__init__(self._last, self._memory)

    def prefill(
        self,
        slot: int,
        ids: Int[Tensor, " bytes"],
        entropies: Float[Tensor, " bytes"] | None = None,
        states: Float[Tensor, "bytes dim"] | None = None,
    ) -> Bool[Tensor, " bytes"]:
        """Decide for the next bytes of one slot's document."""
        if not len(ids):
            return torch.zeros_like(ids, dtype=torch.bool)
        last, at = self._last, [slot]
        positions = last["position"][slot] + torch.arange(len(ids), device=ids.device)
        previous_ids, previous_entropies = _shift(ids, select(last["id"], at)), None
        if entropies is not None:
            previous_entropies = _shift(entropies, select(last["entropy"], at))
        seen = Seen(positions, ids, previous_ids, entropies, previous_entropies, states)
        decision = self._memory.advance(slot, seen) | (positions == 0)
        limited = decision
        if self._patcher.max_length is not None:
            since = last["since"][slot]
            starts = _shift(decision, since[None] == 0)
            limited, since = _limit_lengths(decision, starts, self._patcher.max_length, since)
            last["since"][slot] = since.masked_fill(decision[-1], 0)
        last["position"][slot] += len(ids)
        last["id"][slot] = ids[-1]
        if entropies is not None:
            last["entropy"][slot] = entropies[-1]
        return limited

    def decode(
        self,
        ids: Int[Tensor, " slots"],
        entropies: Float[Tensor, " slots"] | None = None,
        states: Float[Tensor, "slots dim"] | None = None,
        slots: Slots = None,
    ) -> Bool[Tensor, " slots"]:
        """Decide for the next byte of each slot's document."""
        last = self._last
        position = select(last["position"], slots)
        previous_entropies = None if entropies is None else select(last["entropy"], slots)
        previous_ids = select(last["id"], slots)
        seen = Seen(position, ids, previous_ids, entropies, previous_entropies, states)
        decision = self._memory.decide(slots, seen) | (position == 0)
        limited = decision
        if self._patcher.max_length is not None:
            since = select(last["since"], slots) + 1
            limited = decision | (since % self._patcher.max_length == 0)
            assign(last["since"], slots, since.masked_fill(decision, 0))
        assign(last["position"], slots, position + 1)
        assign(last["id"], slots, ids)
        if entropies is not None:
            assign(last["entropy"], slots, entropies)
        return limited


class _Memory:
    """Memory of a stateful rule for each slot's document; ``None`` for pointwise rules."""

    def __init__(self, rule: Rule | StatefulRule, num_slots: int) -> None:
        self._pointwise = None if isinstance(rule, StatefulRule) else rule
        self._stateful = rule if isinstance(rule, StatefulRule) else None
        self._memories = [self._start() for _ in range(num_slots)]

    def _start(self) -> Any:
        return None if self._stateful is None else self._stateful.start()

    def advance(self, slot: int, seen: Seen) -> Bool[Tensor, " bytes"]:
        """Decide for the next bytes of one slot's document."""
        if self._stateful is None:
            assert self._pointwise is not None
            return self._pointwise(seen)
        decision, self._memories[slot] = self._stateful.advance(seen, self._memories[slot])
        return decision

    def decide(self, slots: Slots, seen: Seen) -> Bool[Tensor, " slots"]:
        """Decide for the next byte of each slot's document."""
        if self._pointwise is not None:
            return self._pointwise(seen)
        named = range(len(self._memories)) if slots is None else slots
        rows = (_part(seen, (slice(row, row + 1),)) for row in range(len(seen.ids)))
        return torch.cat([self.advance(slot, row) for slot, row in zip(named, rows, strict=True)])

    def reset(self, slot: int) -> None:
        self._memories[slot] = self._start()

    def snapshot(self, slot: int) -> Any:
        # Rules must not change a memory in place, so it needs no copy.
        return self._memories[slot]

    def rollback(self, slot: int, snapshot: Any) -> None:
        self._memories[slot] = snapshot

    def copy(self, source: "_Memory", source_slot: int, slot: int) -> None:
        self._memories[slot] = source._memories[source_slot]


def _by_document(rule: StatefulRule, seen: Seen) -> Bool[Tensor, "batch bytes"]:
    """Apply a stateful rule to packed rows, one document after another."""
    decision = torch.zeros_like(seen.ids, dtype=torch.bool)
    for row in range(len(seen.ids)):
        starts = (seen.positions[row] == 0).nonzero().flatten().tolist()
        for begin, end in pairwise([*starts, seen.ids.shape[1]]):
            at = (row, slice(begin, end))
            decision[at] = rule.advance(_part(seen, at), rule.start())[0]
    return decision


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _part(seen: Seen, at: tuple[Any, ...]) -> Seen:
    return seen._replace(**{k: x[at] for k, x in seen._asdict().items() if x is not None})


def _shift(
    values: Shaped[Tensor, " bytes"], previous: Shaped[Tensor, "1"]
) -> Shaped[Tensor, " bytes"]:
    """Return ``values`` one position later, ``previous`` in front."""
    return torch.cat((previous, values[:-1]))


def _limit_lengths(
    decision: Bool[Tensor, "*batch bytes"],
    starts: Bool[Tensor, "*batch bytes"],
    max_length: int,
    carried: Int[Tensor, ""],
) -> tuple[Bool[Tensor, "*batch bytes"], Int[Tensor, "*batch"]]:
    """Also start a patch after every ``max_length`` bytes since the rule last started one.

    For ``max_length`` 3, a rule that starts patches at bytes 0 and 5, and no bytes carried::

        starts          1 0 0 0 0 1 0
        decision        0 0 0 0 1 0 0
        since start     1 2 3 4 5 1 2
        result          0 0 1 0 1 0 0

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
