"""Descriptions of the parts of a model: matrices, attention and embeddings.

FLOPs, parameters, memory traffic and caches all follow from these. The cost of a part depends on
how often it runs: a matrix is applied once per byte or once per patch, and during generation it is
read from memory once per byte or only when a patch closes.
"""

from collections.abc import Callable
from functools import singledispatch
from typing import Literal, NamedTuple, TypeVar

from bytelm.codec import VOCAB_SIZE
from bytelm.config import (
    BLTConfig,
    FittedNgramConfig,
    HashEmbeddingConfig,
    NgramConfig,
    Node,
    StackConfig,
    TransformerConfig,
    kind_of,
)
from bytelm.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Node)

Axis = Literal["byte", "patch"]


class Matrix(NamedTuple):
    """Matrices of one shape."""

    inputs: int
    outputs: int
    copies: int
    per: Axis
    """Whether the matrices are applied for every byte or for every patch."""
    vectors: int = 1
    """Vectors that they are applied to for each byte or patch."""
    read_per: Axis = "byte"
    """Whether they are read for every byte or for every patch during generation."""

    @property
    def parameters(self) -> int:
        """Number of elements of all copies."""
        return self.inputs * self.outputs * self.copies


class SelfAttention(NamedTuple):
    """Causal self-attention of a stack of layers."""

    num_layers: int
    query_width: int
    """Elements of a position's queries: those of all heads."""
    key_width: int
    """Elements of a position's keys, and of its values: those of all key-value heads."""
    per: Axis
    window: int | None
    """Positions visible to a position, itself included; ``None`` for all before it."""


