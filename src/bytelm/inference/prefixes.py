"""Beginnings of documents that are kept, so that the next prompt with one need not pay for it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bytelm.inference.continuation import Prediction
from bytelm.inference.states import DecodingState

MIN_SHARED = 32
"""Ids from which a common beginning is worth the copies."""


class Kept(NamedTuple):
    """A document whose state is kept."""

    ids: Int[np.ndarray, " ids"]
    prediction: Prediction | None
    """Prediction of the next id, if it is known."""


class Prefixes:
    """Slots of a state in which prompts are read, and kept until others need their slots.

    A state cannot be cut back to the middle of its document, because rings and open patches are
    overwritten. So documents are kept where they end, and where another one was seen to part.

    Args:
        state: the state whose slots are used.
    """

    def __init__(self, state: DecodingState) -> None:
        self.state = state
        self._free = list(range(state.num_slots))
        # From the least to the most recently used.
        self._kept: dict[int, Kept] = {}

    def take(self) -> int | None:
        """Return an empty slot, that of the least recently used document if none is free."""
        if not self._free and not self.drop():
            return None
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Free a slot and its memory."""
        self.state.reset(slot)
        self._free.append(slot)

    def drop(self) -> bool:
        """Drop the least recently used document, if there is one, and return whether there was."""
        slot = next(iter(self._kept), None)
        if slot is not None:
            del self._kept[slot]
            self.give_back(slot)
        return slot is not None

    def keep(
        self, slot: int, ids: Int[np.ndarray, " ids"], prediction: Prediction | None = None
    ) -> None:
        """Keep a document that is in a slot, or free the slot if that is not worth it."""
        if len(ids) < MIN_SHARED or any(np.array_equal(ids, kept.ids) for kept in self.documents):
            self.give_back(slot)
        else:
            self._kept[slot] = Kept(ids, prediction)

    def keep_copy(
        self, source: DecodingState, source_slot: int, ids: Int[np.ndarray, " ids"]
    ) -> None:
        """Keep a copy of a document of a state, if that is worth it and there is a slot."""
        if len(ids) >= MIN_SHARED and (slot := self.take()) is not None:
            self.state.copy(source, source_slot, slot)
            self.keep(slot, ids)

    @property
    def documents(self) -> Iterator[Kept]:
        """The documents that are kept."""
        return iter(list(self._kept.values()))

    def find(self, ids: Int[np.ndarray, " ids"]) -> tuple[int, Kept] | None:
        """Return the longest kept document that a document begins with, and its slot.

        A document that is all of ``ids`` is of use only if its prediction is known.
        """
        best = None
        for slot, kept in self._kept.items():
            needed = len(kept.ids) + (kept.prediction is None)
            is_longer = best is None or len(kept.ids) > len(best[1].ids)
            if needed <= len(ids) and is_longer and shared_length(ids, kept.ids) == len(kept.ids):
                best = slot, kept
        if best is not None:
            self._kept[best[0]] = self._kept.pop(best[0])
        return best

    def begin(self, ids: Int[np.ndarray, " ids"]) -> tuple[int, int, Prediction | None] | None:
        """Begin a document with the longest kept beginning.

        Returns:
            The document's slot, how many of ``ids`` it already holds, and the prediction if it
            holds them all; ``None`` if no slot is to be had.
        """
        found = self.find(ids)
        slot = self.take()
        if slot is None or found is None:
            return None if slot is None else (slot, 0, None)
        source, kept = found
        if source != slot:
            self.state.copy(self.state, source, slot)
            return slot, len(kept.ids), kept.prediction if len(kept.ids) == len(ids) else None
        return slot, 0, None


def shared_length(a: Int[np.ndarray, " a"], b: Int[np.ndarray, " b"]) -> int:
    """Return the number of ids that two documents begin with in common."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length
