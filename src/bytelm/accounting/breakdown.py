"""Where a model's parameters, FLOPs and memory go: every count beside every other, by part."""

from collections.abc import Iterable
from typing import NamedTuple

from bytelm.accounting.exact import (
    TRAINING_FACTOR,
    DecodeCost,
    cache_sizes,
    decode_costs,
    forward_flops,
    parameters_by_part,
)
from bytelm.config import BLTConfig, TransformerConfig


class PartCost(NamedTuple):
    """One part, or several added up. FLOPs are per byte."""

    parameters: int
    linear: float
    """Forward FLOPs of matrix products with weights."""
    attention: float
    """Forward FLOPs of products of queries with keys and of weights with values."""
    training: float
    """FLOPs of all passes over a byte while training."""
    decode: DecodeCost
    cache: int
    """Bytes of memory that a session keeps."""

    @property
    def forward(self) -> float:
        """Forward FLOPs per byte."""
        return self.linear + self.attention


def break_down(
    config: BLTConfig | TransformerConfig,
    num_bytes: int,
    num_patches: int = 0,
    *,
    element_size: int,
    scorer: TransformerConfig | None = None,
) -> dict[str, PartCost]:
    """Every cost of a model by part, and its scorer's as one more part.

    The scorer's entropies are made once, before training, so a byte passes forward through it and
    never back.

    Args:
        config: of the model.
        num_bytes: bytes in a row, and position of the byte that is generated.
        num_patches: patches among them; not used by a plain transformer.
        element_size: bytes of memory of a weight or an element of a cache while generating.
        scorer: of the transformer that yields the entropies, to be counted as ``"scorer"``.
    """
    parts = _parts(config, num_bytes, num_patches, element_size)
    if scorer is not None:
        cost = total(_parts(scorer, num_bytes, 0, element_size).values())
        parts["scorer"] = cost._replace(training=cost.forward)
    return parts


def total(parts: Iterable[PartCost]) -> PartCost:
    """All parts together."""
    parts = list(parts)
    return PartCost(
        parameters=sum(part.parameters for part in parts),
        linear=sum(part.linear for part in parts),
        attention=sum(part.attention for part in parts),
        training=sum(part.training for part in parts),
        decode=DecodeCost(
            flops=sum(part.decode.flops for part in parts),
            weights_read=sum(part.decode.weights_read for part in parts),
            cache_read=sum(part.decode.cache_read for part in parts),
        ),
        cache=sum(part.cache for part in parts),
    )


def _parts(
    config: BLTConfig | TransformerConfig, num_bytes: int, num_patches: int, element_size: int
) -> dict[str, PartCost]:
    parameters = parameters_by_part(config)
    decode = decode_costs(config, num_bytes, num_patches, element_size=element_size)
    caches = cache_sizes(config, num_bytes, num_patches, element_size=element_size)
    return {
        name: PartCost(
            parameters=parameters[name],
            linear=flops.linear / num_bytes,
            attention=flops.attention / num_bytes,
            training=TRAINING_FACTOR * flops.total / num_bytes,
            decode=decode[name],
            cache=caches[name],
        )
        for name, flops in forward_flops(config, num_bytes, num_patches).items()
    }
