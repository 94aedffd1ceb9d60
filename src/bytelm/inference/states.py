"""Decoding states of networks over slots: caches, hash context and open patches.

A state holds what a network must remember of each slot's document. :meth:`prefill` takes any number
of ids of one slot, :meth:`decode` one id of each of several. Both return the logits of a full
forward pass over the whole document, up to rounding. (If an entropy were within rounding of the
threshold, a patch could begin elsewhere; calibration therefore puts the threshold into a gap, and
the entropies of an n-gram scorer do not depend on how a document is split.)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm import codec
from bytelm.inference.cache import KVCache
from bytelm.inference.checks import NOT_BEGUN, check_decode, check_prefill
from bytelm.inference.graphs import Capture, Graphs, Strategy, choose_capture
from bytelm.inference.open_patch import LastLatent, OpenPatch
from bytelm.inference.pages import PagedMemory, check_free
from bytelm.inference.pieces import PieceState
from bytelm.model.blt import BLT, Readable
from bytelm.model.embedding import HashEmbedding
from bytelm.model.transformer import Transformer
from bytelm.patching import Patcher, Scorer, StatefulRule
from bytelm.slots import CompoundState, Slots, SlotState, SlotTensors, as_range, assign, select


@runtime_checkable
class DecodingState(SlotState, Protocol):
    """Decoding state of a language model over slots."""

    num_slots: int

    def prefill(self, slot: int, ids: Int[Tensor, " ids"]) -> Float[Tensor, "ids vocab"]:
        """Return the logits of the id after each of the next ``ids`` of one slot's document."""
        ...

    def decode(
        self, ids: Int[Tensor, " slots"], slots: Slots = None
    ) -> Float[Tensor, "slots vocab"]:
        """Return the logits of the id after the next one of each slot's document.

        The first id of a document must be given to :meth:`prefill`.
        """
        ...


class Observed(NamedTuple):
    """What a patched state saw of the next byte of each of some slots."""

    entropies: Float[Tensor, " slots"] | None
    """The scorer's entropies, in nats, if the patching rule needs them."""
    begins_patch: Bool[Tensor, " slots"] | None
    """Whether the byte begins a patch; ``None`` before the first call."""


class Reading(NamedTuple):
    """What a patched state computed of new bytes of one slot."""

    states: list[Float[Tensor, "1 bytes dim"]]
    """The encoder's, after each layer that patches read."""
    entropies: Float[Tensor, " bytes"] | None
    next_boundary: Bool[Tensor, " bytes"]
    """Whether the byte after each begins a patch."""
    latents: Readable | None
    """Keys and values of the patches that closed, if any did."""
    logits: Float[Tensor, "bytes vocab"]


@dataclass
class Passes:
    """How often each part of a patched state was run, whatever the number of rows in a pass."""

    scorer: int = 0
    encoder: int = 0
    global_model: int = 0
    decoder: int = 0

    def bytes_moved(self, blt: BLT) -> int:
        """Return the bytes of weights that were read: all of a part in each of its passes.

        As in Fast BLT, equation 8, the scorer and embeddings are not counted; caches are not
        either.
        """
        parts = (self.encoder, blt.encoder), (self.global_model, blt.global_model)
        counted = (*parts, (self.decoder, blt.decoder))
        read = sum(count * _weight_bytes(part) for count, part in counted)
        if blt.vocabulary is None:
            return read
        head = blt.vocabulary.predicting
        return read + self.global_model * head.numel() * head.element_size()


