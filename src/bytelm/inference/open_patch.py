"""What a byte of a BLT reads besides its rings: the open patch of its slot, and the last latent."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bytelm.model.blt import Readable
from bytelm.slots import Slots, assign, select


class OpenPatch:
    """Byte states of each slot's open patch, for every encoder layer that patches read."""

    FIRST_ROOM = 64

    def __init__(self, num_slots: int, *, is_static: bool) -> None:
        self._num_slots, self._is_static = num_slots, is_static
        self._lengths = [0] * num_slots
        self._states: list[Float[Tensor, "slots room dim"]] = []

    @property
    def room(self) -> int:
        """Bytes per patch that memory is allocated for."""
        return self._states[0].shape[1] if self._states else 0

    def extend(self, slot: int, states: Sequence[Float[Tensor, "1 bytes dim"]]) -> None:
        """Add bytes to a slot's open patch."""
        begin, end = self._lengths[slot], self._lengths[slot] + states[0].shape[1]
        if not self._states:
            shape = (self._num_slots, self.FIRST_ROOM)
            self._states = [state.new_zeros(*shape, state.shape[2]) for state in states]
        self._grow(end)
        for buffer, state in zip(self._states, states, strict=True):
            buffer[slot, begin:end] = state[0]
        self._lengths[slot] = end

    def take(self, slot: int) -> list[Float[Tensor, "1 bytes dim"]]:
        """Return a slot's open patch, and empty it."""
        length, self._lengths[slot] = self._lengths[slot], 0
        return [buffer[slot : slot + 1, :length] for buffer in self._states]

    def count(self, slots: Sequence[int]) -> list[int]:
        """Count one more byte in each of some slots, and return its index in the patch."""
        index = [self._lengths[slot] for slot in slots]
        for slot in slots:
            self._lengths[slot] += 1
        self._grow(max(self._lengths))
        return index

    def append(
        self,
        slots: Slots,
        index: Int[Tensor, " slots"],
        states: Sequence[Float[Tensor, "slots 1 dim"]],
    ) -> None:
        """Write the byte that :meth:`count` counted in each of some slots."""
        if len(index) == 1 and not self._is_static:
            slot, at = 0 if slots is None else slots[0], int(index)
            for buffer, state in zip(self._states, states, strict=True):
                buffer[slot, at] = state[0, 0]
            return
        rows = torch.arange(len(index), device=index.device)
        if slots is not None:
            rows = torch.tensor(list(slots), device=index.device)
        for buffer, state in zip(self._states, states, strict=True):
            buffer[rows, index] = state[:, 0]

    def close(self, slots: Sequence[int]) -> list[int]:
        """Return the lengths of the open patches of some slots, and empty them."""
        lengths = [self._lengths[slot] for slot in slots]
        for slot in slots:
            self._lengths[slot] = 0
        return lengths

    def patches(
        self, slots: Slots, lengths: Int[Tensor, " slots"]
    ) -> tuple[list[Float[Tensor, "slots bytes dim"]], Int[Tensor, "slots bytes"]]:
        """Return the states of patches of given lengths, padded, and their encoder ids."""
        longest = self.room if self._is_static else int(lengths.max())
        states = [select(buffer, slots)[:, :longest] for buffer in self._states]
        index = torch.arange(longest, device=lengths.device)
        return states, (index >= lengths[:, None]).long()

    def _grow(self, needed: int) -> None:
        """Make room for patches of ``needed`` bytes."""
        if self._states and needed > self.room:
            more = max(needed, 2 * self.room) - self.room
            self._states = [functional.pad(buffer, (0, 0, 0, more)) for buffer in self._states]

    def reset(self, slot: int) -> None:
        self._lengths[slot] = 0

    def snapshot(self, slot: int) -> list[Float[Tensor, "1 bytes dim"]]:
        length = self._lengths[slot]
        return [buffer[slot : slot + 1, :length].clone() for buffer in self._states]

    def rollback(self, slot: int, snapshot: list[Float[Tensor, "1 bytes dim"]]) -> None:
        self._lengths[slot] = 0
        if snapshot:
            self.extend(slot, snapshot)

    def copy(self, source: "OpenPatch", source_slot: int, slot: int) -> None:
        self.rollback(slot, source.snapshot(source_slot))


class LastLatent:
    """Keys and values of each slot's last complete patch, which its bytes read."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._readable: Readable = []
        self._is_there = [False] * num_slots

    def read(self, slots: Slots) -> Readable | None:
        """Return the keys and values of some slots; ``None`` for a slot without a patch."""
        if slots is None:
            return self._readable
        if not self._is_there[slots[0]]:
            return None
        return [tuple(select(x, slots) for x in layer) for layer in self._readable]

    def write(self, slots: Slots, readable: Readable) -> None:
        """Write the keys and values of one patch per slot, from ``LocalDecoder.read_latents``."""
        if not self._readable:
            self._readable = [
                tuple(x.new_zeros(self._num_slots, *x.shape[1:]) for x in layer)
                for layer in readable
            ]
        for layer, new_layer in zip(self._readable, readable, strict=True):
            for x, new in zip(layer, new_layer, strict=True):
                assign(x, slots, new)
        for slot in range(self._num_slots) if slots is None else slots:
            self._is_there[slot] = True

    def reset(self, slot: int) -> None:
        self._is_there[slot] = False

    def snapshot(self, slot: int) -> Readable | None:
        readable = self.read([slot])
        return readable and [tuple(x.clone() for x in layer) for layer in readable]

    def rollback(self, slot: int, snapshot: Readable | None) -> None:
        self._is_there[slot] = False
        if snapshot is not None:
            self.write([slot], snapshot)

    def copy(self, source: "LastLatent", source_slot: int, slot: int) -> None:
        self.rollback(slot, source.snapshot(source_slot))
