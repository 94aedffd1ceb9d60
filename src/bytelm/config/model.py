"""Configuration of models: transformers, BLTs and scorers."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bytelm.codec import VOCAB_SIZE
from bytelm.config.kinds import Int, Kinds, Node, open_node

Positive = Annotated[Int, Field(ge=1)]


class ModelConfig(Node):
    """Base class of the configurations of trainable models."""

    has_patches: ClassVar[bool] = False
    """Whether a recipe needs a patching rule for it."""
    reads_tokens: ClassVar[bool] = False
    """Whether it can read the tokens of a tokenizer instead of bytes."""
    named_parts: ClassVar[tuple[str, ...]] = ("embeddings", "hash_embeddings", "output")
    """Parts that settings of a recipe may name, for a learning rate of their own, to freeze them or
    to begin with weights of a checkpoint: all embeddings, those of n-grams alone, the output
    matrix, and further parts by the first component of their parameters' names."""

    kind: str

    @property
    def can_score(self) -> bool:
        """Whether it can be the scorer of a patching rule: a byte model with a finite window."""
        return False


MODELS: Kinds[ModelConfig] = Kinds("model")
"""Trainable models."""
SCORERS: Kinds[Node] = Kinds("scorer")
"""Models that can compute the entropies of a patching rule."""


class RopeScaling(Node):
    """Scaling of the rotary frequencies, for contexts longer than those of pre-training."""

    kind: Literal["linear", "llama3"]
    """``linear`` divides every frequency by ``factor``, ``llama3`` the slow ones (Llama 3.1)."""
    factor: Annotated[float, Field(ge=1)]
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """``llama3``: wavelengths above ``original_context / low_freq_factor`` are scaled in full."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """``llama3``: those below ``original_context / high_freq_factor`` are left as they are."""
    original_context: Positive = 8192
    """``llama3``: positions of the pre-training context."""


class BlockConfig(Node):
    """A pre-norm transformer block, with the options of the Llama family."""

    dim: Positive
    num_heads: Positive
    num_kv_heads: Positive | None = None
    """Key-value heads, each shared by a group of query heads; null for ``num_heads``."""
    head_dim: Positive | None = None
    """Width of a head; null for ``dim / num_heads``."""
    ffn_dim: Positive
    """Width of the feed-forward's hidden layer."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    rope_theta: Annotated[float, Field(gt=0)] = 500_000.0
    rope_scaling: RopeScaling | None = None
    rope_layout: Literal["interleaved", "half"] = "interleaved"
    """Pairs of dimensions that rotate together: ``interleaved`` 2j and 2j + 1 (Llama), or ``half``
    j and j + head_dim / 2 (Hugging Face)."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head before they are rotated."""
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.dim // self.num_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> "BlockConfig":
        if (self.head_dim is None and self.dim % self.num_heads) or self.head_width % 2:
            raise ValueError(
                f"dim {self.dim} must be num_heads {self.num_heads} times an even head dimension"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.kv_heads}"
            )
        return self


class StackConfig(BlockConfig):
    """A stack of transformer blocks."""

    num_layers: Positive


class HashEmbeddingConfig(Node):
    """Hash embeddings of n-grams of bytes or tokens; ``sizes: []`` disables them."""

    sizes: tuple[Annotated[Int, Field(ge=2, le=32)], ...] = Field(
        default=(3, 4, 5, 6, 7, 8), strict=False
    )
    num_buckets: Positive = 500_002
    """Embeddings per n-gram size and hash function."""
    functions: Annotated[Int, Field(ge=1, le=11)] = 1
    combine: Literal["sum", "mean"] = "sum"


@SCORERS.add
@MODELS.add
class TransformerConfig(StackConfig, ModelConfig):
    """A plain transformer: entropy model, byte-level baseline, or baseline with a tokenizer."""

    reads_tokens: ClassVar[bool] = True
    named_parts: ClassVar[tuple[str, ...]] = (*ModelConfig.named_parts, "blocks")

    kind: Literal["transformer"] = "transformer"
    window: Positive | None = None
    """Positions visible to one, itself included; null for all before it."""
    vocab_size: Annotated[Int, Field(ge=VOCAB_SIZE)] = VOCAB_SIZE
    """Ids: 260 for bytes, more for the tokens of ``data.tokenizer``."""
    hash_embeddings: HashEmbeddingConfig | None = None
    """Hash embeddings to add to those of the ids, as in a BLT; null for none."""

    @property
    def can_score(self) -> bool:
        """Whether it has a finite window and reads bytes."""
        return self.window is not None and self.vocab_size == VOCAB_SIZE

    @field_validator("hash_embeddings")
    @classmethod
    def _no_sizes_are_none(cls, value: HashEmbeddingConfig | None) -> HashEmbeddingConfig | None:
        return value if value and value.sizes else None


