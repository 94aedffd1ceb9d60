"""Sessions, which decode one document."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.inference.graphs import Strategy
from bytelm.inference.pages import PagedMemory
from bytelm.inference.states import DecodingState
from bytelm.units import Units


@runtime_checkable
class Decodable(Protocol):
    """Language model that can decode documents."""

    units: Units

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    def new_state(
        self,
        num_slots: int = 1,
        strategy: Strategy = "auto",
        memory: PagedMemory | None = None,
    ) -> DecodingState:
        """Return a decoding state with ``num_slots`` empty documents."""
        ...


class Session:
    """Incremental decoding of one document: a decoding state with one slot.

    Args:
        model: language model, whose weights must not be moved while the session is in use.
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
        """Return a snapshot, from which :meth:`rollback` restores this point of the document.

        After a rollback, snapshots that were taken later are invalid.
        """
        return self._is_empty, self._state.snapshot(0)

    def rollback(self, snapshot: Any) -> None:
        """Restore a snapshot, as if no id had been fed since."""
        self._is_empty, state = snapshot
        self._state.rollback(0, state)

    def fork(self) -> "Session":
        """Return an independent session at the same point of the document."""
        other = Session(self._model, self._strategy)
        other._state.copy(self._state, 0, 0)
        other._is_empty = self._is_empty
        return other
