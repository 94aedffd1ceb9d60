"""Configuration of training runs and of saved models."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from bytelm.config.kinds import Int, Kinds, Node, open_node
from bytelm.config.model import MODELS, SCORERS, ModelConfig, NgramConfig, Positive, ScorerConfig
from bytelm.config.patching import RULES, PatchingConfig

Seed = Annotated[Int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Packing = Literal["balanced", "in-order"]
"""How rows of patches are filled: up to both budgets, or by spans in their order."""
SAVED: Kinds[Node] = Kinds("model", MODELS, SCORERS)
"""Models that a checkpoint may hold."""


@open_node
class ModelDescription(Node):
    """Description of a saved model, complete enough to build it without its weights."""

    model: Annotated[Node, SAVED]
    patching: Annotated[PatchingConfig, RULES] | None = None
    scorer: ScorerConfig | None = None
    tokens: bool = False
    """Whether ids are byte-pair tokens; the tokenizer is then stored with the weights."""
    context_bytes: Positive | None = None
    """Longest context that the model was trained with, in bytes."""


class InitConfig(Node):
    """The weights that a run begins with, instead of random ones (docs/fine-tuning.md)."""

    model_config = ConfigDict(serialize_by_alias=True)

    checkpoint: str = Field(alias="from")
    """Folder of a checkpoint or a training run; the key is ``from``."""
    parts: Annotated[list[str], Field(min_length=1)] | None = None
    """Parts to take, such as ``[embeddings, encoder]``; null for all. The others are random."""


class DataConfig(Node):
    """The data of a run, and how it is packed into rows."""

    path: str | None = None
    """Folder made by ``bytelm data prepare``; required to train."""
    tokenizer: str | None = None
    """File made by ``bytelm data tokenizer``, for a transformer of tokens; null for bytes."""
    row_bytes: Positive = 8192
    """Bytes in a row: the longest context."""
    row_patches: Positive | None = None
    """Patches (or tokens) in a row; null to derive it from ``row_bytes`` and their mean size."""
    rows_per_step: Positive = 8
    """Rows in an optimiser step."""
    packing: Packing | None = None
    """How rows of patches are filled. in-order: by spans in their order, until bytes or patches are
    used up; a tenth of either is padding. balanced: by spans of long and of short patches, so that
    both are used up. null for balanced, or for what the run began with."""
    mixture: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """Relative shares of bytes by source; null for the shares of the data."""
    verify: bool = True
    """Check the hash of every shard before training."""

    @property
    def room_margin(self) -> float:
        """Ratio of a row's room for patches or tokens to those that its bytes need on average.

        Rows that are filled in order need more room; those of tokens are closed by it.
        """
        return 1.1 if self.packing == "in-order" and self.tokenizer is None else 1.0


class Cooldown(Node):
    """Steps of a cooldown: the learning rate falls from step ``start`` until training ends."""

    start: Annotated[Int, Field(ge=0)]
    """Number of steps before the cooldown."""
    end: Positive
    """Number of steps of the run."""


class OptimizerConfig(Node):
    """AdamW with linear warm-up and then cosine decay (paper section 4.8), or wsd.

    wsd (warm-up, stable, decay) keeps the peak learning rate until the cooldown, so that its end
    can be decided while the run is in progress (:func:`bytelm.training.optim.learning_rate`).
    """

    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_steps: Annotated[Int, Field(ge=0)] = 2000
    schedule: Literal["cosine", "wsd"] = "cosine"
    cooldown: Literal["1-sqrt", "linear"] = "1-sqrt"
    """Shape of the cooldown of wsd."""
    cooldown_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps in the cooldown of wsd, unless ``cooldowns`` says."""
    cooldowns: list[Cooldown] | None = None
    """Cooldown of wsd as decided during a run and recorded in its checkpoints; a later one replaces
    the end of the one before it."""
    final_ratio: Fraction = 0.0
    """Learning rate of the last step, relative to the peak."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    lr_multipliers: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Learning rate of a part relative to ``learning_rate``, such as ``{global: 0.1}``; 1 for parts
    that are not named."""
    freeze: list[str] = Field(default_factory=list)
    """Parts that are not trained, such as ``[global]``."""

    @model_validator(mode="after")
    def _has_the_cooldown_that_it_sets(self) -> "OptimizerConfig":
        for name in ("cooldown", "cooldown_fraction", "cooldowns"):
            default = type(self).model_fields[name].default
            if self.schedule != "wsd" and getattr(self, name) != default:
                raise ValueError(f"{name} needs optimizer.schedule=wsd: set both or neither")
        return self


