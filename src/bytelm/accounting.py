"""FLOPs and parameters, counted part by part from a model's configuration.

A multiply-add is 2 FLOPs; only matrix products and attention are counted (embedding and n-gram
look-ups are not arithmetic; norms, rotations and softmax are below 1%). Attention counts the pairs
that the mask admits in a row that is one document: position ``i`` of a window ``w`` sees
``min(i + 1, w)`` keys. Training costs three times the forward pass.

The paper's own formulas (section 4.5, appendix B) take a window as half used and leave out the
projections between bytes and patches, so ours come to 1 to 4% more for its models at a context of
8,192 bytes. The scorer is not part of a model's count: it is a model of its own.
"""

from typing import NamedTuple

from torch import nn

from bytelm.codec import VOCAB_SIZE
from bytelm.config import BLTConfig, StackConfig, TransformerConfig
from bytelm.model.blt import BLT
from bytelm.model.transformer import Transformer

TRAINING_FACTOR = 3


class Flops(NamedTuple):
    """Forward FLOPs of one part over a row."""

    linear: int
    """Matrix products with weights."""
    attention: int
    """Products of queries with keys and of weights with values."""

    @property
    def total(self) -> int:
        """Both together."""
        return self.linear + self.attention


def forward_flops(
    config: BLTConfig | TransformerConfig, num_bytes: int, num_patches: int = 0
) -> dict[str, Flops]:
    """Forward FLOPs of one row by part.

    Args:
        config: of the model.
        num_bytes: bytes in the row (or tokens, of a model of tokens), padding included where it is
            computed.
        num_patches: patches in the row, likewise; not used by a plain transformer.
    """
    if isinstance(config, TransformerConfig):
        return {
            "transformer": _stack(config, num_bytes, config.window),
            "output": Flops(_linear(num_bytes, config.dim, config.vocab_size), 0),
        }
    local, cross, global_dim = config.local, config.cross_attention, config.global_model.dim
    inner = cross.num_heads * (local.dim // cross.num_heads)
    encoder_cross = {"none": 0, "last": 1, "all": local.encoder_layers}[cross.encoder]
    decoder_cross = {"none": 0, "first": 1, "all": local.decoder_layers}[cross.decoder]
    slots = num_patches * cross.slots
    decoder_slots = cross.slots if decoder_cross else 1
    width = cross.slots * local.dim
    pooling = _linear(num_patches, local.dim, width) if cross.queries == "pooled" else 0
    if width != global_dim:
        pooling += _linear(num_patches, width, global_dim)
    # A byte and a slot of its patch: each pair costs a score and a weighted value.
    pairs = Flops(0, 4 * num_bytes * cross.slots * inner)

    def crossing(queries: int, keys: int) -> Flops:
        projections = _linear(queries, local.dim, inner) + _linear(keys, local.dim, 2 * inner)
        return Flops(projections + _linear(queries, inner, local.dim), pairs.attention)

    return {
        "encoder": _stack(local.stack(local.encoder_layers), num_bytes, local.window),
        "encoder cross-attention": _times(crossing(slots, num_bytes), encoder_cross),
        "patch projections": Flops(
            pooling + _linear(num_patches, global_dim, decoder_slots * local.dim), 0
        ),
        "global": _stack(config.global_model, num_patches, None),
        "decoder": _stack(local.stack(local.decoder_layers), num_bytes, local.window),
        "decoder cross-attention": _times(crossing(num_bytes, slots), decoder_cross),
        "output": Flops(_linear(num_bytes, local.dim, VOCAB_SIZE), 0),
    }


def training_flops(
    config: BLTConfig | TransformerConfig, num_bytes: int, num_patches: int = 0
) -> int:
    """FLOPs of a forward and a backward pass over one row."""
    parts = forward_flops(config, num_bytes, num_patches)
    return TRAINING_FACTOR * sum(part.total for part in parts.values())


def parameter_counts(model: BLT | Transformer) -> dict[str, int]:
    """Parameters by part; embeddings apart, since they cost no FLOPs."""
    if isinstance(model, Transformer):
        return {
            "embedding": _count(model.embedding),
            "transformer": _count(model.blocks) + _count(model.norm),
            "output": _count(model.output),
        }
    embedding = model.encoder.embedding
    return {
        "byte embedding": _count(embedding.bytes),
        "n-gram embeddings": 0 if embedding.ngrams is None else _count(embedding.ngrams),
        "encoder": _count(model.encoder) - _count(embedding),
        "global": _count(model.global_model),
        "decoder": _count(model.decoder),
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _linear(positions: int, inputs: int, outputs: int) -> int:
    return 2 * positions * inputs * outputs


def _times(flops: Flops, count: int) -> Flops:
    return Flops(flops.linear * count, flops.attention * count)


def _stack(config: StackConfig, length: int, window: int | None) -> Flops:
    """A stack of blocks over a row."""
    dim = config.dim
    weights = 4 * dim * dim + 3 * dim * config.ffn_dim
    pairs = _visible_pairs(length, window)
    return _times(Flops(2 * length * weights, 4 * pairs * dim), config.num_layers)


def _visible_pairs(length: int, window: int | None) -> int:
    """``sum_i min(i + 1, window)`` over a row."""
    ramp = min(length, window or length)
    return ramp * (ramp + 1) // 2 + (length - ramp) * ramp