class LocalConfig(BlockConfig):
    """The byte-level encoder and decoder of a BLT, whose blocks have the same configuration."""

    encoder_layers: Positive = 1
    decoder_layers: Positive
    window: Positive | None = 512

    def stack(self, num_layers: int) -> StackConfig:
        """Return the configuration of one of the two stacks."""
        block = {name: getattr(self, name) for name in BlockConfig.model_fields}
        return StackConfig(**block, num_layers=num_layers)


class CrossAttentionConfig(Node):
    """Cross-attention between bytes and patches."""

    slots: Positive = 2
    """Vectors per patch (k in the paper)."""
    num_heads: Positive
    encoder: Literal["none", "last", "all"] = "last"
    """Encoder layers after which the patches attend to their bytes."""
    decoder: Literal["none", "first", "all"] = "all"
    """Decoder layers before which the bytes attend to their latent; with ``none`` the projected
    latent is added to the byte states."""
    queries: Literal["pooled", "learned"] = "pooled"
    """Initial queries of a patch: max-pooled byte states, or one learned set for all patches."""
    residual: Literal["single", "doubled"] = "doubled"
    """``single``: ``x + out``, as in the paper; ``doubled``: ``2 x + out``, as in the released
    checkpoints. Small models train equally well with either (docs/log.md); only the second can be
    exported to ``transformers``."""


class VocabularyConfig(Node):
    """Pieces of text with vectors of their own, from a token model."""

    size: Positive
    """Pieces."""
    nodes: Annotated[Int, Field(ge=2)]
    """Nodes of their trie: distinct beginnings of pieces, the empty one included."""
    widest: Annotated[Int, Field(ge=1, le=256)]
    """Most bytes that follow one of them."""
    tied: bool = True
    """Whether the same vectors read and predict pieces."""


@MODELS.add
class BLTConfig(ModelConfig):
    """A Byte Latent Transformer."""

    has_patches: ClassVar[bool] = True
    named_parts: ClassVar[tuple[str, ...]] = (
        *ModelConfig.named_parts,
        "encoder",
        "global",
        "decoder",
        "vocabulary",
    )

    kind: Literal["blt"] = "blt"
    local: LocalConfig
    global_model: StackConfig
    cross_attention: CrossAttentionConfig
    hash_embeddings: HashEmbeddingConfig = HashEmbeddingConfig()
    vocabulary: VocabularyConfig | None = None
    """Pieces that patches are read as and latents predict, besides encoder and decoder; null for
    none, as in the paper. Made by ``bytelm distil``."""

    @property
    def encoder_cross_layers(self) -> int:
        """Number of encoder layers that have cross-attention."""
        layers = {"none": 0, "last": 1, "all": self.local.encoder_layers}
        return layers[self.cross_attention.encoder]

    @property
    def decoder_cross_layers(self) -> int:
        """Number of decoder layers that have cross-attention."""
        layers = {"none": 0, "first": 1, "all": self.local.decoder_layers}
        return layers[self.cross_attention.decoder]

    @model_validator(mode="after")
    def _queries_fit(self) -> "BLTConfig":
        if self.cross_attention.num_heads > self.local.dim:
            raise ValueError(
                f"cross_attention.num_heads {self.cross_attention.num_heads} exceeds local.dim "
                f"{self.local.dim}: lower it"
            )
        learned = self.cross_attention.queries == "learned"
        if learned and self.cross_attention.encoder == "none":
            raise ValueError(
                "learned queries need encoder cross-attention to see any byte: set "
                "cross_attention.encoder to last or all"
            )
        return self


class NgramConfig(Node):
    """An n-gram scorer to fit: next-byte entropies by context, found by counting."""

    kind: Literal["ngram"] = "ngram"
    max_order: Positive = 5
    """Longest context, in bytes."""
    min_count: Positive = 4
    """Occurrences below which a context falls back to a shorter one."""
    max_contexts: Positive = 131_072
    """Contexts kept per order, most frequent first."""
    max_bytes: Positive = 16_000_000
    """Bytes of text to count; a larger corpus is sampled."""


@SCORERS.add
class FittedNgramConfig(Node):
    """A fitted n-gram scorer."""

    kind: Literal["fitted_ngram"] = "fitted_ngram"
    max_order: Positive
    num_contexts: Annotated[Int, Field(ge=0)]


@open_node
class ScorerConfig(Node):
    """The model that computes the entropies of a patching rule."""

    model: Annotated[Node, SCORERS]
    reset_at_newline: bool = False
    """Whether a newline begins a new context (paper section 4.4)."""
