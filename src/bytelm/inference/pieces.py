"""What a slot remembers of the pieces of a vocabulary (:mod:`bytelm.model.vocabulary`)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm.model.vocabulary import Vocabulary
from bytelm.slots import Slots, SlotTensors, assign, select


class PieceState(SlotTensors):
    """Where each slot's document is in the vocabulary, and what its last latent predicts.

    Args:
        vocabulary: the vocabulary.
        num_slots: number of slots.
    """

    def __init__(self, vocabulary: Vocabulary, num_slots: int) -> None:
        self._vocabulary = vocabulary
        initial = {
            "node": torch.tensor(0),
            # The node before the last byte: the piece of a patch that ends with it.
            "before": torch.tensor(0),
            "masses": torch.zeros(vocabulary.embedding.num_embeddings + 1, dtype=torch.double),
        }
        super().__init__(num_slots, initial, vocabulary.keys.device)

    def prefill(
        self, slot: int, ids: Int[Tensor, " ids"], next_boundary: Bool[Tensor, " ids"]
    ) -> tuple[Int[Tensor, "1 ids"], Int[Tensor, "1 patches"]]:
        """Return the node after each of a document's next ids, and those of closed patches."""
        initial = self["node"][slot : slot + 1]
        nodes = self._vocabulary.walk(ids[None], next_boundary[None], initial)
        before = torch.cat((initial[:, None], nodes[:, :-1]), 1)
        named = before[:, next_boundary]
        self["before"][slot], self["node"][slot] = before[0, -1], nodes[0, -1]
        return nodes, named

    def decode(
        self, ids: Int[Tensor, " slots"], ends: Bool[Tensor, " slots"], slots: Slots
    ) -> None:
        """Note the next id of each document, and whether a patch ends with it."""
        before = select(self["node"], slots).clone()
        assign(self["before"], slots, before)
        assign(self["node"], slots, self._vocabulary.step(before.masked_fill(ends, 0), ids))

    def read(
        self, vectors: Float[Tensor, "slots 1 dim"], slots: Slots
    ) -> Float[Tensor, "slots 1 dim"]:
        """Return the vectors of patches that close; see :meth:`.Vocabulary.read`."""
        return self._vocabulary.read(vectors, select(self["before"], slots)[:, None])

    def hold(self, latents: Float[Tensor, "slots 1 dim"], slots: Slots) -> None:
        """Keep what the last latent of each of some slots predicts."""
        assign(self["masses"], slots, self._vocabulary.masses(latents[:, 0]))

    def mix(
        self,
        logits: Float[Tensor, "slots outputs"],
        slots: Slots,
        nodes: Int[Tensor, " slots"] | None = None,
    ) -> Float[Tensor, "slots vocab"]:
        """Return log-probabilities of the next id of each document; see :meth:`.Vocabulary.mix`.

        Args:
            logits: the decoder's.
            slots: the slots.
            nodes: nodes that drafted bytes lead to; ``None`` for the documents' own.
        """
        nodes = select(self["node"], slots) if nodes is None else nodes
        rows = torch.arange(len(nodes), device=nodes.device)
        return self._vocabulary.mix(logits, select(self["masses"], slots), rows, nodes)
