"""The Byte Latent Transformer: local encoder, global transformer, local decoder.

::

    bytes --encoder--> byte states, patch vectors
    patch vectors --global transformer--> latents
    byte states, latents --decoder--> logits of the next byte

(Paper section 3.) Everything at byte level is windowed or local to a patch; only the global
transformer attends to the whole context, and it runs once per patch. A model that was made from a
token model may have a :mod:`vocabulary <bytelm.model.vocabulary>` as well. :meth:`BLT.forward`
calls the parts for packed rows, :mod:`bytelm.inference` for bytes as they arrive.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm import codec, kernels
from bytelm.config import BLTConfig
from bytelm.model.attention import RMSNorm, RowsContext, StackContext, StackSpec
from bytelm.model.embedding import HashEmbedding
from bytelm.model.layers import (
    DecoderCrossAttention,
    EncoderCrossAttention,
    Initialisers,
    build_blocks,
    init_linear,
    stack_initialisers,
)
from bytelm.model.vocabulary import NOWHERE, Vocabulary
from bytelm.patching import Patches


class LocalEncoder(nn.Module):
    """Encoder of bytes into byte states, and of these into patch vectors (paper section 3.2).

    The first queries of a patch are the maximum of its byte states, projected to ``slots``
    vectors (or, as an ablation, learned); each cross-attention layer refines them.
    """

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        local, cross = config.local, config.cross_attention
        stack = local.stack(local.encoder_layers)
        self.spec = StackSpec.of(stack, local.window)
        self.slots = cross.slots
        self.embedding = HashEmbedding(
            vocab_size=codec.VOCAB_SIZE, dim=local.dim, config=config.hash_embeddings
        )
        self.blocks = build_blocks(stack)
        self.cross_attention = nn.ModuleList(
            EncoderCrossAttention(
                dim=local.dim,
                num_heads=cross.num_heads,
                residual=cross.residual,
                eps=local.norm_eps,
            )
            for _ in range(config.encoder_cross_layers)
        )
        width = self.slots * local.dim
        if cross.queries == "learned":
            self.pool_projection = None
            self.learned_queries = nn.Parameter(torch.empty(self.slots, local.dim))
        else:
            self.pool_projection = nn.Linear(local.dim, width, bias=False)
            self.learned_queries = None
        global_dim = config.global_model.dim
        needs_projection = width != global_dim
        self.patch_projection = (
            nn.Linear(width, global_dim, bias=False) if needs_projection else None
        )

    def forward(
        self, x: Float[Tensor, "batch bytes dim"], context: StackContext
    ) -> list[Float[Tensor, "batch bytes dim"]]:
        """Return the states of embedded bytes after each layer that patches read, in order."""
        states = []
        for layer, block in enumerate(self.blocks):
            x = block(x, context[layer])
            states.append(x)
        return states[-self.num_read :]

    @property
    def num_read(self) -> int:
        """Number of layers whose states patches read."""
        return max(len(self.cross_attention), 1)

    def patch_vectors(
        self,
        states: Sequence[Float[Tensor, "batch bytes dim"]],
        encoder_ids: Int[Tensor, "batch bytes"],
        num_patches: int,
    ) -> Float[Tensor, "batch patches global_dim"]:
        """Pool the bytes of each patch, let its slots attend to them, and project.

        Args:
            states: from :meth:`forward`, of bytes that cover whole patches.
            encoder_ids: patch of each byte; ``num_patches`` for bytes in no patch.
            num_patches: patches to produce.
        """
        if self.learned_queries is not None:
            slots = self.learned_queries.expand(len(encoder_ids), num_patches, -1, -1)
        else:
            assert self.pool_projection is not None
            pooled = kernels.segment_max(states[0], encoder_ids, num_patches)
            slots = self.pool_projection(pooled).unflatten(-1, (self.slots, -1))
        for cross, state in zip(self.cross_attention, states, strict=False):
            slots = cross(slots, state, encoder_ids)
        vectors = slots.flatten(-2)
        return vectors if self.patch_projection is None else self.patch_projection(vectors)


class GlobalTransformer(nn.Module):
    """Transformer over patch vectors, causal within each document (paper section 3.1)."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        self.spec = StackSpec.of(config.global_model, window=None)
        self.blocks = build_blocks(config.global_model)

    def forward(
        self, vectors: Float[Tensor, "batch patches dim"], context: StackContext
    ) -> Float[Tensor, "batch patches dim"]:
        """Return latents. There is no final norm: cross-attention normalises what it reads."""
        for layer, block in enumerate(self.blocks):
            vectors = block(vectors, context[layer])
        return vectors


