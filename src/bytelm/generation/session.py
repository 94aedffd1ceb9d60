"""Incremental sessions: feed a document piece by piece, get the logits of one full forward.

A session owns every cache a model needs to go on: ring buffers for the windowed layers, the
growing cache of the global transformer, the n-gram context, the bytes of the patch still open and
the latent of the last complete one. The global transformer runs once per patch, when it closes.
Feeding a prompt in any pieces gives the logits of :meth:`forward` of the whole, to rounding. (Were
an entropy within rounding of the threshold, a patch could begin elsewhere; calibration puts the
threshold into a gap, and a table's entropies are the same bits in any pieces.)
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.model.attention import StackCache
from bytelm.model.blt import BLT, Readable
from bytelm.model.graphs import (
    DecoderGraph,
    EncoderGraph,
    PatchGraph,
    can_capture,
)
from bytelm.model.patched import PatchedModel
from bytelm.model.step import DecoderStep, EncoderStep, PatchStep, can_step
from bytelm.model.stream import TransformerStream
from bytelm.model.transformer import Transformer


@runtime_checkable
class Session(Protocol):
    """A model at work on one document."""

    def feed(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, "bytes vocab"]:
        """Logits of the id after each of the document's next ``ids``."""
        ...


def start_session(model: PatchedModel | Transformer) -> Session:
    """A session for either kind of model, whose weights must stay where they are while it lives."""
    return PatchedSession(model) if isinstance(model, PatchedModel) else TransformerStream(model)


class _Caches(NamedTuple):
    encoder: StackCache
    global_model: StackCache
    decoder: StackCache


class _Steps(NamedTuple):
    """What takes a single byte, or a single patch."""

    encoder: EncoderStep | EncoderGraph
    patch: PatchStep | PatchGraph
    decoder: DecoderStep | DecoderGraph


def _steps(blt: BLT, caches: _Caches) -> _Steps | None:
    """Steps for the model's device and precision, where they are written."""
    if can_step(blt):
        return _Steps(
            EncoderStep(blt.encoder, caches.encoder),
            PatchStep(blt, caches.global_model),
            DecoderStep(blt.decoder, caches.decoder),
        )
    if can_capture(blt):
        return _Steps(
            EncoderGraph(blt.encoder, caches.encoder),
            PatchGraph(blt, caches.global_model),
            DecoderGraph(blt.decoder, caches.decoder),
        )
    return None


class PatchedSession:
    """A BLT with its scorer and patcher at work on one document."""

    def __init__(self, model: PatchedModel) -> None:
        self._blt = model.blt
        needs_entropies = model.patcher.needs_entropies
        self._scorer = model.scorer.stream() if model.scorer and needs_entropies else None
        self._patcher = model.patcher.stream()
        modules = (model.blt.encoder, model.blt.global_model, model.blt.decoder)
        self._caches = _Caches(*(module.spec.cache() for module in modules))
        self._embedding = model.blt.encoder.embedding.stream()
        # For each state that patches read, the pieces of it that belong to the open patch.
        num_read = max(len(model.blt.encoder.cross_attention), 1)
        self._open_states: list[list[Tensor]] = [[] for _ in range(num_read)]
        self._last: Readable | None = None
        self._step = _steps(model.blt, self._caches)

    @torch.inference_mode()
    def feed(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, "bytes vocab"]:
        """Logits of the id after each of the document's next ``ids``."""
        if not len(ids):
            return ids.new_empty(0, codec.VOCAB_SIZE, dtype=torch.float32)
        entropies = self._scorer.feed(ids) if self._scorer else None
        # The rule is applied where the answer is read.
        on_host = None if entropies is None else entropies.cpu()
        next_boundary = self._patcher.feed(ids.cpu(), on_host)
        # The first byte, which is a patch, gives the caches the shapes that steps rely on.
        if len(ids) == 1 and self._step and self._last:
            return self._feed_one(self._step, int(ids), bool(next_boundary))
        context = self._caches.encoder.extend(len(ids), ids.device)
        states = self._blt.encoder.byte_states(self._embedding.feed(ids), context)
        readable, decoder_ids = self._read(states, next_boundary.to(ids.device))
        context = self._caches.decoder.extend(len(ids), ids.device)
        return self._blt.decoder(states[-1], readable, decoder_ids[None], context)[0]

    def _feed_one(self, step: _Steps, byte_id: int, is_last: bool) -> Float[Tensor, "1 vocab"]:
        """The rest of :meth:`feed` for a single byte, the last of its patch or not."""
        states = step.encoder(self._embedding.take(byte_id))
        for pieces, state in zip(self._open_states, states, strict=True):
            pieces.append(state)
        if is_last:
            self._last = step.patch([torch.cat(pieces, 1) for pieces in self._open_states])
            self._open_states = [[] for _ in states]
            step.decoder.read(self._last)
        return step.decoder(states[-1]).clone()

    def _read(
        self, states: list[Float[Tensor, "1 bytes dim"]], next_boundary: Bool[Tensor, " bytes"]
    ) -> tuple[Readable, Int[Tensor, " bytes"]]:
        """What the new bytes may read, and which of it each reads.

        A byte reads the last patch complete at it: one closed here, or the last one before.
        """
        closed = next_boundary.cumsum(0)
        new = self._run_global(self._close_patches(states, next_boundary, closed))
        if new is None:
            assert self._last is not None
            return self._last, closed
        if self._last is None:
            readable, decoder_ids = new, closed - 1
        else:
            pairs = zip(self._last, new, strict=True)
            readable = [tuple(torch.cat(xs, 1) for xs in zip(*pair, strict=True)) for pair in pairs]
            decoder_ids = closed
        self._last = [tuple(x[:, -1:] for x in layer) for layer in new]
        if self._step:
            self._step.decoder.read(self._last)
        return readable, decoder_ids

    def _close_patches(
        self,
        states: list[Float[Tensor, "1 bytes dim"]],
        next_boundary: Bool[Tensor, " bytes"],
        closed: Int[Tensor, " bytes"],
    ) -> Float[Tensor, "1 patches global_dim"] | None:
        """Vectors of the patches that end among the new bytes; the rest stays open."""
        num_open = sum(piece.shape[1] for piece in self._open_states[0])
        for pieces, state in zip(self._open_states, states, strict=True):
            pieces.append(state)
        num_closed = int(closed[-1])
        if not num_closed:
            return None
        joined = [torch.cat(pieces, 1) for pieces in self._open_states]
        closed_before = closed - next_boundary.long()
        encoder_ids = torch.cat((closed_before.new_zeros(num_open), closed_before))
        rest = int((closed_before < num_closed).sum()) + num_open
        self._open_states = [[x[:, rest:]] for x in joined]
        return self._blt.encoder.patch_vectors(joined, encoder_ids[None], num_closed)

    def _run_global(self, vectors: Float[Tensor, "1 patches global_dim"] | None) -> Readable | None:
        """What can be read of newly closed patches."""
        if vectors is None:
            return None
        context = self._caches.global_model.extend(vectors.shape[1], vectors.device)
        return self._blt.decoder.read_latents(self._blt.global_model(vectors, context))
