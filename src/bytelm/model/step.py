"""One position at a time on the CPU: the layers of :mod:`bytelm.model` in as few calls as possible.

A single position costs more in calls than in arithmetic. Here every buffer and every view of a
weight is made once, when a session starts; a norm is a dot product, a product and a factor of the
matrix product that follows; what remains is about twenty calls for a block. The twin is the model's
own forward with the same caches, to which the tests compare every step.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from bytelm.kernels import NORM_EPS
from bytelm.model.attention import AttentionCache, StackCache
from bytelm.model.blt import BLT, LocalDecoder, LocalEncoder, Readable
from bytelm.model.embedding import NgramEmbedding
from bytelm.model.layers import Block, DecoderCrossAttention, EncoderCrossAttention
from bytelm.model.transformer import Transformer


def can_step(module: nn.Module) -> bool:
    """Whether steps are written for a model's weights, and for the precision asked for."""
    weight = next(module.parameters())
    is_autocast = torch.is_autocast_enabled("cpu")
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not is_autocast


class _NormLinear:
    """:func:`bytelm.kernels.norm_linear` of one row, into a buffer."""

    def __init__(self, norm: Tensor, weight: Tensor) -> None:
        self._norm = norm
        self._dim = len(norm)
        self._weight = weight.T
        self._normed = weight.new_empty(1, weight.shape[1])
        self.out = weight.new_empty(1, weight.shape[0])

    def __call__(self, x: Float[Tensor, "1 dim"]) -> Float[Tensor, "1 out"]:
        row = x[0]
        scale = (float(row.dot(row)) / self._dim + NORM_EPS) ** -0.5
        torch.mul(x, self._norm, out=self._normed)
        return torch.addmm(self.out, self._normed, self._weight, beta=0, alpha=scale, out=self.out)


