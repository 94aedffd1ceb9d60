"""Sessions: one document, fed piece by piece."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.inference.graphs import Strategy
from bytelm.inference.states import DecodingState
from bytelm.units import Units


@runtime_checkable
class Decodable(Protocol):
    """A language model that can be put to work on documents."""

    units: Units

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    def new_state(self, num_slots: int = 1, strategy: Strategy = "auto") -> DecodingState:
        """Return the state of ``num_slots`` empty documents."""
        ...


class Session:
    """A language model at work on one document: a state with one slot.

    Args:
        model: its weights must stay where they are while the session lives.
        strategy: how single ids are run; see :data:`bytelm.inference.Strategy`.
    """

    def __init__(self, model: Decodable, strategy: Strategy = "auto") -> None:
        self._model = model
        self._strategy: Strategy = strategy
        self._state = model.new_state(1, strategy)
        self._is_empty = True

    def feed(self, ids: Int[Tensor, " ids"]) -> Float[Tensor, "ids vocab"]:
        """Return the logits of the id after each of the document's next ``ids``."""
        if len(ids) == 1 and not self._is_empty:
            return self._state.decode(ids)
        logits = self._state.prefill(0, ids)
        self._is_empty = self._is_empty and not len(ids)
        return logits

    def snapshot(self) -> Any:
        """Return what it takes to come back to this point of the document.

        Snapshots are of one line of the document: after :meth:`rollback` those that were taken
        later are void.
        """
        return self._is_empty, self._state.snapshot(0)

    def rollback(self, snapshot: Any) -> None:
        """Come back to a snapshot, as if nothing had been fed since."""
        self._is_empty, state = snapshot
        self._state.rollback(0, state)

    def fork(self) -> "Session":
        """Return another session at this point of the document; the two go separate ways."""
        other = Session(self._model, self._strategy)
        other._state.copy(self._state, 0, 0)
        other._is_empty = self._is_empty
        return other
