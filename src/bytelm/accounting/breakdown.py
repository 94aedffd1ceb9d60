"""Where a model's parameters, FLOPs and memory go: every count beside every other, by part."""

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
"""The part that a scorer is."""


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


class Breakdown(NamedTuple):
    """All costs of a recipe's model."""

    parts: dict[str, PartCost]
    """By part; :data:`SCORER` is among them where a scorer was asked for."""
    published: dict[str, float]
    """The paper's forward FLOPs per byte, of the parts that its formulas have."""
    num_bytes: int
    num_patches: int
    """Or tokens, of a model of tokens; 0 where there are none."""
    unit: Literal["patches", "tokens"] = "patches"

    @property
    def model(self) -> PartCost:
        """Everything but the scorer."""
        return total(cost for name, cost in self.parts.items() if name != SCORER)

    @property
    def everything(self) -> PartCost:
        """With the scorer, if there is one."""
        return total(self.parts.values())


def break_down_recipe(
    recipe: Recipe,
    *,
    context: int | None = None,
    patch_size: float | None = None,
    element_size: int = 4,
    scorer: Node | None = None,
) -> Breakdown:
    """Costs of the model that a recipe trains.

    Args:
        recipe: of a BLT, a byte transformer or an entropy model.
        context: bytes in a row, and position of the byte that is generated; ``None`` for the
            recipe's rows.
        patch_size: mean bytes per patch of a BLT, or per token of a model of tokens; ``None`` for
            the recipe's.
        element_size: bytes of memory of a weight or an element of a cache while generating.
        scorer: of a BLT's entropies, to be counted as well.

    Raises:
        ConfigError: the model has no patches or no use for a scorer, or the patch size is not known
            or not possible.
    """
    num_bytes = context or recipe.data.row_bytes
    if recipe.model.has_patches:
        return _break_down_patches(recipe, num_bytes, patch_size, element_size, scorer)
    if getattr(recipe.model, "vocab_size", VOCAB_SIZE) > VOCAB_SIZE:
        return _break_down_tokens(recipe.model, num_bytes, patch_size, element_size)
    for option, value in (("--patch-size", patch_size), ("--scorer", scorer)):
        if value is not None:
            raise ConfigError(f"a {recipe.model.kind} has no patches: leave out {option}")
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
            f"how long {recipe.patching.kind} patches are depends on the text: say it, such as "
            "--patch-size 6"
        )
    if not 1 <= size <= num_bytes:
        raise ConfigError(
            f"patches of {size:g} bytes are not possible: choose a size between 1 and the context, "
            f"{num_bytes:,} bytes"
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
    """Return the costs of a model of tokens, those of a token divided by its bytes."""
    if token_size is None or not 1 <= token_size <= num_bytes:
        raise ConfigError(
            "how long tokens are depends on the tokenizer and the text: say how many bytes, at "
            f"most {num_bytes:,}, such as --patch-size 3.7"
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
    """Every cost of a model by part, and its scorer's as one more part.

    A scorer's entropies are made once, before training, so a byte passes forward through it and
    never back. An n-gram scorer is looked up, which costs no FLOPs.

    Args:
        config: of the model.
        num_bytes: bytes in a row, and position of the byte that is generated.
        num_patches: patches among them; not used by a plain transformer.
        element_size: bytes of memory of a weight or an element of a cache while generating.
        scorer: of what yields the entropies, to be counted as :data:`SCORER`.
    """
    parts = _parts(config, num_bytes, num_patches, element_size)
    if scorer is not None:
        cost = total(_parts(scorer, num_bytes, 0, element_size).values())
        parts[SCORER] = cost._replace(training=cost.forward)
    return parts


def total(parts: Iterable[PartCost]) -> PartCost:
    """All parts together."""
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
