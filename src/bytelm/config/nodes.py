"""The nodes of the configuration tree: frozen, strict about names and types."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Node(BaseModel):
    """Base of every configuration node: immutable, strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StackConfig(Node):
    """A stack of transformer blocks."""

    dim: Positive
    num_layers: Positive
    num_heads: Positive
    ffn_dim: Positive
    """Width of the feed-forward's hidden layer."""
    rope_theta: Annotated[float, Field(gt=0)] = 500_000.0

    @model_validator(mode="after")
    def _heads_divide(self) -> "StackConfig":
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim {self.dim} must be num_heads {self.num_heads} times an even head dimension"
            )
        return self


class NgramEmbeddingConfig(Node):
    """Hash n-gram embeddings, of bytes or tokens; ``sizes: []`` leaves them out."""

    sizes: tuple[Annotated[int, Field(ge=2, le=32)], ...] = Field(
        default=(3, 4, 5, 6, 7, 8), strict=False
    )
    rows: Positive = 500_002
    functions: Annotated[int, Field(ge=1, le=11)] = 1
    combine: Literal["sum", "mean"] = "sum"


class TransformerConfig(StackConfig):
    """A plain transformer: entropy model, byte-level baseline, or baseline with a tokenizer."""

    kind: Literal["transformer"] = "transformer"
    window: Positive | None = None
    """Positions visible to one, itself included; null for all before it."""
    vocab_size: Annotated[int, Field(ge=260)] = 260
    """Ids: 260 for bytes, more for the tokens of ``data.tokenizer``."""
    ngrams: NgramEmbeddingConfig | None = None
    """Added to the embedding of each id, as in a BLT; null for none."""

    @field_validator("ngrams")
    @classmethod
    def _no_sizes_are_none(cls, ngrams: NgramEmbeddingConfig | None) -> NgramEmbeddingConfig | None:
        return ngrams if ngrams and ngrams.sizes else None


class NgramConfig(Node):
    """A table of next-byte entropies by context, made by counting."""

    kind: Literal["ngram"] = "ngram"
    max_order: Positive = 5
    """Longest context, in bytes."""
    min_count: Positive = 4
    """Contexts seen fewer times fall back to shorter ones."""
    max_contexts: Positive = 131_072
    """Contexts kept per order, most frequent first."""
    max_bytes: Positive = 16_000_000
    """Text counted; a corpus larger than this is sampled."""


class LocalConfig(Node):
    """The byte-level encoder and decoder of a BLT, which share their width."""

    dim: Positive
    num_heads: Positive
    ffn_dim: Positive
    encoder_layers: Positive = 1
    decoder_layers: Positive
    window: Positive | None = 512
    rope_theta: Annotated[float, Field(gt=0)] = 500_000.0

    def stack(self, num_layers: int) -> StackConfig:
        """The configuration of one of the two stacks."""
        return StackConfig(
            dim=self.dim,
            num_layers=num_layers,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            rope_theta=self.rope_theta,
        )


class CrossAttentionConfig(Node):
    """Where bytes and patches meet."""

    slots: Positive = 2
    """Vectors per patch (k in the paper)."""
    num_heads: Positive
    encoder: Literal["none", "last", "all"] = "last"
    """Encoder layers after which the patches attend to their bytes."""
    decoder: Literal["none", "first", "all"] = "all"
    """Decoder layers before which the bytes attend to their latent; with none it is added."""
    queries: Literal["pooled", "learned"] = "pooled"
    """First patch queries: max-pooled byte states, or one learned set for all patches."""
    residual: Literal["single", "doubled"] = "doubled"
    """The paper's ``x + out``, or the ``2 x + out`` of the released checkpoints. Small models train
    as well with either (docs/log.md); with the second they can be exported to ``transformers``."""


class BLTConfig(Node):
    """A Byte Latent Transformer."""

    kind: Literal["blt"] = "blt"
    local: LocalConfig
    global_model: StackConfig
    cross_attention: CrossAttentionConfig
    ngrams: NgramEmbeddingConfig = NgramEmbeddingConfig()

    @property
    def encoder_cross_layers(self) -> int:
        """Encoder layers that have cross-attention."""
        layers = {"none": 0, "last": 1, "all": self.local.encoder_layers}
        return layers[self.cross_attention.encoder]

    @property
    def decoder_cross_layers(self) -> int:
        """Decoder layers that have cross-attention."""
        layers = {"none": 0, "first": 1, "all": self.local.decoder_layers}
        return layers[self.cross_attention.decoder]

    @model_validator(mode="after")
    def _local_heads_divide(self) -> "BLTConfig":
        self.local.stack(1)
        if self.cross_attention.num_heads > self.local.dim:
            raise ValueError(
                f"cross_attention.num_heads {self.cross_attention.num_heads} exceeds local.dim "
                f"{self.local.dim}"
            )
        learned = self.cross_attention.queries == "learned"
        if learned and self.cross_attention.encoder == "none":
            raise ValueError("learned queries need encoder cross-attention to see any byte")
        return self


class PatchingBase(Node):
    """What all patching rules share."""

    max_length: Positive | None = None
    """Longest patch; null for no limit."""


class BytePatching(PatchingBase):
    """Every byte is a patch."""

    kind: Literal["byte"] = "byte"


class StaticPatching(PatchingBase):
    """Patches of a fixed length."""

    kind: Literal["static"] = "static"
    length: Positive


class SpacePatching(PatchingBase):
    """Patches end after space-like bytes."""

    kind: Literal["space"] = "space"