class TrainConfig(Node):
    """The training loop."""

    steps: Positive
    micro_rows: Positive | None = None
    """Rows in a forward pass; null for all rows of a step."""
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 on the CPU."""
    compile: bool | None = None
    """Whether to use torch.compile; null for CUDA only."""
    compile_blocks: bool = False
    """Compile each transformer block by itself instead of the whole model, which takes less time;
    several ranks always do."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """block: remember only the inputs of blocks and repeat their forward pass in the backward pass;
    selective: remember the results of matrix products and attention as well."""
    shard_ranks: Positive | None = None
    """Ranks that share one copy of the weights, moments and gradients; null for all ranks, 1 for a
    copy on every rank. Set to the GPUs of a node, weights are gathered within nodes (HSDP)."""
    reshard: bool = True
    """Free the gathered weights of a block after its forward pass, and gather them again for the
    backward pass: less memory, more communication."""
    max_skipped: Annotated[Int, Field(ge=0)] = 0
    """Steps in a row whose update may be skipped because the loss or its gradient is not finite, or
    because of ``max_rise``; one more ends the run."""
    max_rise: Annotated[float, Field(gt=0)] | None = None
    """Nats by which the loss of a step may exceed the average of those before; null for any."""
    hang_seconds: Annotated[float, Field(gt=0)] | None = 1800.0
    """Seconds without progress after which several ranks abort, naming the one that hangs; null for
    never. Compilation counts."""
    peak_flops: Annotated[float, Field(gt=0)] | None = None
    """Peak FLOP/s of a device, to report model FLOPs utilisation (mfu); null for that of known
    GPUs."""
    log_every: Positive = 10
    validate_every: Positive = 500
    validation_bytes: Positive = 1_000_000
    """Bytes of held-out text evaluated at each validation."""
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    tensorboard: bool = False
    """Earlier name of ``track.tensorboard``."""

    def precision_on(self, device: str) -> str:
        """Return the precision of computation on a type of device: float32 or bfloat16."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if device == "cuda" else "float32"


class WandbConfig(Node):
    """A run of Weights & Biases."""

    project: str
    entity: str | None = None
    """User or team; null for the default one."""
    name: str | None = None
    """Name of the run; null for that of its folder."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline: to upload later with ``wandb sync``; null for that of WANDB_MODE."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of :class:`bytelm.tracking.WandbMetrics`."""
        return {
            "project": self.project,
            "entity": self.entity,
            "name": self.name,
            "mode": self.mode,
        }


class TrackConfig(Node):
    """Trackers that receive the metrics of ``metrics.jsonl`` as well."""

    tensorboard: bool = False
    wandb: WandbConfig | None = None


@open_node
class Recipe(Node):
    """Complete description of a training run."""

    model: Annotated[ModelConfig, MODELS]
    patching: Annotated[PatchingConfig, RULES] | None = None
    init: InitConfig | None = None
    """Weights to begin with; null for random ones."""
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    track: TrackConfig = TrackConfig()

    @property
    def row_length(self) -> int:
        """Ids in a padded row: bytes, or the budget of tokens."""
        data = self.data
        return data.row_bytes if data.tokenizer is None else data.row_patches or 0

    @model_validator(mode="after")
    def _cooldowns_fit(self) -> "Recipe":
        cooldowns = self.optimizer.cooldowns
        if cooldowns is None:
            return self
        starts = [cooldown.start for cooldown in cooldowns]
        if not starts or starts != sorted(set(starts)) or any(c.end <= c.start for c in cooldowns):
            raise ValueError(
                "optimizer.cooldowns must start one after the other, and each end after its start"
            )
        if cooldowns[-1].end != self.train.steps:
            raise ValueError(
                f"optimizer.cooldowns ends at step {cooldowns[-1].end}, but train.steps is "
                f"{self.train.steps}"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        model = self.model
        if model.has_patches and self.patching is None:
            raise ValueError(
                f"a {model.kind} model needs a patching section: add one, such as "
                "patching.kind=entropy"
            )
        if not model.has_patches and self.patching is not None:
            raise ValueError(f"a {model.kind} model has no patches: remove patching")
        if not model.reads_tokens and self.data.tokenizer is not None:
            raise ValueError(f"a {model.kind} model reads bytes: remove data.tokenizer")
        for setting, named in {
            "optimizer.lr_multipliers": self.optimizer.lr_multipliers,
            "optimizer.freeze": self.optimizer.freeze,
            "init.parts": (self.init and self.init.parts) or (),
        }.items():
            if unknown := sorted(set(named) - set(model.named_parts)):
                raise ValueError(
                    f"{setting} names {unknown[0]!r}; of a {model.kind} model it can name "
                    f"{', '.join(model.named_parts)}"
                )
        return self


class NgramDataConfig(Node):
    """The data that an n-gram scorer is fitted on."""

    path: str | None = None
    """Folder made by ``bytelm data prepare``; required to count."""
    verify: bool = True
    """Check the hash of every shard before counting."""


class NgramRecipe(Node):
    """Complete description of an n-gram scorer, which is fitted by counting."""

    model: NgramConfig
    data: NgramDataConfig = NgramDataConfig()
    seed: Seed = 0
    """Seed of the sample that is counted if there is more text than ``model.max_bytes``."""