class _BlockStep:
    """One position through a block, in place."""

    def __init__(self, block: Block, head_dim: int) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        dim = attention.out.in_features
        self._project = _NormLinear(block.attention_norm.weight, attention.qkv.weight)
        heads = self._project.out.view(3, -1, head_dim)
        self._rotated = torch.view_as_complex(heads[:2].unflatten(-1, (-1, 2)))
        self._queries, self._key, self._value = heads[0][:, None], heads[1], heads[2]
        self._scale = head_dim**-0.5
        self._mixed = heads.new_empty(dim // head_dim, 1, head_dim)
        self._flat = self._mixed.view(1, dim)
        self._out = attention.out.weight.T
        self._gate_up = _NormLinear(block.feed_forward_norm.weight, feed_forward.gate_up.weight)
        self._gate, self._up = self._gate_up.out.chunk(2, dim=-1)
        self._down = feed_forward.down.weight.T

    def __call__(
        self, x: Float[Tensor, "1 dim"], factors: Complex[Tensor, "1 half"], cache: AttentionCache
    ) -> None:
        self._project(x)
        self._rotated.mul_(factors)
        keys, values = cache.append(self._key, self._value)
        torch.bmm(_weights(self._queries, keys, self._scale), values, out=self._mixed)
        torch.addmm(x, self._flat, self._out, out=x)
        self._gate_up(x)
        torch.addmm(x, nn.functional.silu(self._gate).mul_(self._up), self._down, out=x)


class StackStep:
    """One position through a stack of blocks."""

    def __init__(self, blocks: nn.ModuleList, cache: StackCache) -> None:
        self._cache = cache
        head_dim = cache.spec.head_dim
        self._blocks = [_BlockStep(b, head_dim) for b in blocks if isinstance(b, Block)]

    def __call__(self, x: Float[Tensor, "1 dim"]) -> list[Float[Tensor, "1 dim"]]:
        """States after each layer, the last of them ``x`` itself, which is overwritten."""
        factors, caches = self._cache.step(x.device)
        states = []
        for block, cache in zip(self._blocks, caches, strict=True):
            block(x, factors, cache)
            states.append(x)
            if len(states) < len(self._blocks):
                x = x.clone()
        return states


class TransformerStep:
    """One id through a plain transformer."""

    def __init__(self, model: Transformer, cache: StackCache) -> None:
        self._embedding = model.embedding
        self._blocks = StackStep(model.blocks, cache)
        self._head = _NormLinear(model.norm.weight, model.output.weight)

    def __call__(self, ids: Sequence[int]) -> Float[Tensor, "1 vocab"]:
        """Logits of the id after the last of the ids; in a buffer that the next step overwrites.

        The others are those before it that its embedding depends on.
        """
        return self._head(self._blocks(_embedded(self._embedding, ids))[-1])


class EncoderStep:
    """One byte through a local encoder, its embedding included."""

    def __init__(self, encoder: LocalEncoder, cache: StackCache) -> None:
        self._embedding = encoder.embedding
        self._blocks = StackStep(encoder.blocks, cache)
        self._num_read = max(len(encoder.cross_attention), 1)

    def __call__(self, ids: Sequence[int]) -> list[Float[Tensor, "1 1 dim"]]:
        """States that patches read, as ``LocalEncoder.byte_states``, of the last of the ids.

        The others are those before it that its embedding depends on.
        """
        states = self._blocks(_embedded(self._embedding, ids))
        return [state[None] for state in states[-self._num_read :]]


class PatchStep:
    """The bytes of one patch through the encoder's cross-attention and the global transformer."""

    def __init__(self, blt: BLT, cache: StackCache) -> None:
        encoder = blt.encoder
        self._slots = encoder.slots
        self._learned = encoder.learned_queries
        self._pool = encoder.pool_projection
        self._crosses = [c for c in encoder.cross_attention if isinstance(c, EncoderCrossAttention)]
        self._projection = encoder.patch_projection
        self._blocks = StackStep(blt.global_model.blocks, cache)
        self._read_latents = blt.decoder.read_latents

    def __call__(self, states: Sequence[Float[Tensor, "1 bytes dim"]]) -> Readable:
        """What bytes read of the patch."""
        return self._read_latents(self._blocks(self._vector(states))[-1][None])

    def _vector(
        self, states: Sequence[Float[Tensor, "1 bytes dim"]]
    ) -> Float[Tensor, "1 global_dim"]:
        """``LocalEncoder.patch_vectors`` of bytes that are one patch."""
        slots = self._learned
        if self._pool:
            slots = self._pool(states[0].amax(1)).view(self._slots, -1)
        assert slots is not None
        for cross, state in zip(self._crosses, states, strict=False):
            keys, values = cross.project_keys_values(state[0])
            queries = cross.project_queries(slots).transpose(0, 1)
            scale = queries.shape[-1] ** -0.5
            weights = _weights(queries, keys.permute(1, 2, 0), scale)
            out = torch.bmm(weights, values.transpose(0, 1))
            slots = cross.add_residual(slots, out.transpose(0, 1))
        vector = slots.reshape(1, -1)
        # What follows overwrites it, and without any layer it could be the learned queries.
        return vector.clone() if self._projection is None else self._projection(vector)


class DecoderStep:
    """One byte's state through a local decoder."""

    def __init__(self, decoder: LocalDecoder, cache: StackCache) -> None:
        self._cache = cache
        head_dim = cache.spec.head_dim
        self._blocks = [_BlockStep(b, head_dim) for b in decoder.blocks if isinstance(b, Block)]
        crosses = (c for c in decoder.cross_attention if isinstance(c, DecoderCrossAttention))
        self._crosses = [_CrossStep(cross) for cross in crosses]
        self._head = _NormLinear(decoder.norm.weight, decoder.output.weight)
        self._added: Tensor | None = None

    def read(self, readable: Readable) -> None:
        """Change to another latent: what ``LocalDecoder.read_latents`` says of one patch."""
        if self._crosses:
            for cross, (keys, values) in zip(self._crosses, readable, strict=True):
                cross.read(keys[0, 0], values[0, 0])
        else:
            self._added = readable[0][0][0, 0]

    def __call__(self, state: Float[Tensor, "1 1 dim"]) -> Float[Tensor, "1 vocab"]:
        """Logits of the next id; in a buffer that the next step overwrites."""
        x = state[0].clone() if self._added is None else state[0] + self._added
        factors, caches = self._cache.step(x.device)
        for layer, block in enumerate(self._blocks):
            if layer < len(self._crosses):
                self._crosses[layer](x)
            block(x, factors, caches[layer])
        return self._head(x)


class _CrossStep:
    """One byte's state reads the slots of one latent, in place."""

    def __init__(self, cross: DecoderCrossAttention) -> None:
        self._project = _NormLinear(cross.query_norm.weight, cross.query.weight)
        self._queries = self._project.out.view(cross.num_heads, 1, -1)
        self._scale = self._queries.shape[-1] ** -0.5
        self._mixed = torch.empty_like(self._queries)
        self._flat = self._mixed.view(1, -1)
        self._out = cross.out.weight.T
        self._residual_scale = cross.residual_scale
        self._keys = self._values = self._mixed

    def read(
        self,
        keys: Float[Tensor, "slots heads head_dim"],
        values: Float[Tensor, "slots heads head_dim"],
    ) -> None:
        self._keys, self._values = keys.permute(1, 2, 0), values.transpose(0, 1)

    def __call__(self, x: Float[Tensor, "1 dim"]) -> None:
        self._project(x)
        torch.bmm(_weights(self._queries, self._keys, self._scale), self._values, out=self._mixed)
        torch.addmm(x, self._flat, self._out, beta=self._residual_scale, out=x)


def _embedded(embedding: NgramEmbedding, ids: Sequence[int]) -> Float[Tensor, "1 dim"]:
    """Embedding of the last of the ids, for blocks to overwrite: it may be a row of the table."""
    return embedding.embed_last(ids)[0].clone()


def _weights(
    queries: Float[Tensor, "heads some head_dim"],
    keys: Float[Tensor, "heads head_dim seen"],
    scale: float,
) -> Float[Tensor, "heads some seen"]:
    """Attention weights; the scale is a factor of the product."""
    scores = queries.new_empty(len(queries), queries.shape[1], keys.shape[2])
    return torch.baddbmm(scores, queries, keys, beta=0, alpha=scale, out=scores).softmax(-1)