Readable = list[tuple[Tensor, ...]]
"""Keys and values of every patch's slots, for each decoder layer that reads latents; without
cross-attention, the projected latents themselves. All are ``[batch, patches, slots, ...]``."""


class LocalDecoder(nn.Module):
    """Decoder of byte states and latents into logits (paper section 3.3).

    The decoder starts from the encoder's last byte states. A latent becomes ``slots`` vectors that
    the bytes allowed to read it attend to, before each layer (or only the first). Without
    cross-attention the latent is projected to the local width and added once, as SpaceByte does.
    """

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        local, cross = config.local, config.cross_attention
        stack = local.stack(local.decoder_layers)
        self.spec = StackSpec.of(stack, local.window)
        self.slots = cross.slots if config.decoder_cross_layers else 1
        self.latent_projection = nn.Linear(
            config.global_model.dim, self.slots * local.dim, bias=False
        )
        self.cross_attention = nn.ModuleList(
            DecoderCrossAttention(
                dim=local.dim,
                num_heads=cross.num_heads,
                residual=cross.residual,
                eps=local.norm_eps,
            )
            for _ in range(config.decoder_cross_layers)
        )
        self.blocks = build_blocks(stack)
        self.norm = RMSNorm(local.dim, eps=local.norm_eps)
        # With a vocabulary, the last output is its gate.
        outputs = codec.VOCAB_SIZE + (config.vocabulary is not None)
        self.output = nn.Linear(local.dim, outputs, bias=False)

    def read_latents(self, latents: Float[Tensor, "batch patches global_dim"]) -> Readable:
        """Return the keys and values of latents for each layer, computed once per patch."""
        slots = self.latent_projection(latents).unflatten(-1, (self.slots, -1))
        if not self.cross_attention:
            return [(slots,)]
        layers = cast(Iterable[DecoderCrossAttention], self.cross_attention)
        return [cross.project_keys_values(slots) for cross in layers]

    def forward(
        self,
        x: Float[Tensor, "batch bytes dim"],
        readable: Readable,
        decoder_ids: Int[Tensor, "batch bytes"],
        context: StackContext,
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits, in fp32, of the id after each byte.

        Args:
            x: the encoder's last byte states.
            readable: from :meth:`read_latents`.
            decoder_ids: index among the patches of the latent each byte reads.
            context: of the byte positions.
        """
        crosses = list(self.cross_attention)
        if not crosses:
            ((slots,),) = readable
            index = decoder_ids[..., None].expand(-1, -1, x.shape[-1])
            x = x + slots[:, :, 0].gather(1, index)
        for layer, block in enumerate(self.blocks):
            if layer < len(crosses):
                x = crosses[layer](x, *readable[layer], decoder_ids)
            x = block(x, context[layer])
        return self.logits(x)

    def logits(self, x: Float[Tensor, "batch bytes dim"]) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits, in fp32, of the last block's states."""
        return self.output(self.norm(x)).float()


class BLT(nn.Module):
    """A Byte Latent Transformer over given :class:`Patches`."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        self.encoder = LocalEncoder(config)
        self.global_model = GlobalTransformer(config)
        self.decoder = LocalDecoder(config)
        self.vocabulary = None
        if config.vocabulary is not None:
            dim, eps = config.global_model.dim, config.global_model.norm_eps
            self.vocabulary = Vocabulary(config.vocabulary, dim, eps)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters; see :meth:`initialisers`."""
        for parameter, initialise in self.initialisers(generator):
            initialise(parameter)

    def initialisers(self, generator: torch.Generator | None = None) -> Initialisers:
        """Yield parameters and their initialisation: :func:`stack_initialisers`, and more."""
        yield from stack_initialisers(self, generator)
        if not self.decoder.cross_attention:
            # Projected latents are added to the byte states: begin with zeros, as branches do.
            yield self.decoder.latent_projection.weight, nn.init.zeros_
        if self.encoder.learned_queries is not None:
            yield self.encoder.learned_queries, partial(init_linear, generator=generator)

    def forward(
        self, ids: Int[Tensor, "batch bytes"], patches: Patches
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits, in fp32, of the id after each byte of packed rows."""
        states, context = self.encode(ids, patches.documents, patches.positions)
        return self.predict(ids, states, patches, context)

    def encode(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"],
        positions: Int[Tensor, "batch bytes"],
    ) -> tuple[list[Float[Tensor, "batch bytes dim"]], RowsContext]:
        """Return byte states of packed rows, and the context they were computed in.

        The decoder has the same window and head dimension, so it can use the same context.
        """
        context = self.encoder.spec.over_rows(documents, positions)
        return self.encoder(self.encoder.embedding(ids, positions), context), context

    def predict(
        self,
        ids: Int[Tensor, "batch bytes"],
        states: list[Float[Tensor, "batch bytes dim"]],
        patches: Patches,
        context: RowsContext,
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits, in fp32, for byte states from :meth:`encode` and their patches."""
        vectors = self.encoder.patch_vectors(states, patches.encoder_ids, patches.num_patches)
        nodes = None
        if self.vocabulary is not None:
            nodes = self.vocabulary.walk(ids, patches.ends)
            vectors = self.vocabulary.read(vectors, named(nodes, patches))
        spec = self.global_model.spec
        global_context = spec.over_rows(patches.patch_documents, patches.patch_positions)
        readable = self.read_latents(self.global_model(vectors, global_context))
        return self.decode(states[-1], readable, patches.decoder_ids, context, nodes)

    def read_latents(self, latents: Float[Tensor, "batch patches global_dim"]) -> Readable:
        """Return what bytes read of latents; with a vocabulary, the latents themselves are last."""
        readable = self.decoder.read_latents(latents)
        return readable if self.vocabulary is None else [*readable, (latents,)]

    def decode(
        self,
        x: Float[Tensor, "batch bytes dim"],
        readable: Readable,
        decoder_ids: Int[Tensor, "batch bytes"],
        context: StackContext,
        nodes: Int[Tensor, "batch bytes"] | None,
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits, in fp32, of the id after each byte.

        Args:
            x: the encoder's last byte states.
            readable: from :meth:`read_latents`.
            decoder_ids: index of the latent that each byte reads.
            context: of the byte positions.
            nodes: nodes of the bytes in the vocabulary, if there is one.
        """
        if self.vocabulary is None:
            return self.decoder(x, readable, decoder_ids, context)
        *own, (latents,) = readable
        logits = self.decoder(x, own, decoder_ids, context)
        assert nodes is not None
        return self.vocabulary.predict(logits, latents, decoder_ids, nodes)


def named(nodes: Int[Tensor, "batch bytes"], patches: Patches) -> Int[Tensor, "batch patches"]:
    """Return the node of each patch's piece: the one before the patch's last byte."""
    before = nodes.roll(1, 1).masked_fill(patches.positions == 0, 0)
    index = torch.where(patches.ends, patches.encoder_ids, patches.num_patches)
    found = nodes.new_full((len(nodes), patches.num_patches + 1), NOWHERE)
    return found.scatter(1, index, before)[:, :-1]