class EmbeddingState(SlotTensors):
    """State of a :class:`HashEmbedding`: the last ids of each document, for its n-grams."""

    def __init__(self, embedding: HashEmbedding, num_slots: int) -> None:
        self._embedding = embedding
        recent = torch.full((embedding.context,), codec.BOE)
        super().__init__(num_slots, {"recent": recent}, embedding.ids.weight.device)

    def prefill(self, slot: int, ids: Int[Tensor, " ids"]) -> Float[Tensor, "1 ids dim"]:
        """Return the embeddings of a document's next ids."""
        joined = torch.cat((self["recent"][slot], ids))
        self["recent"][slot] = joined[len(ids) :]
        # Ids before the document are BOE, so positions may begin before it.
        positions = torch.arange(len(joined), device=ids.device)
        return self._embedding(joined[None], positions[None])[:, self._embedding.context :]

    def advance(self, slot: int, ids: Int[Tensor, " ids"]) -> None:
        """Note a document's next ids, without their embeddings."""
        self["recent"][slot] = torch.cat((self["recent"][slot], ids))[len(ids) :]

    def decode(self, ids: Int[Tensor, " slots"], slots: Slots) -> Float[Tensor, "slots 1 dim"]:
        """Return the embedding of the next id of each document."""
        if not self._embedding.context:
            return self._embedding.last(ids[:, None])
        joined = torch.cat((select(self["recent"], slots), ids[:, None]), 1)
        assign(self["recent"], slots, joined[:, 1:])
        return self._embedding.last(joined)


class TransformerState(CompoundState):
    """Decoding state of a plain transformer.

    Args:
        model: transformer, whose weights must not be moved while the state is in use.
        num_slots: number of slots.
        strategy: how single ids are run.
        memory: bounded memory for a cache without a window, whose steps are not captured.
    """

    def __init__(
        self,
        model: Transformer,
        num_slots: int = 1,
        strategy: Strategy = "auto",
        memory: PagedMemory | None = None,
    ) -> None:
        self.num_slots = num_slots
        self._model = model
        device = _device(model)
        capture = choose_capture(strategy, device)
        if memory is not None and model.spec.window is None:
            capture = None
        self._embedding = EmbeddingState(model.embedding, num_slots)
        self._cache = _new_cache(model, num_slots, device, capture, memory)
        super().__init__(self._embedding, self._cache)
        self._graphs = Graphs(capture, self)

    @property
    def rooms(self) -> tuple[int, ...]:
        """Sizes of the buffers that steps use."""
        return (self._cache.room,)

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Int[Tensor, " ids"]) -> Float[Tensor, "ids vocab"]:
        """Return the logits of the id after each of the next ``ids`` of one slot's document."""
        vocab_size = self._model.output.out_features
        check_prefill(ids, slot, self.num_slots, vocab_size, self._cache.positions.device)
        if not len(ids):
            return ids.new_empty(0, vocab_size, dtype=torch.float32)
        context = self._cache.prefill(slot, len(ids))
        return self._model.run(self._embedding.prefill(slot, ids), context)[0]

    @torch.inference_mode()
    def decode(
        self, ids: Int[Tensor, " slots"], slots: Slots = None
    ) -> Float[Tensor, "slots vocab"]:
        """Return the logits of the id after the next one of each slot's document."""
        slots = as_range(slots, self.num_slots)
        vocab_size = self._model.output.out_features
        check_decode(ids, slots, self.num_slots, vocab_size, self._cache.positions.device)
        if not self._cache.room:
            raise ValueError(NOT_BEGUN)
        self._cache.reserve(slots)
        return self._graphs.run(self._step, slots, ids)

    def _step(self, slots: Slots, ids: Int[Tensor, " slots"]) -> Float[Tensor, "slots vocab"]:
        x = self._embedding.decode(ids, slots)
        return self._model.run(x, self._cache.step(slots))[:, 0]

    @torch.inference_mode()
    def mark(self, slot: int, length: int) -> Any:
        """Return a snapshot of a slot that only undoes its next ``length`` ids."""
        return self._embedding.snapshot(slot), self._cache.mark(slot, length)

    @torch.inference_mode()
    def truncate(self, slot: int, mark: Any, ids: Int[Tensor, " ids"]) -> None:
        """Undo the ids since a mark, but for the first ``ids``."""
        embedding, cache = mark
        self._embedding.rollback(slot, embedding)
        self._embedding.advance(slot, ids)
        self._cache.truncate(slot, cache, len(ids))

    def restart(self, where: Bool[Tensor, " slots"], slots: Slots = None) -> None:
        """Start a new document in those of some slots where ``where`` is true."""
        for tensor, start in ((self._cache.positions, 0), (self._embedding["recent"], codec.BOE)):
            values = select(tensor, slots)
            chosen = where.view(-1, *[1] * (values.dim() - 1))
            assign(tensor, slots, values.masked_fill(chosen, start))


