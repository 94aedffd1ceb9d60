"""The Byte Latent Transformer: local encoder, global transformer, local decoder.

::

    bytes --encoder--> byte states, patch vectors
    patch vectors --global transformer--> latents
    byte states, latents --decoder--> logits of the next byte

(Paper section 3.) Everything at byte level is windowed or local to a patch; only the global
transformer sees far, and it runs once per patch. Each part is split where an incremental session
has to enter it: the same methods run whole rows and single bytes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm import codec, kernels
from bytelm.config import BLTConfig
from bytelm.model.attention import Context
from bytelm.model.embedding import NgramEmbedding
from bytelm.model.layers import (
    DecoderCrossAttention,
    EncoderCrossAttention,
    init_linear,
    init_stack,
)
from bytelm.model.transformer import build_blocks, stack_spec
from bytelm.patching import Patches


class LocalEncoder(nn.Module):
    """Bytes to byte states and patch vectors (paper section 3.2).

    The first queries of a patch are the maximum of its byte states, projected to ``slots``
    vectors (or, as an ablation, learned); each cross-attention layer refines them.
    """

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        local, cross = config.local, config.cross_attention
        stack = local.stack(local.encoder_layers)
        self.spec = stack_spec(stack, local.window)
        self.slots = cross.slots
        self.embedding = NgramEmbedding(
            vocab_size=codec.VOCAB_SIZE, dim=local.dim, config=config.ngrams
        )
        self.blocks = build_blocks(stack)
        self.cross_attention = nn.ModuleList(
            EncoderCrossAttention(dim=local.dim, num_heads=cross.num_heads, residual=cross.residual)
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

    def byte_states(
        self, x: Float[Tensor, "batch bytes dim"], context: Context
    ) -> list[Float[Tensor, "batch bytes dim"]]:
        """States of embedded bytes after each layer that patches read; the last layer's last."""
        states = []
        for layer, block in enumerate(self.blocks):
            x = block(x, context.factors, context.attend(layer))
            states.append(x)
        return states[-max(len(self.cross_attention), 1) :]

    def patch_vectors(
        self,
        states: Sequence[Float[Tensor, "batch bytes dim"]],
        encoder_ids: Int[Tensor, "batch bytes"],
        num_patches: int,
    ) -> Float[Tensor, "batch patches global_dim"]:
        """Pool the bytes of each patch, let its slots attend to them, and project.

        Args:
            states: as :meth:`byte_states` returns them, for bytes that cover whole patches.
            encoder_ids: patch of each byte; ``num_patches`` for bytes of none.
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
    """Patch vectors to latents, block-causal over documents (paper section 3.1)."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        self.spec = stack_spec(config.global_model, window=None)
        self.blocks = build_blocks(config.global_model)

    def forward(
        self, vectors: Float[Tensor, "batch patches dim"], context: Context
    ) -> Float[Tensor, "batch patches dim"]:
        """Latents. There is no final norm: what reads them by cross-attention normalises them."""
        for layer, block in enumerate(self.blocks):
            vectors = block(vectors, context.factors, context.attend(layer))
        return vectors


class LocalDecoder(nn.Module):
    """Byte states and latents to logits (paper section 3.3).

    The decoder starts from the encoder's last byte states. A latent becomes ``slots`` vectors that
    the bytes allowed to read it attend to, before each layer (or only the first). Without
    cross-attention the latent is projected to the local width and added once, as SpaceByte does.
    """

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        local, cross = config.local, config.cross_attention
        stack = local.stack(local.decoder_layers)
        self.spec = stack_spec(stack, local.window)
        self.slots = cross.slots if config.decoder_cross_layers else 1
        self.latent_projection = nn.Linear(
            config.global_model.dim, self.slots * local.dim, bias=False
        )
        self.cross_attention = nn.ModuleList(
            DecoderCrossAttention(dim=local.dim, num_heads=cross.num_heads, residual=cross.residual)
            for _ in range(config.decoder_cross_layers)
        )
        self.blocks = build_blocks(stack)
        self.norm = nn.RMSNorm(local.dim, eps=kernels.NORM_EPS)
        self.output = nn.Linear(local.dim, codec.VOCAB_SIZE, bias=False)

    def read_latents(self, latents: Float[Tensor, "batch patches global_dim"]) -> "Readable":
        """What bytes read of latents, for each layer: computed once per patch, not per byte."""
        slots = self.latent_projection(latents).unflatten(-1, (self.slots, -1))
        if not self.cross_attention:
            return [(slots,)]
        layers = (c for c in self.cross_attention if isinstance(c, DecoderCrossAttention))
        return [cross.project_keys_values(slots) for cross in layers]

    def forward(
        self,
        x: Float[Tensor, "batch bytes dim"],
        readable: "Readable",
        decoder_ids: Int[Tensor, "batch bytes"],
        context: Context,
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Logits, in fp32, of the id after each byte.

        Args:
            x: the encoder's last byte states.
            readable: from :meth:`read_latents`.
            decoder_ids: index among the patches of the latent each byte reads.
            context: of the byte positions.
        """
        if not self.cross_attention:
            ((slots,),) = readable
            index = decoder_ids[..., None].expand(-1, -1, x.shape[-1])
            x = x + slots[:, :, 0].gather(1, index)
        for layer, block in enumerate(self.blocks):
            if layer < len(self.cross_attention):
                x = self.cross_attention[layer](x, *readable[layer], decoder_ids)
            x = block(x, context.factors, context.attend(layer))
        return kernels.norm_linear(x, self.norm.weight, self.output.weight).float()


Readable = Sequence[tuple[Tensor, ...]]
"""Of each decoder layer that reads latents, keys and values of every patch's slots; without
cross-attention, the projected latents themselves. All are ``[batch, patches, slots, ...]``."""


class BLT(nn.Module):
    """A Byte Latent Transformer over given :class:`Patches`."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        self.encoder = LocalEncoder(config)
        self.global_model = GlobalTransformer(config)
        self.decoder = LocalDecoder(config)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Matrices as :func:`~bytelm.model.layers.init_stack` has them; norms are 1."""
        init_stack(self, generator)
        if not self.decoder.cross_attention:
            # The latents themselves are added then.
            nn.init.zeros_(self.decoder.latent_projection.weight)
        if self.encoder.learned_queries is not None:
            init_linear(self.encoder.learned_queries, generator)

    def forward(
        self, ids: Int[Tensor, "batch bytes"], patches: Patches
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Logits, in fp32, of the id after each byte of packed rows."""
        # Encoder and decoder share window and head dimension, hence the context.
        context = self.encoder.spec.over_rows(patches.documents, patches.positions)
        embedded = self.encoder.embedding(ids, patches.positions)
        states = self.encoder.byte_states(embedded, context)
        vectors = self.encoder.patch_vectors(states, patches.encoder_ids, patches.num_patches)

        global_spec = self.global_model.spec
        global_context = global_spec.over_rows(patches.patch_documents, patches.patch_positions)
        readable = self.decoder.read_latents(self.global_model(vectors, global_context))
        return self.decoder(states[-1], readable, patches.decoder_ids, context)
