"""A complete byte language model: scorer, patcher and BLT, from ids to logits."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.model.blt import BLT
from bytelm.model.scorers import Scorer
from bytelm.patching import Patcher, Patches, build_patches


class Segmentation(NamedTuple):
    """Entropies, where the rule needs them, and the patches they make."""

    entropies: Float[Tensor, "batch bytes"] | None
    patches: Patches


class PatchedModel(nn.Module):
    """A BLT that finds its own patches.

    Called like a :class:`~bytelm.model.transformer.Transformer`: ids in, logits of the next id out.
    """

    def __init__(self, blt: BLT, patcher: Patcher, scorer: Scorer | None) -> None:
        super().__init__()
        if patcher.needs_entropies and scorer is None:
            raise ValueError("an entropy rule needs a scorer")
        self.blt = blt
        self.patcher = patcher
        self.scorer = scorer

    def segment(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Segmentation:
        """Score the bytes, apply the rule, build the patches."""
        entropies = None
        if self.patcher.needs_entropies:
            assert self.scorer is not None
            with torch.no_grad():
                entropies = self.scorer.entropies(ids, documents)
        next_boundary = self.patcher.next_boundary(ids, entropies, documents)
        return Segmentation(entropies, build_patches(next_boundary, documents))

    def forward(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Logits, in fp32, of the id after each.

        Args:
            ids: packed rows.
            documents: document of each byte; ``None`` for one document a row.
        """
        return self.blt(ids, self.segment(ids, documents).patches)
