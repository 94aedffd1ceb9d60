"""State over slots: what a model keeps of several documents that it reads at once.

A slot holds one document. Everything a model must remember of its documents (key-value caches,
hash context, the open patch, a patching rule's memory) is a :class:`SlotState`: tensors whose first
axis is slots, or several such states together. Sessions, batches of requests, speculation and
prefix reuse are all uses of four operations on one slot.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Slots = Sequence[int] | None
"""Some slots, each named once; ``None`` for all in order."""


@runtime_checkable
class SlotState(Protocol):
    """What is remembered of each slot's document."""

    def reset(self, slot: int) -> None:
        """Start a new document."""
        ...

    def snapshot(self, slot: int) -> Any:
        """Return what it takes to come back to this point of the document."""
        ...

    def rollback(self, slot: int, snapshot: Any) -> None:
        """Come back to a snapshot that was taken of the same document."""
        ...

    def copy(self, source: Any, source_slot: int, slot: int) -> None:
        """Take over the document of a slot of another state of the same kind, or of this one."""
        ...


class SlotTensors:
    """Tensors of fixed size for each slot.

    Args:
        num_slots: documents at once.
        initial: by name, the value that every slot starts with.
        device: where the tensors are.
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
        """Start a new document."""
        for name, value in self._initial.items():
            self._tensors[name][slot] = value

    @torch.inference_mode()
    def snapshot(self, slot: int) -> dict[str, Tensor]:
        """Return a copy of the slot's tensors."""
        return {name: tensor[slot].clone() for name, tensor in self._tensors.items()}

    @torch.inference_mode()
    def rollback(self, slot: int, snapshot: dict[str, Tensor]) -> None:
        """Put a copy back."""
        for name, tensor in self._tensors.items():
            tensor[slot] = snapshot[name]

    @torch.inference_mode()
    def copy(self, source: "SlotTensors", source_slot: int, slot: int) -> None:
        """Take over another slot's tensors."""
        for name, tensor in self._tensors.items():
            tensor[slot] = source[name][source_slot]


class CompoundState:
    """Several states of the same slots."""

    def __init__(self, *parts: SlotState) -> None:
        self._parts = parts

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """Start a new document."""
        for part in self._parts:
            part.reset(slot)

    @torch.inference_mode()
    def snapshot(self, slot: int) -> list[Any]:
        """Return a snapshot of every part."""
        return [part.snapshot(slot) for part in self._parts]

    @torch.inference_mode()
    def rollback(self, slot: int, snapshot: list[Any]) -> None:
        """Come back to a snapshot of every part."""
        for part, value in zip(self._parts, snapshot, strict=True):
            part.rollback(slot, value)

    @torch.inference_mode()
    def copy(self, source: "CompoundState", source_slot: int, slot: int) -> None:
        """Take over another slot's document."""
        for part, other in zip(self._parts, source._parts, strict=True):
            part.copy(other, source_slot, slot)


def select(tensor: Tensor, slots: Slots) -> Tensor:
    """Return the slots of a tensor: a view where it can be one, else a copy."""
    if slots is None:
        return tensor
    if len(slots) == 1:
        return tensor[slots[0] : slots[0] + 1]
    return tensor[list(slots)]


def assign(tensor: Tensor, slots: Slots, values: Tensor) -> None:
    """Write to the slots of a tensor."""
    if slots is None:
        tensor.copy_(values)
    elif len(slots) == 1:
        tensor[slots[0]] = values[0]
    else:
        tensor[list(slots)] = values