class Part(NamedTuple):
    """One part of a model."""

    matrices: tuple[Matrix, ...] = ()
    self_attention: SelfAttention | None = None
    cross_width: int = 0
    """Elements of the slots in each byte's cross-attention, over all layers."""
    other_parameters: int = 0
    """Parameters of embeddings, norms and learned queries, for which no FLOPs are counted."""
    looked_up: int = 0
    """Elements of embeddings read for each byte."""
    latent: int = 0
    """Elements of the last complete patch that are kept for the bytes after it."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(matrix.parameters for matrix in self.matrices) + self.other_parameters


@singledispatch
def model_parts(config: Node) -> dict[str, Part]:
    """Return the parts of a model by name, in the order in which a byte passes through them.

    Raises:
        ConfigError: the parts of this kind of model are not registered.
    """
    raise ConfigError(
        f"the costs of a {kind_of(type(config))} model are not known: register its parts with "
        "bytelm.accounting.register_parts"
    )


def register_parts(config: type[ConfigT], describe: Callable[[ConfigT], dict[str, Part]]) -> None:
    """Register the parts of a kind of model, so that its costs can be counted.

    Args:
        config: class of its configuration.
        describe: returns the parts of a configuration, by name.
    """
    model_parts.register(config, describe)


def _transformer(config: TransformerConfig) -> dict[str, Part]:
    vocab, dim = config.vocab_size, config.dim
    hashed = config.hash_embeddings
    return {
        "embedding": Part(other_parameters=vocab * dim, looked_up=dim),
        **({"hash embeddings": _hash_embeddings(hashed, dim)} if hashed else {}),
        "transformer": _stack(config, "byte", config.window),
        "output": Part((Matrix(dim, vocab, 1, "byte"),), other_parameters=dim),
    }


def _blt(config: BLTConfig) -> dict[str, Part]:
    local, dim = config.local, config.local.dim
    return {
        "byte embedding": Part(other_parameters=VOCAB_SIZE * dim, looked_up=dim),
        "hash embeddings": _hash_embeddings(config.hash_embeddings, dim),
        "encoder": _stack(local.stack(local.encoder_layers), "byte", local.window),
        "encoder cross-attention": _encoder_cross_attention(config),
        "patch projections": _patch_projections(config),
        "global": _stack(config.global_model, "patch", None),
        "decoder": _stack(local.stack(local.decoder_layers), "byte", local.window),
        "decoder cross-attention": _decoder_cross_attention(config),
        "output": _output(config),
        **({"vocabulary": _vocabulary(config)} if config.vocabulary else {}),
    }


def _output(config: BLTConfig) -> Part:
    """Return the output of the decoder, which has a gate as well if there is a vocabulary."""
    dim, outputs = config.local.dim, VOCAB_SIZE + (config.vocabulary is not None)
    return Part((Matrix(dim, outputs, 1, "byte"),), other_parameters=dim)


def _vocabulary(config: BLTConfig) -> Part:
    """Return the pieces that patches are read as and latents predict, once per patch."""
    assert config.vocabulary is not None
    dim, size = config.global_model.dim, config.vocabulary.size
    return Part(
        (Matrix(dim, size, 1, "patch", read_per="patch"),),
        other_parameters=dim if config.vocabulary.tied else dim + size * dim,
        latent=dim + size + 1,
    )


def _hash_embeddings(config: HashEmbeddingConfig, dim: int) -> Part:
    hashes = len(config.sizes) * config.functions
    return Part(other_parameters=hashes * config.num_buckets * dim, looked_up=hashes * dim)


def _stack(config: StackConfig, per: Axis, window: int | None) -> Part:
    """Return a stack of blocks: attention and feed-forward matrices, norms and biases."""
    dim, layers = config.dim, config.num_layers
    queries = config.num_heads * config.head_width
    keys = config.kv_heads * config.head_width
    extra = 2 * dim
    extra += 2 * config.head_width if config.qk_norm else 0
    extra += queries + 2 * keys if config.qkv_bias else 0
    extra += dim if config.out_bias else 0
    extra += 2 * config.ffn_dim + dim if config.ffn_bias else 0
    return Part(
        matrices=(
            Matrix(dim, queries, 2 * layers, per, read_per=per),
            Matrix(dim, keys, 2 * layers, per, read_per=per),
            Matrix(dim, config.ffn_dim, 3 * layers, per, read_per=per),
        ),
        self_attention=SelfAttention(layers, queries, keys, per, window),
        other_parameters=extra * layers,
    )


def _inner_dim(config: BLTConfig) -> int:
    """Return the total width of the heads of cross-attention, which divides by their number."""
    heads = config.cross_attention.num_heads
    return heads * (config.local.dim // heads)


def _encoder_cross_attention(config: BLTConfig) -> Part:
    """Return the cross-attention of slots to the bytes of their patch, run when it closes."""
    dim, inner, layers = config.local.dim, _inner_dim(config), config.encoder_cross_layers
    slots = config.cross_attention.slots
    return Part(
        matrices=(
            Matrix(dim, inner, 2 * layers, "patch", slots, read_per="patch"),
            Matrix(dim, inner, 2 * layers, "byte", read_per="patch"),
        ),
        cross_width=layers * slots * inner,
        other_parameters=2 * dim * layers,
    )


def _decoder_cross_attention(config: BLTConfig) -> Part:
    """Return the cross-attention of bytes to slots, whose keys are computed once per patch."""
    dim, inner, layers = config.local.dim, _inner_dim(config), config.decoder_cross_layers
    slots = config.cross_attention.slots
    return Part(
        matrices=(
            Matrix(dim, inner, 2 * layers, "byte"),
            Matrix(dim, inner, 2 * layers, "patch", slots, read_per="patch"),
        ),
        cross_width=layers * slots * inner,
        other_parameters=2 * dim * layers,
        latent=2 * layers * slots * inner,
    )


def _patch_projections(config: BLTConfig) -> Part:
    """Return the projections of byte states to slots, slots to vectors, and latents to slots."""
    dim, global_dim = config.local.dim, config.global_model.dim
    slots = config.cross_attention.slots
    width = slots * dim
    is_pooled = config.cross_attention.queries == "pooled"
    reads_slots = config.decoder_cross_layers > 0
    shapes = [(dim, width)] if is_pooled else []
    if width != global_dim:
        shapes.append((width, global_dim))
    shapes.append((global_dim, width if reads_slots else dim))
    return Part(
        matrices=tuple(Matrix(*shape, 1, "patch", read_per="patch") for shape in shapes),
        other_parameters=0 if is_pooled else width,
        latent=0 if reads_slots else dim,
    )


register_parts(TransformerConfig, _transformer)
register_parts(BLTConfig, _blt)
# The look-ups of an n-gram scorer cost no FLOPs.
register_parts(NgramConfig, lambda config: {})
register_parts(FittedNgramConfig, lambda config: {})