class PatchedState(CompoundState):
    """Decoding state of a BLT with its patcher and scorer.

    A byte passes through scorer, encoder and decoder. The global transformer runs once per patch,
    when the patch closes; until then, a slot keeps the byte states of its open patch, and the keys
    and values of the last complete patch, which its bytes read.

    Args:
        blt: BLT, whose weights must not be moved while the state is in use.
        patcher: patching rule.
        scorer: computes the entropies, if the patcher needs them.
        num_slots: number of slots.
        strategy: how single bytes are run.
        memory: bounded memory for caches without a window, whose steps are not captured.
    """

    def __init__(
        self,
        blt: BLT,
        patcher: Patcher,
        scorer: Scorer | None,
        num_slots: int = 1,
        strategy: Strategy = "auto",
        memory: PagedMemory | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.blt = blt
        device = _device(blt)
        capture = choose_capture(strategy, device)
        if isinstance(patcher.rule, StatefulRule):
            strategy, capture = "eager", None  # the rule's memory is on the host
        self.is_captured = is_static = capture is not None
        """Whether single bytes are run as captured graphs."""
        self.scorer = None
        if patcher.needs_entropies:
            assert scorer is not None
            options = {} if memory is None else {"memory": memory}
            self.scorer = scorer.new_state(num_slots, strategy, **options)
        self.patcher = patcher.new_state(num_slots, device)
        self.embedding = EmbeddingState(blt.encoder.embedding, num_slots)
        stacks = blt.encoder, blt.global_model, blt.decoder
        self.caches = [_new_cache(one, num_slots, device, capture, memory) for one in stacks]
        self._encoder_cache, self._global_cache, self._decoder_cache = self.caches
        self.open = OpenPatch(num_slots, is_static=is_static)
        self.latent = LastLatent(num_slots)
        pieces = blt.vocabulary
        self.pieces = None if pieces is None else PieceState(pieces, num_slots)
        parts = [self.patcher, self.embedding, *self.caches, self.open, self.latent]
        super().__init__(*parts, *(one for one in (self.scorer, self.pieces) if one is not None))
        self._graphs = Graphs(capture, self)
        self._patch_graphs = self._graphs if memory is None else Graphs(None, self)
        self.passes = Passes()
        """How often each part was run so far."""
        self.observed = Observed(None, None)
        """What the last call saw of the documents it was given."""

    @property
    def rooms(self) -> tuple[int, ...]:
        """Sizes of the buffers that steps use."""
        return (*(cache.room for cache in self.caches), self.open.room)

    @property
    def num_patches(self) -> Int[Tensor, " slots"]:
        """Number of complete patches of each slot's document."""
        return self._global_cache.positions

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Int[Tensor, " ids"]) -> Float[Tensor, "ids vocab"]:
        """Return the logits of the id after each of the next ``ids`` of one slot's document."""
        device = self._encoder_cache.positions.device
        check_prefill(ids, slot, self.num_slots, codec.VOCAB_SIZE, device)
        if not len(ids):
            return ids.new_empty(0, codec.VOCAB_SIZE, dtype=torch.float32)
        check_free(self.caches, {slot: len(ids)})
        self.passes.encoder += 1
        context = self._encoder_cache.prefill(slot, len(ids))
        states = self.blt.encoder(self.embedding.prefill(slot, ids), context)
        return self.read(slot, ids, states).logits

    def read(
        self, slot: int, ids: Int[Tensor, " ids"], states: list[Float[Tensor, "1 ids dim"]]
    ) -> "Reading":
        """Read ids of which the encoder has computed the states: the rest of a prefill."""
        entropies = self.scorer.prefill(slot, ids) if self.scorer else None
        next_boundary = self.patcher.prefill(slot, ids, entropies, states[-1][0])
        self.observed = Observed(None if entropies is None else entropies[-1:], next_boundary[-1:])
        nodes, named = None, None
        if self.pieces is not None:
            nodes, named = self.pieces.prefill(slot, ids, next_boundary)
        readable, decoder_ids, latents = self._close(slot, states, next_boundary, named)
        context = self._decoder_cache.prefill(slot, len(ids))
        logits = self.blt.decode(states[-1], readable, decoder_ids[None], context, nodes)[0]
        self._count(is_global=latents is not None)
        return Reading(states, entropies, next_boundary, latents, logits)

    def _count(self, *, is_global: bool) -> None:
        """Count the passes of new bytes, but for the encoder's."""
        self.passes.scorer += self.scorer is not None
        self.passes.global_model += is_global
        self.passes.decoder += 1

    def _close(
        self,
        slot: int,
        states: list[Float[Tensor, "1 bytes dim"]],
        next_boundary: Bool[Tensor, " bytes"],
        named: Int[Tensor, "1 patches"] | None,
    ) -> tuple[Readable, Int[Tensor, " bytes"], Readable | None]:
        """Close patches; return the keys and values that new bytes may read, and the index of each.

        A byte reads the last patch that is complete at it: one that closes here, or the last one
        before. Last come the keys and values of the patches that close here, if any does.
        """
        closed = next_boundary.cumsum(0)
        before = self.latent.read([slot])
        num_closed = int(closed[-1])
        if not num_closed:
            self.open.extend(slot, states)
            assert before is not None
            return before, closed, None
        vectors = self._close_patches(slot, states, next_boundary, closed)
        if named is not None:
            assert self.blt.vocabulary is not None
            vectors = self.blt.vocabulary.read(vectors, named)
        context = self._global_cache.prefill(slot, num_closed)
        new = self.blt.read_latents(self.blt.global_model(vectors, context))
        readable, decoder_ids = new, closed - 1
        if before is not None:
            pairs = zip(before, new, strict=True)
            readable = [tuple(torch.cat(xs, 1) for xs in zip(*pair, strict=True)) for pair in pairs]
            decoder_ids = closed
        # Last, because it overwrites the memory of ``before``.
        self.write_latent(slot, [tuple(x[:, -1:] for x in layer) for layer in new])
        return readable, decoder_ids, new

    def write_latent(self, slot: int, readable: Readable) -> None:
        """Write what a slot's bytes read of its last complete patch."""
        self.latent.write([slot], readable)
        if self.pieces is not None:
            self.pieces.hold(readable[-1][0], [slot])

    def _close_patches(
        self,
        slot: int,
        states: list[Float[Tensor, "1 bytes dim"]],
        next_boundary: Bool[Tensor, " bytes"],
        closed: Int[Tensor, " bytes"],
    ) -> Float[Tensor, "1 patches global_dim"]:
        """Return the vectors of the patches that new bytes close; the rest stays open.

        With two bytes open before, and four new ones of which the second ends a patch::

            bytes           o o n n n n
            next_boundary       0 1 0 0
            closed              0 1 1 1      patches closed at or before each
            encoder_ids     0 0 0 0 1 1      so the last two bytes stay open
        """
        opened = self.open.take(slot)
        num_closed, num_open = int(closed[-1]), opened[0].shape[1] if opened else 0
        joined = states
        if num_open:
            joined = [torch.cat(pair, 1) for pair in zip(opened, states, strict=True)]
        closed_before = closed - next_boundary.long()
        encoder_ids = torch.cat((closed_before.new_zeros(num_open), closed_before))
        rest = int((closed_before < num_closed).sum()) + num_open
        self.open.extend(slot, [x[:, rest:] for x in joined])
        return self.blt.encoder.patch_vectors(joined, encoder_ids[None], num_closed)

    @torch.inference_mode()
    def decode(
        self, ids: Int[Tensor, " slots"], slots: Slots = None
    ) -> Float[Tensor, "slots vocab"]:
        """Return the logits of the id after the next one of each slot's document.

        The host waits for the device once, to learn which slots close a patch.
        """
        slots = as_range(slots, self.num_slots)
        device = self._encoder_cache.positions.device
        check_decode(ids, slots, self.num_slots, codec.VOCAB_SIZE, device)
        if not self._encoder_cache.room:
            raise ValueError(NOT_BEGUN)
        named = range(self.num_slots) if slots is None else slots
        check_free(self.caches, dict.fromkeys(named, 1))
        entropies = self.scorer.decode(ids, slots) if self.scorer else None
        for cache in (self._encoder_cache, self._decoder_cache):
            cache.reserve(slots)
        index = ids.new_tensor(self.open.count(named))
        state, ends = self._graphs.run(self._byte_step, slots, ids, index, entropies)
        self.observed = Observed(entropies, ends)
        self.passes.encoder += 1
        closing = [slot for slot, end in zip(named, ends.tolist(), strict=True) if end]
        self._count(is_global=bool(closing))
        if closing:
            some = as_range(closing, self.num_slots)
            self._global_cache.reserve(some)
            lengths = ids.new_tensor(self.open.close(closing))
            self._patch_graphs.run(self._patch_step, some, lengths)
        return self._graphs.run(self._decoder_step, slots, state)

    def _byte_step(
        self,
        slots: Slots,
        ids: Int[Tensor, " slots"],
        index: Int[Tensor, " slots"],
        entropies: Float[Tensor, " slots"] | None,
    ) -> tuple[Float[Tensor, "slots 1 dim"], Bool[Tensor, " slots"]]:
        """Encode a byte of each slot into its open patch; return its state and whether it ends."""
        x = self.embedding.decode(ids, slots)
        states = self.blt.encoder(x, self._encoder_cache.step(slots))
        self.open.append(slots, index, states)
        ends = self.patcher.decode(ids, entropies, states[-1][:, 0], slots)
        if self.pieces is not None:
            self.pieces.decode(ids, ends, slots)
        return states[-1], ends

    def _patch_step(self, slots: Slots, lengths: Int[Tensor, " slots"]) -> None:
        """Run the encoder's cross-attention and the global transformer over open patches."""
        states, encoder_ids = self.open.patches(slots, lengths)
        vectors = self.blt.encoder.patch_vectors(states, encoder_ids, 1)
        if self.pieces is not None:
            vectors = self.pieces.read(vectors, slots)
        latents = self.blt.global_model(vectors, self._global_cache.step(slots))
        self.latent.write(slots, self.blt.read_latents(latents))
        if self.pieces is not None:
            self.pieces.hold(latents, slots)

    def _decoder_step(
        self, slots: Slots, state: Float[Tensor, "slots 1 dim"]
    ) -> Float[Tensor, "slots vocab"]:
        """Return the logits of a byte of each slot, which reads the slot's last latent."""
        return self.predict(slots, state, self._decoder_cache.step(slots))

    def predict(
        self,
        slots: Slots,
        state: Float[Tensor, "slots 1 dim"],
        context: Any,
        nodes: Int[Tensor, " slots"] | None = None,
    ) -> Float[Tensor, "slots vocab"]:
        """Return the logits of a byte of each slot, which reads the slot's last latent.

        Args:
            slots: the slots.
            state: the encoder's last states.
            context: of the decoder.
            nodes: nodes of drafted bytes; ``None`` for the documents' own, if there are any.
        """
        readable = self.latent.read(slots)
        assert readable is not None
        first = torch.zeros(len(state), 1, dtype=torch.long, device=state.device)
        own = readable if self.pieces is None else readable[:-1]
        logits = self.blt.decoder(state, own, first, context)[:, 0]
        return logits if self.pieces is None else self.pieces.mix(logits, slots, nodes)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _weight_bytes(part: nn.Module) -> int:
    """Return the bytes of a part's weights, embeddings left out."""
    tensors = [
        *((name, tensor) for name, tensor in part.named_parameters()),
        *((name, tensor) for name, tensor in part.named_buffers()),
    ]
    return sum(x.numel() * x.element_size() for name, x in tensors if "embedding" not in name)


def _new_cache(
    stack: Any,
    num_slots: int,
    device: torch.device,
    capture: Capture | None,
    memory: PagedMemory | None,
) -> KVCache:
    if memory is not None and stack.spec.window is None:
        return memory.new_cache(stack, stack.spec, num_slots, device)
    return KVCache(stack.spec, num_slots, device, is_static=capture is not None)
