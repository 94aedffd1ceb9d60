"""The models of the parts, on their device from the start, and rows to feed them."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.parts.notes import Target
from bytelm import codec
from bytelm.config import (
    BLTConfig,
    CrossAttentionConfig,
    HashEmbeddingConfig,
    LocalConfig,
    StackConfig,
    TransformerConfig,
    load_recipe,
)
from bytelm.model.blt import BLT
from bytelm.model.layers import init_linear
from bytelm.model.transformer import Transformer
from bytelm.patching import Patches, build_patches

RECIPE, SCORER_RECIPE = "blt-1b", "entropy-100m"
PATCH_SIZE = 4.5
DOCUMENT_BYTES = 2000
IGNORED = -100

TINY_BLT = BLTConfig(
    local=LocalConfig(dim=32, num_heads=2, ffn_dim=48, decoder_layers=1, window=16),
    global_model=StackConfig(dim=48, num_layers=1, num_heads=2, ffn_dim=64),
    cross_attention=CrossAttentionConfig(num_heads=2),
    hash_embeddings=HashEmbeddingConfig(num_buckets=97),
)
MEDIUM_BLT = BLTConfig(
    local=LocalConfig(dim=256, num_heads=4, ffn_dim=768, decoder_layers=4, window=512),
    global_model=StackConfig(dim=512, num_layers=6, num_heads=8, ffn_dim=1536),
    cross_attention=CrossAttentionConfig(num_heads=4),
    hash_embeddings=HashEmbeddingConfig(num_buckets=2600),
)
TINY_SCORER = TransformerConfig(dim=32, num_layers=1, num_heads=2, ffn_dim=48, window=16)


def blt_config(target: Target, num_buckets: int | None = None) -> BLTConfig:
    """The recipe's model, perhaps with smaller hash embeddings."""
    config: Any = TINY_BLT if target.tiny else load_recipe(RECIPE).model
    if num_buckets is not None:
        hashed = config.hash_embeddings.model_copy(update={"num_buckets": num_buckets})
        config = config.model_copy(update={"hash_embeddings": hashed})
    return config


def plain_config(target: Target) -> TransformerConfig:
    """A byte transformer with the shape of the global model."""
    return TransformerConfig(**dict(blt_config(target).global_model))


def scorer_config(target: Target) -> TransformerConfig:
    """The entropy model."""
    config: Any = TINY_SCORER if target.tiny else load_recipe(SCORER_RECIPE).model
    return config


def row_bytes(target: Target) -> int:
    """Bytes in a row."""
    return 128 if target.tiny else 8192


def patch_budget(target: Target) -> int:
    """Patches that a row has room for: more than on average, since these rows are not packed."""
    return math.ceil(1.1 * row_bytes(target) / PATCH_SIZE)


def build(config: BLTConfig | TransformerConfig, device: str, seed: int = 0) -> Any:
    """A model made on its device, where large tables take seconds; all of it is random.

    What begins at 0 in training would hide what it should be compared by.
    """
    with torch.device(device):
        model = BLT(config) if isinstance(config, BLTConfig) else Transformer(config)
    generator = torch.Generator(device).manual_seed(seed)
    model.init_weights(generator)
    for parameter in model.parameters():
        if not parameter.any():
            init_linear(parameter, generator)
    return model


def num_parameters(model: nn.Module) -> int:
    """All of a model's parameters."""
    return sum(p.numel() for p in model.parameters())


class Batch(NamedTuple):
    """Packed rows of random documents, cut at random into patches."""

    ids: Tensor
    documents: Tensor
    next_boundary: Tensor
    num_patches: int

    def patches(self) -> Patches:
        """The patches, which a training step builds anew as well."""
        return build_patches(self.next_boundary, self.documents, self.num_patches)

    def loss(self, logits: Tensor) -> Tensor:
        """Cross-entropy of the ids after each."""
        targets = functional.pad(self.ids[:, 1:], (0, 1), value=IGNORED)
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )


def batches(target: Target, rows: int, num_bytes: int | None = None) -> Iterator[Batch]:
    """Endlessly many batches, no two the same."""
    length = num_bytes or row_bytes(target)
    budget = math.ceil(length * patch_budget(target) / row_bytes(target))
    shape, seed = (rows, length), 0
    while True:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(codec.OFFSET, codec.VOCAB_SIZE, shape, generator=generator)
        documents = (torch.rand(shape, generator=generator) < 1 / DOCUMENT_BYTES).long().cumsum(1)
        boundary = torch.rand(shape, generator=generator) < 1 / PATCH_SIZE
        most = int(build_patches(boundary, documents).counts.max())
        seed += 1
        if most <= budget:
            ids, documents, boundary = (x.to(target.device) for x in (ids, documents, boundary))
            yield Batch(ids, documents, boundary, budget)
