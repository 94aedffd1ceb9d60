"""Parameters, FLOPs and memory of a model by part."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from bytelm.accounting import published
from bytelm.accounting.exact import (
    TRAINING_FACTOR,
    DecodeCost,
    cache_sizes,
    decode_costs,
    forward_flops,
    parameters_by_part,
)
from bytelm.codec import VOCAB_SIZE
from bytelm.config import CalibratedPatching, ModelConfig, Node, Recipe
from bytelm.errors import ConfigError

SCORER = "scorer"
"""Name of the part for a scorer."""


class PartCost(NamedTuple):
    """Costs of one part, or the sum of several; FLOPs are per byte."""

    parameters: int
    linear: float
    """Forward FLOPs of matrix products with weights."""
    attention: float
    """Forward FLOPs of products of queries with keys and of weights with values."""
    training: float
    """Training FLOPs: forward and backward passes."""
    decode: DecodeCost
    cache: int
    """Bytes of memory that a session keeps."""

    @property
    def forward(self) -> float:
        """Forward FLOPs per byte."""
        return self.linear + self.attention


class Breakdown(NamedTuple):
    """Costs of a recipe's model, by part."""

    parts: dict[str, PartCost]
    """Costs by part, with :data:`SCORER` if a scorer was requested."""
    published: dict[str, float]
    """Forward FLOPs per byte by the paper's formulas, for the parts that these have."""
    num_bytes: int
    num_patches: int
    """Patches in a row, or tokens for a token model; 0 for a byte model."""
    unit: Literal["patches", "tokens"] = "patches"

    @property
    def model(self) -> PartCost:
        """Costs without the scorer."""
        return total(cost for name, cost in self.parts.items() if name != SCORER)

    @property
    def everything(self) -> PartCost:
        """Costs including the scorer, if there is one."""
        return total(self.parts.values())


def break_down_recipe(
    recipe: Recipe,
    *,
    context: int | None = None,
    patch_size: float | None = None,
    element_size: int = 4,
    scorer: Node | None = None,
) -> Breakdown:
    """Return the costs of the model that a recipe trains.

    Args:
        recipe: recipe of a BLT, a byte or token transformer, or an entropy model.
        context: bytes in a row, and position of the byte that is generated; ``None`` for the
            recipe's row size.
        patch_size: mean bytes per patch of a BLT, or per token of a token model; ``None`` for the
            recipe's.
        element_size: bytes of memory per weight and per element of a cache during generation.
        scorer: configuration of the scorer to count as well.

    Raises:
        ConfigError: the model does not use patches or a scorer, or the patch size is unknown or out
            of range.
    """
    num_bytes = context or recipe.data.row_bytes
    if recipe.model.has_patches:
        return _break_down_patches(recipe, num_bytes, patch_size, element_size, scorer)
    if getattr(recipe.model, "vocab_size", VOCAB_SIZE) > VOCAB_SIZE:
        return _break_down_tokens(recipe.model, num_bytes, patch_size, element_size)
    for option, value in (("--patch-size", patch_size), ("--scorer", scorer)):
        if value is not None:
            raise ConfigError(f"a {recipe.model.kind} model has no patches: leave out {option}")
    parts = break_down(recipe.model, num_bytes, element_size=element_size)
    return Breakdown(parts, published.per_byte(recipe.model, num_bytes, 1.0), num_bytes, 0)


def _break_down_patches(
    recipe: Recipe,
    num_bytes: int,
    patch_size: float | None,
    element_size: int,
    scorer: Node | None,
) -> Breakdown:
    assert recipe.patching is not None
    if scorer is not None and not isinstance(recipe.patching, CalibratedPatching):
        raise ConfigError(f"{recipe.patching.kind} patches need no scorer: leave out --scorer")
    size = recipe.patching.planned_size if patch_size is None else patch_size
    if size is None:
        raise ConfigError(
            f"the size of {recipe.patching.kind} patches depends on the text: give it, for example "
            "--patch-size 6"
        )
    if not 1 <= size <= num_bytes:
        raise ConfigError(
            f"a patch size of {size:g} bytes is out of range: choose one between 1 and the context "
            f"of {num_bytes:,} bytes"
        )
    num_patches = round(num_bytes / size)
    parts = break_down(
        recipe.model, num_bytes, num_patches, element_size=element_size, scorer=scorer
    )
    return Breakdown(
        parts, published.per_byte(recipe.model, num_bytes, size), num_bytes, num_patches
    )


def _break_down_tokens(
    config: ModelConfig, num_bytes: int, token_size: float | None, element_size: int
) -> Breakdown:
    """Return the costs of a token model per byte."""
    if token_size is None or not 1 <= token_size <= num_bytes:
        raise ConfigError(
            "the size of tokens depends on the tokenizer and the text: give it in bytes, between 1 "
            f"and {num_bytes:,}, for example --patch-size 3.7"
        )
    num_tokens = round(num_bytes / token_size)
    share = num_tokens / num_bytes
    parts = {
        name: cost._replace(
            linear=cost.linear * share,
            attention=cost.attention * share,
            training=cost.training * share,
            decode=DecodeCost(*(one * share for one in cost.decode)),
        )
        for name, cost in break_down(config, num_tokens, element_size=element_size).items()
    }
    formula = published.per_byte(config, num_bytes, token_size)
    return Breakdown(parts, formula, num_bytes, num_tokens, "tokens")


def break_down(
    config: Node,
    num_bytes: int,
    num_patches: int = 0,
    *,
    element_size: int,
    scorer: Node | None = None,
) -> dict[str, PartCost]:
    """Return the costs of a model by part, with its scorer as one more part.

    The entropies are computed once, before training, so a scorer is run forward only. The look-ups
    of an n-gram scorer cost no FLOPs.

    Args:
        config: configuration of the model.
        num_bytes: bytes in a row, and position of the byte that is generated.
        num_patches: patches among them; not used by a plain transformer.
        element_size: bytes of memory per weight and per element of a cache during generation.
        scorer: configuration of the scorer, counted as :data:`SCORER`.
    """
    parts = _parts(config, num_bytes, num_patches, element_size)
    if scorer is not None:
        cost = total(_parts(scorer, num_bytes, 0, element_size).values())
        parts[SCORER] = cost._replace(training=cost.forward)
    return parts


def total(parts: Iterable[PartCost]) -> PartCost:
    """Return the sum of the costs of several parts."""
    parts = list(parts)
    return PartCost(
        parameters=sum(part.parameters for part in parts),
        linear=math.fsum(part.linear for part in parts),
        attention=math.fsum(part.attention for part in parts),
        training=math.fsum(part.training for part in parts),
        decode=DecodeCost(
            flops=math.fsum(part.decode.flops for part in parts),
            weights_read=math.fsum(part.decode.weights_read for part in parts),
            cache_read=math.fsum(part.decode.cache_read for part in parts),
        ),
        cache=sum(part.cache for part in parts),
    )


def _parts(
    config: Node, num_bytes: int, num_patches: int, element_size: int
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
