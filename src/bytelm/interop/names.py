"""How other projects name the tensors of a BLT, and how theirs make ours.

The two public formats hold the same tensors under different names. Each of ours is one of theirs,
or several stacked along their first axis in equal parts (queries, keys and values; gate and up;
the tables of hash n-grams), so one map, from our name to theirs, converts either way without
arithmetic.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from bytelm.config import BLTConfig, StackConfig

NameMap = dict[str, tuple[str, ...]]
"""Our name -> the names of the parts it is made of, in order."""


class Naming(NamedTuple):
    """The names one project uses."""

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
    ngram_tables: Callable[[int], tuple[str, ...]]
    """Names of what holds the given number of tables of hash n-grams."""


def blt_names(config: BLTConfig, naming: Naming) -> NameMap:
    """Names of the tensors of a BLT."""
    names: NameMap = {}
    if num_tables := len(config.ngrams.sizes) * config.ngrams.functions:
        names["encoder.embedding.ngrams.weight"] = naming.ngram_tables(num_tables)
    names |= {f"{ours}.weight": (f"{theirs}.weight",) for ours, theirs in naming.single.items()}
    if config.cross_attention.slots * config.local.dim == config.global_model.dim:
        del names["encoder.patch_projection.weight"]
    local, cross = config.local, config.cross_attention
    depths = {
        "encoder.blocks": local.encoder_layers,
        "global_model.blocks": config.global_model.num_layers,
        "decoder.blocks": local.decoder_layers,
    }
    for part, depth in depths.items():
        names |= _layers(part, naming.parts[part], depth, naming.block)
    depths = {
        "encoder.cross_attention": {"none": 0, "last": 1, "all": local.encoder_layers}[
            cross.encoder
        ],
        "decoder.cross_attention": {"none": 0, "first": 1, "all": local.decoder_layers}[
            cross.decoder
        ],
    }
    for part, depth in depths.items():
        names |= _layers(part, naming.parts[part], depth, naming.cross_attention)
    return names


def scorer_names(config: StackConfig, naming: Naming) -> NameMap:
    """Names of the tensors of an entropy model's transformer."""
    names = {f"{ours}.weight": (f"{theirs}.weight",) for ours, theirs in naming.scorer.items()}
    names |= _layers("blocks", naming.parts["scorer.blocks"], config.num_layers, naming.block)
    return names


def _layers(ours: str, theirs: str, depth: int, leaves: Mapping[str, tuple[str, ...]]) -> NameMap:
    def pairs() -> Iterator[tuple[str, tuple[str, ...]]]:
        for layer in range(depth):
            for leaf, parts in leaves.items():
                sources = tuple(f"{theirs}.{layer}.{part}.weight" for part in parts)
                yield f"{ours}.{layer}.{leaf}.weight", sources

    return dict(pairs())
