"""Decoding state of several documents, one per slot.

Everything a model must remember of its documents (key-value caches, hash context, the open patch, a
patching rule's memory) is a :class:`SlotState`: tensors whose first axis is slots, or several such
states together. Sessions, batches of requests, speculation and prefix reuse are built from four
operations on one slot.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Slots = Sequence[int] | None
"""Distinct slots; ``None`` for all of them, in order. A range has a step of 1."""


@runtime_checkable
class SlotState(Protocol):
    """State of each slot's document."""

    def reset(self, slot: int) -> None:
        """Start a new document in a slot."""
        ...

    def snapshot(self, slot: int) -> Any:
        """Return a snapshot of a slot, from which :meth:`rollback` restores it."""
        ...

    def rollback(self, slot: int, snapshot: Any) -> None:
        """Restore a slot from a snapshot that was taken of the same document."""
        ...

    def copy(self, source: Any, source_slot: int, slot: int) -> None:
        """Copy the document of a slot of this state, or of another one of the same kind."""
        ...


class SlotTensors:
    """Tensors of fixed size for each slot.

    Args:
        num_slots: number of slots.
        initial: value that every slot starts with, by name.
        device: device of the tensors.
    """

    def __init__(self, num_slots: int, initial: dict[str, Tensor], device: torch.device) -> None:
        self._initial = {name: value.to(device) for name, value in initial.items()}
        self._tensors = {
            name: value.expand(num_slots, *value.shape).clone()
            for name, value in self._initial.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """Set a slot's tensors to their initial values."""
        for name, value in self._initial.items():
            self._tensors[name][slot] = value

    @torch.inference_mode()
    def snapshot(self, slot: int) -> dict[str, Tensor]:
        """Return a copy of the slot's tensors."""
        return {name: tensor[slot].clone() for name, tensor in self._tensors.items()}

    @torch.inference_mode()
    def rollback(self, slot: int, snapshot: dict[str, Tensor]) -> None:
        """Restore the slot's tensors from a snapshot."""
        for name, tensor in self._tensors.items():
            tensor[slot] = snapshot[name]

    @torch.inference_mode()
    def copy(self, source: "SlotTensors", source_slot: int, slot: int) -> None:
        """Copy the tensors of another slot."""
        for name, tensor in self._tensors.items():
            tensor[slot] = source[name][source_slot]


class CompoundState:
    """Several states of the same slots."""

    def __init__(self, *parts: SlotState) -> None:
        self._parts = parts

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """Start a new document in every part."""
        for part in self._parts:
            part.reset(slot)

    @torch.inference_mode()
    def snapshot(self, slot: int) -> list[Any]:
        """Return a snapshot of every part."""
        return [part.snapshot(slot) for part in self._parts]

    @torch.inference_mode()
    def rollback(self, slot: int, snapshot: list[Any]) -> None:
        """Restore every part from its snapshot."""
        for part, value in zip(self._parts, snapshot, strict=True):
            part.rollback(slot, value)

    @torch.inference_mode()
    def copy(self, source: "CompoundState", source_slot: int, slot: int) -> None:
        """Copy the document of another slot, in every part."""
        for part, other in zip(self._parts, source._parts, strict=True):
            part.copy(other, source_slot, slot)


def select(tensor: Tensor, slots: Slots) -> Tensor:
    """Return the rows of a tensor at some slots: a view if they are a range, otherwise a copy."""
    if slots is None:
        return tensor
    if len(slots) == 1:
        return tensor[slots[0] : slots[0] + 1]
    if isinstance(slots, range):
        return tensor[slots.start : slots.stop]
    return tensor[list(slots)]


def assign(tensor: Tensor, slots: Slots, values: Tensor) -> None:
    """Write the rows of a tensor at some slots."""
    if slots is None:
        tensor.copy_(values)
    elif len(slots) == 1:
        tensor[slots[0]] = values[0]
    elif isinstance(slots, range):
        tensor[slots.start : slots.stop] = values
    else:
        tensor[list(slots)] = values


def as_range(slots: Slots, num_slots: int) -> Slots:
    """Return consecutive slots as a range, and all of them as ``None``: neither needs copies."""
    if slots is None or not len(slots):
        return slots
    first, count = slots[0], len(slots)
    consecutive = range(first, first + count)
    if list(slots) != list(consecutive):
        return list(slots)
    return None if count == num_slots and first == 0 else consecutive
