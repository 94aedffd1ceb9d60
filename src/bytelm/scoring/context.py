"""Scorers whose entropies depend only on the last few ids."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.patching import row_positions
from bytelm.slots import Slots, SlotTensors, assign, select


class ContextScorer(nn.Module):
    """Base class of scorers that read no more than ``context`` ids before a byte.

    A subclass implements :meth:`score`; this class handles packed rows, and documents that arrive
    in parts.
    """

    context: int
    """Number of preceding ids that an entropy depends on."""

    def score(
        self, ids: Int[Tensor, "batch bytes"], positions: Int[Tensor, "batch bytes"]
    ) -> Float[Tensor, "batch bytes"]:
        """Return the entropy, in nats, of the prediction of the id after each.

        Args:
            ids: rows of bytes.
            positions: position of each byte in its document. The entropy at byte ``i`` may depend
                only on ids ``i - min(context, positions[i])`` to ``i``.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the scorer's tensors."""
        tensors = [*self.parameters(), *self.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def document_starts(
        self, ids: Int[Tensor, "batch bytes"], documents: Int[Tensor, "batch bytes"]
    ) -> Int[Tensor, "batch bytes"]:
        """Return numbers that change wherever the scorer's context is reset."""
        return documents

    def entropies(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes"]:
        """Return the entropies, in nats, of packed rows."""
        if documents is None:
            documents = torch.zeros_like(ids)
        return self.score(ids, row_positions(self.document_starts(ids, documents)))

    def new_state(
        self, num_slots: int = 1, strategy: Any = "auto", memory: Any = None
    ) -> "ContextScorerState":
        """Return a state with ``num_slots`` empty documents."""
        return ContextScorerState(self, num_slots)


class ContextScorerState(SlotTensors):
    """State of a :class:`ContextScorer`: the last ids of each document."""

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
        # Ids before a document's start are -1: give them a document of their own.
        entropies = self._scorer.entropies(joined.clamp(min=0), (joined >= 0).long())
        return entropies[:, self._scorer.context :]
