"""The protocol of scorers, which compute the entropy of the next byte, in nats, at every byte.

A scorer scores packed rows (:meth:`Scorer.entropies`) or documents as they arrive
(:meth:`Scorer.new_state`), with the same result. The time to score a document is linear in its
length, and the memory is independent of it.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from bytelm.slots import Slots, SlotState


@runtime_checkable
class ScorerState(SlotState, Protocol):
    """State of a scorer over slots."""

    def prefill(self, slot: int, ids: Int[Tensor, " bytes"]) -> Float[Tensor, " bytes"]:
        """Return the entropies at the next bytes of one slot's document."""
        ...

    def decode(self, ids: Int[Tensor, " slots"], slots: Slots = None) -> Float[Tensor, " slots"]:
        """Return the entropy at the next byte of each slot's document."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Model that computes next-byte entropies."""

    def entropies(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes"]:
        """Return the entropy, in nats, of the prediction of the id after each, for packed rows."""
        ...

    def new_state(
        self, num_slots: int = 1, strategy: Any = "auto", memory: Any = None
    ) -> ScorerState:
        """Return a state with ``num_slots`` empty documents.

        Args:
            num_slots: number of documents to score at once.
            strategy: how single bytes are run, for scorers that are networks; see
                :data:`bytelm.inference.Strategy`.
            memory: a :class:`bytelm.inference.PagedMemory` for caches without a window; passed
                only if there is one.
        """
        ...


def entropy(logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """Return the entropy ``-sum p ln p`` of ``p = softmax(logits)``, in nats, in fp32."""
    log_probabilities = logits.float().log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)