class CalibratedPatching(PatchingBase):
    """A rule whose threshold is given, or found for a wanted mean patch size."""

    patch_size: Annotated[float, Field(gt=1)] | None = None
    """Wanted mean bytes per patch; used where the threshold is null."""


class EntropyPatching(CalibratedPatching):
    """Global rule: a patch starts where the entropy exceeds a threshold."""

    kind: Literal["entropy"] = "entropy"
    threshold: float | None = None
    """In nats."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the threshold is still to be found."""
        return self.threshold is None


class MonotonicPatching(CalibratedPatching):
    """Approximate monotonic rule: a patch starts where the entropy rises by an increase."""

    kind: Literal["monotonic"] = "monotonic"
    increase: float | None = None
    """In nats."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the threshold is still to be found."""
        return self.increase is None


class CombinedPatching(CalibratedPatching):
    """Both rules at once; calibration moves the threshold."""

    kind: Literal["combined"] = "combined"
    threshold: float | None = None
    """In nats."""
    increase: float
    """In nats."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the threshold is still to be found."""
        return self.threshold is None


CalibratedConfig = EntropyPatching | MonotonicPatching | CombinedPatching
"""The rules that calibration can serve."""

PatchingConfig = Annotated[
    BytePatching
    | StaticPatching
    | SpacePatching
    | EntropyPatching
    | MonotonicPatching
    | CombinedPatching,
    Field(discriminator="kind"),
]


class TableConfig(Node):
    """The shape of a fitted n-gram table."""

    kind: Literal["table"] = "table"
    max_order: Positive
    num_contexts: Annotated[int, Field(ge=0)]


class ScorerConfig(Node):
    """What yields the entropies."""

    model: Annotated[TransformerConfig | TableConfig, Field(discriminator="kind")]
    reset_at_newline: bool = False
    """Whether a newline begins a new context (paper section 4.4)."""


class ModelDescription(Node):
    """All it takes to build a model: an untrained copy of what a checkpoint holds."""

    model: Annotated[TransformerConfig | BLTConfig | TableConfig, Field(discriminator="kind")]
    patching: PatchingConfig | None = None
    scorer: ScorerConfig | None = None
    tokens: bool = False
    """Whether ids are byte-pair tokens; the tokenizer then lies beside the weights."""
    context_bytes: Positive | None = None
    """Longest stretch of text the model was trained on."""


class DataConfig(Node):
    """What a run reads, and how it is cut into rows."""

    path: str | None = None
    """Folder made by ``bytelm data prepare``; required to train."""
    tokenizer: str | None = None
    """File made by ``bytelm data tokenizer``, for a transformer of tokens; null for bytes."""
    row_bytes: Positive = 8192
    """Bytes in a row: the longest context."""
    row_patches: Positive | None = None
    """Patches (or tokens) in a row; null for what their mean size makes of ``row_bytes``."""
    rows_per_step: Positive = 8
    """Rows in an optimiser step."""
    mixture: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """Share of bytes by source; null for what the data holds."""
    verify: bool = True
    """Check the hash of every shard before training."""


ModelPart = Literal["embeddings", "output", "encoder", "global", "decoder"]
"""Parts of a model that may learn at rates of their own: all look-up tables, the matrix that makes
logits, and the rest of each of the three models of a BLT."""


class OptimizerConfig(Node):
    """AdamW with linear warm-up and cosine decay (paper section 4.8)."""

    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    final_ratio: Fraction = 0.0
    """Learning rate at the last step, over the peak."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    rates: dict[ModelPart, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Learning rate of a part over ``learning_rate``, such as ``{global: 0.1}``; 1 if not named."""


class TrainConfig(Node):
    """The loop."""

    steps: Positive
    micro_rows: Positive | None = None
    """Rows in a forward pass; null for all of a step's at once."""
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 on CPU."""
    compile: bool | None = None
    """torch.compile; null for on CUDA only."""
    log_every: Positive = 10
    validate_every: Positive = 500
    validation_bytes: Positive = 1_000_000
    """Held-out text read at each validation."""
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    tensorboard: bool = False


class Recipe(Node):
    """Everything a training run is made of."""

    model: Annotated[TransformerConfig | BLTConfig, Field(discriminator="kind")]
    patching: PatchingConfig | None = None
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _patching_fits_model(self) -> "Recipe":
        if self.model.kind == "blt" and self.patching is None:
            raise ValueError("a blt model needs a patching section")
        if self.model.kind != "blt" and self.patching is not None:
            raise ValueError(f"a {self.model.kind} model has no patches: remove patching")
        if self.model.kind != "blt" and set(self.optimizer.rates) - {"embeddings", "output"}:
            raise ValueError(
                f"optimizer.rates of a {self.model.kind} model can name embeddings and output only"
            )
        if self.model.kind == "blt" and self.data.tokenizer is not None:
            raise ValueError("a blt model reads bytes: remove data.tokenizer")
        return self


class TableDataConfig(Node):
    """What a table is counted from."""

    path: str | None = None
    """Folder made by ``bytelm data prepare``; required to count."""
    verify: bool = True
    """Check the hash of every shard before counting."""


class TableRecipe(Node):
    """Everything an n-gram table is made of: it is counted, not trained."""

    model: NgramConfig
    data: TableDataConfig = TableDataConfig()
    seed: Seed = 0
    """Of the sample that is counted where there is more text than ``model.max_bytes``."""
