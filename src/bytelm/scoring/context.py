"""Scorers whose entropies depend on the last few ids alone."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.patching import row_positions
from bytelm.slots import Slots, SlotTensors, assign, select


class ContextScorer(nn.Module):
    """Base of scorers that look at no more than ``context`` ids before a byte.

    A subclass says how :meth:`score` follows from ids and positions; packed rows and documents that
    arrive piece by piece are taken care of here.
    """

    context: int
    """Number of ids before a byte that its entropy depends on."""

    def score(
        self, ids: Int[Tensor, "batch bytes"], positions: Int[Tensor, "batch bytes"]
    ) -> Float[Tensor, "batch bytes"]:
        """Return the entropy, in nats, of the prediction of the id after each.

        Args:
            ids: rows of bytes.
            positions: of the bytes in their documents: byte ``i`` may depend on ids
                ``i - min(context, positions[i])`` to ``i``, and on no other.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the scorer's tensors are."""
        tensors = [*self.parameters(), *self.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def document_starts(
        self, ids: Int[Tensor, "batch bytes"], documents: Int[Tensor, "batch bytes"]
    ) -> Int[Tensor, "batch bytes"]:
        """Return numbers that change wherever the scorer starts afresh."""
        return documents

    def entropies(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes"]:
        """Return the entropies of packed rows."""
        if documents is None:
            documents = torch.zeros_like(ids)
        return self.score(ids, row_positions(self.document_starts(ids, documents)))

    def new_state(self, num_slots: int = 1, strategy: Any = "auto") -> "ContextScorerState":
        """Return the state of ``num_slots`` empty documents."""
        return ContextScorerState(self, num_slots)


class ContextScorerState(SlotTensors):
    """A :class:`ContextScorer` at work: it remembers the last ids of each document."""

    def __init__(self, scorer: ContextScorer, num_slots: int) -> None:
        self._scorer = scorer
        recent = torch.full((scorer.context,), -1)
        super().__init__(num_slots, {"recent": recent}, scorer.device)

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Int[Tensor, " bytes"]) -> Float[Tensor, " bytes"]:
        """Return the entropies at the next bytes of one slot's document."""
        return self._advance([slot], ids[None])[0]

    @torch.inference_mode()
    def decode(self, ids: Int[Tensor, " slots"], slots: Slots = None) -> Float[Tensor, " slots"]:
        """Return the entropy at the next byte of each slot's document."""
        return self._advance(slots, ids[:, None])[:, 0]

    def _advance(
        self, slots: Slots, ids: Int[Tensor, "slots bytes"]
    ) -> Float[Tensor, "slots bytes"]:
        joined = torch.cat((select(self["recent"], slots), ids), 1)
        assign(self["recent"], slots, joined[:, ids.shape[1] :])
        # What precedes a document is -1: a document of its own.
        entropies = self._scorer.entropies(joined.clamp(min=0), (joined >= 0).long())
        return entropies[:, self._scorer.context :]
