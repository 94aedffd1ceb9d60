"""Names of the tensors of a BLT in other projects' formats.

The two public formats have the same tensors under different names. Each tensor of bytelm is one of
theirs, or several stacked along the first axis (queries, keys and values; gate and up; the hash
embeddings of each size), so one map from bytelm's names to theirs converts in both directions
without arithmetic. In this package "ours" and "theirs" mean the names of bytelm and of the other
project.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from bytelm.config import BLTConfig, StackConfig

NameMap = dict[str, dict[str, int]]
"""Our name -> the names of the parts it is made of, in order, and their relative sizes."""


def part_sizes(parts: Mapping[str, int], total: int) -> list[int]:
    """Return the sizes, along the first axis, of the parts of one of our tensors."""
    unit = total // sum(parts.values())
    return [unit * size for size in parts.values()]


class Naming(NamedTuple):
    """Names of tensors in one project's format."""

    block: Mapping[str, tuple[str, ...]]
    """Leaves of a transformer block."""
    cross_attention: Mapping[str, tuple[str, ...]]
    """Leaves of a cross-attention layer."""
    single: Mapping[str, str]
    """Tensors of the BLT that are not in a layer."""
    scorer: Mapping[str, str]
    """Tensors of the entropy model that are not in a layer."""
    parts: Mapping[str, str]
    """Our parts with layers -> theirs."""
    hash_embeddings: Callable[[int], tuple[str, ...]]
    """Names of the hash embeddings, given the number of sizes times functions."""


def blt_names(config: BLTConfig, naming: Naming) -> NameMap:
    """Return the names of the tensors of a BLT."""
    names: NameMap = {}
    hashed = config.hash_embeddings
    if num_hashes := len(hashed.sizes) * hashed.functions:
        equal = dict.fromkeys(naming.hash_embeddings(num_hashes), 1)
        names["encoder.embedding.ngrams.weight"] = equal
    names |= {f"{ours}.weight": {f"{theirs}.weight": 1} for ours, theirs in naming.single.items()}
    if config.cross_attention.slots * config.local.dim == config.global_model.dim:
        del names["encoder.patch_projection.weight"]
    local = config.local
    stacks = {
        "encoder.blocks": local.stack(local.encoder_layers),
        "global_model.blocks": config.global_model,
        "decoder.blocks": local.stack(local.decoder_layers),
    }
    for part, stack in stacks.items():
        names |= _blocks(part, naming.parts[part], stack, naming)
    depths = {
        "encoder.cross_attention": config.encoder_cross_layers,
        "decoder.cross_attention": config.decoder_cross_layers,
    }
    for part, depth in depths.items():
        names |= _layers(part, naming.parts[part], depth, naming.cross_attention)
    return names


def scorer_names(config: StackConfig, naming: Naming) -> NameMap:
    """Return the names of the tensors of an entropy model's transformer."""
    names = {f"{ours}.weight": {f"{theirs}.weight": 1} for ours, theirs in naming.scorer.items()}
    return names | _blocks("blocks", naming.parts["scorer.blocks"], config, naming)


def _blocks(ours: str, theirs: str, stack: StackConfig, naming: Naming) -> NameMap:
    heads = {"attention.qkv": (stack.num_heads, stack.kv_heads, stack.kv_heads)}
    return _layers(ours, theirs, stack.num_layers, naming.block, heads)


def _layers(
    ours: str,
    theirs: str,
    depth: int,
    leaves: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> NameMap:
    def pairs() -> Iterator[tuple[str, dict[str, int]]]:
        for layer in range(depth):
            for leaf, parts in leaves.items():
                sources = [f"{theirs}.{layer}.{part}.weight" for part in parts]
                shares = sizes.get(leaf, (1,) * len(parts))
                yield f"{ours}.{layer}.{leaf}.weight", dict(zip(sources, shares, strict=True))

    return dict(pairs())
