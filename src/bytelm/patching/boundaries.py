"""The :class:`Patches` of a batch: the alignment of bytes and patches that all stages use.

A *boundary* is a position that starts a patch. Byte ``i`` carries ``next_boundary[i]``: whether
byte ``i + 1`` is one. That single bit, a function of bytes ``<= i``, determines the alignment::

    encoder_ids[i] = number of patches begun at or before byte i, less one
    decoder_ids[i] = encoder_ids[i] if next_boundary[i] else encoder_ids[i] - 1

The second line is "the last patch that is complete at byte i": the last byte of patch ``j`` reads
latent ``j``, every other byte of patch ``j`` reads latent ``j - 1``. The first byte of a document
(its BOS) is always a patch of its own, so a latent to read always exists. (Paper section 3;
`docs/concepts.md` draws it.)
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PADDING = -1
"""Document number of padding bytes and of unused patches."""


class Patches(NamedTuple):
    """Documents and patches of the bytes of packed rows.

    Rows hold documents (or parts treated as documents) one after another, then padding.
    """

    documents: Int[Tensor, "batch bytes"]
    """Document of each byte, increasing along the row; ``PADDING`` on padding."""
    positions: Int[Tensor, "batch bytes"]
    """Index of each byte in its document."""
    encoder_ids: Int[Tensor, "batch bytes"]
    """Patch that holds the byte; ``num_patches`` on padding."""
    decoder_ids: Int[Tensor, "batch bytes"]
    """Last patch that is complete at the byte: the latent its prediction reads; 0 on padding."""
    lengths: Int[Tensor, "batch patches"]
    """Bytes in each patch; 0 for unused ones."""
    patch_documents: Int[Tensor, "batch patches"]
    """Document of each patch; ``PADDING`` for unused ones."""
    patch_positions: Int[Tensor, "batch patches"]
    """Index of each patch in its document."""

    @property
    def num_patches(self) -> int:
        """Number of patches that a row has room for."""
        return self.lengths.shape[1]

    @property
    def ends(self) -> Bool[Tensor, "batch bytes"]:
        """Whether a patch is complete with each byte; not on padding."""
        return self.decoder_ids == self.encoder_ids

    @property
    def counts(self) -> Int[Tensor, " batch"]:
        """Number of patches in use in each row."""
        return (self.lengths > 0).sum(1)


def row_positions(
    documents: Int[Tensor, "batch length"],
) -> Int[Tensor, "batch length"]:
    """Return the index of each element within its run of equal ``documents``."""
    index = torch.arange(documents.shape[1], device=documents.device)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(is_first, index, 0).cummax(1).values


def build_patches(
    next_boundary: Bool[Tensor, "batch bytes"],
    documents: Int[Tensor, "batch bytes"] | None = None,
    num_patches: int | None = None,
) -> Patches:
    """Return the :class:`Patches` that follow from boundaries, without a loop over patches.

    Args:
        next_boundary: whether the byte after each byte starts a patch. The value at the first byte
            of a document is taken as true; the value at the last byte does not affect the next
            document.
        documents: document of each byte, ``PADDING`` on padding; ``None`` for one document per row.
        num_patches: patches to make room for. It must be at least as many as any row has, which is
            not checked, since that would synchronise with the device. ``None`` counts them, which
            does synchronise.
    """
    if documents is None:
        documents = torch.zeros_like(next_boundary, dtype=torch.long)
    positions = row_positions(documents)
    is_padding = documents == PADDING
    next_boundary = next_boundary | (positions == 0)

    starts = torch.ones_like(next_boundary)
    starts[:, 1:] = next_boundary[:, :-1] | (positions[:, 1:] == 0)
    starts = starts & ~is_padding
    running = starts.cumsum(1)
    if num_patches is None:
        num_patches = int(running[:, -1].max())
    encoder_ids = torch.where(is_padding, num_patches, running - 1)
    decoder_ids = torch.where(next_boundary, running - 1, running - 2).masked_fill(is_padding, 0)

    shape = (next_boundary.shape[0], num_patches + 1)
    lengths = encoder_ids.new_zeros(shape).scatter_add(1, encoder_ids, torch.ones_like(encoder_ids))
    patch_documents = encoder_ids.new_full(shape, PADDING)
    patch_documents = patch_documents.scatter_reduce(1, encoder_ids, documents, "amax")
    patch_documents = patch_documents[:, :-1]
    return Patches(
        documents=documents,
        positions=positions,
        encoder_ids=encoder_ids,
        decoder_ids=decoder_ids,
        lengths=lengths[:, :-1],
        patch_documents=patch_documents,
        patch_positions=row_positions(patch_documents),
    )
