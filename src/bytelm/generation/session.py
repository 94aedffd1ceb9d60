"""Incremental sessions: feed a document piece by piece, get the logits of one full forward.

A session owns every cache a model needs to go on: ring buffers for the windowed layers, the
growing cache of the global transformer, the n-gram context, the bytes of the patch still open and
the latent of the last complete one. The global transformer runs once per patch, when it closes.
Feeding a prompt in any pieces gives the logits of :meth:`forward` of the whole, to rounding. (Were
an entropy within rounding of the threshold, a patch could begin elsewhere; calibration puts the
threshold into a gap, and a table's entropies are the same bits in any pieces.)
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.model.patched import PatchedModel
from bytelm.model.transformer import Transformer


@runtime_checkable
class Session(Protocol):
    """A model at work on one document."""

    def feed(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, "bytes vocab"]:
        """Logits of the id after each of the document's next ``ids``."""
        ...


def start_session(model: PatchedModel | Transformer) -> Session:
    """A session for either kind of model."""
    return PatchedSession(model) if isinstance(model, PatchedModel) else TransformerSession(model)


def _no_logits(ids: Int[Tensor, " bytes"]) -> Float[Tensor, "0 vocab"]:
    return ids.new_empty(0, codec.VOCAB_SIZE, dtype=torch.float32)


class TransformerSession:
    """A plain transformer at work on one document."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._cache = model.spec.cache()

    @torch.inference_mode()
    def feed(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, "bytes vocab"]:
        """Logits of the id after each of the document's next ``ids``."""
        if not len(ids):
            return _no_logits(ids)
        return self._model.run(ids[None], self._cache.extend(len(ids), ids.device))[0]


class PatchedSession:
    """A BLT with its scorer and patcher at work on one document."""

    def __init__(self, model: PatchedModel) -> None:
        self._blt = model.blt
        needs_entropies = model.patcher.needs_entropies
        self._scorer = model.scorer.stream() if model.scorer and needs_entropies else None
        self._patcher = model.patcher.stream()
        self._encoder_cache = model.blt.encoder.spec.cache()
        self._global_cache = model.blt.global_model.spec.cache()
        self._decoder_cache = model.blt.decoder.spec.cache()
        self._recent_ids: Int[Tensor, " context"] | None = None
        # For each state that patches read, the pieces of it that belong to the open patch.
        self._open_states: list[list[Tensor]] = []
        self._last_slots: Float[Tensor, "1 1 slots dim"] | None = None

    @torch.inference_mode()
    def feed(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, "bytes vocab"]:
        """Logits of the id after each of the document's next ``ids``."""
        if not len(ids):
            return _no_logits(ids)
        entropies = self._scorer.feed(ids) if self._scorer else None
        next_boundary = self._patcher.feed(ids, entropies)

        embeddings = self._embed(ids, self._encoder_cache.position)
        context = self._encoder_cache.extend(len(ids), ids.device)
        states = self._blt.encoder.byte_states(embeddings, context)
        vectors = self._close_patches(states, next_boundary)
        slots = self._run_global(vectors)

        # A byte reads the last patch complete at it: one closed here, or the last one before.
        num_closed = next_boundary.cumsum(0)
        if self._last_slots is None:
            decoder_ids = num_closed - 1
        else:
            slots = torch.cat((self._last_slots, slots), 1)
            decoder_ids = num_closed
        context = self._decoder_cache.extend(len(ids), ids.device)
        logits = self._blt.decoder(states[-1], slots, decoder_ids[None], context)[0]
        self._last_slots = slots[:, -1:]
        return logits

    def _embed(self, ids: Int[Tensor, " bytes"], position: int) -> Float[Tensor, "1 bytes dim"]:
        """Embeddings of new ids from ``position`` on; their n-grams reach back into older ids."""
        embedding = self._blt.encoder.embedding
        recent = ids[:0] if self._recent_ids is None else self._recent_ids
        joined = torch.cat((recent, ids))
        first = position - len(recent)
        positions = torch.arange(first, first + len(joined), device=ids.device)
        self._recent_ids = joined[len(joined) - min(embedding.context, len(joined)) :]
        return embedding(joined[None], positions[None])[:, len(recent) :]

    def _close_patches(
        self,
        states: list[Float[Tensor, "1 bytes dim"]],
        next_boundary: Bool[Tensor, " bytes"],
    ) -> Float[Tensor, "1 patches global_dim"]:
        """Vectors of the patches that end among the new bytes; the rest stays open."""
        if not self._open_states:
            self._open_states = [[] for _ in states]
        num_open = sum(piece.shape[1] for piece in self._open_states[0])
        for pieces, state in zip(self._open_states, states, strict=True):
            pieces.append(state)
        num_closed = int(next_boundary.sum())
        if not num_closed:
            global_dim = self._blt.decoder.latent_projection.in_features
            return states[0].new_zeros(1, 0, global_dim)

        joined = [torch.cat(pieces, 1) for pieces in self._open_states]
        closed_before = next_boundary.cumsum(0) - next_boundary.long()
        encoder_ids = torch.cat((closed_before.new_zeros(num_open), closed_before))
        still_open = int((closed_before == num_closed).sum())
        self._open_states = [[x[:, x.shape[1] - still_open :]] for x in joined]
        return self._blt.encoder.patch_vectors(joined, encoder_ids[None], num_closed)

    def _run_global(
        self, vectors: Float[Tensor, "1 patches global_dim"]
    ) -> Float[Tensor, "1 patches slots dim"]:
        """Slots of the latents of newly closed patches."""
        context = self._global_cache.extend(vectors.shape[1], vectors.device)
        latents = self._blt.global_model(vectors, context) if vectors.shape[1] else vectors
        return self._blt.decoder.latent_slots(latents)
