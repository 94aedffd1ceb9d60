"""Build language models from their configuration, and register further kinds."""

from collections.abc import Callable
from functools import singledispatch
from typing import NamedTuple, TypeVar

import torch

from bytelm.config import (
    MODELS,
    BLTConfig,
    ModelConfig,
    ModelDescription,
    Node,
    ScorerConfig,
    TransformerConfig,
)
from bytelm.lm.kinds import ByteLM, CausalLM, PatchedLM, ScorerLM, TokenLM
from bytelm.model.blt import BLT
from bytelm.model.transformer import Transformer
from bytelm.patching import Patcher, Scorer, build_patcher
from bytelm.scoring import build_scorer
from bytelm.tokens import Tokenizer

ConfigT = TypeVar("ConfigT", bound=ModelConfig)


class Parts(NamedTuple):
    """The parts of a language model that are not its network."""

    patcher: Patcher | None = None
    scorer: Scorer | None = None
    tokenizer: Tokenizer | None = None


@singledispatch
def _build(config: Node, parts: Parts) -> CausalLM:
    # Scorers that are saved by themselves: the n-gram scorer, and registered kinds.
    return ScorerLM(build_scorer(ScorerConfig(model=config)))


def build_lm(
    description: ModelDescription,
    *,
    scorer: Scorer | None = None,
    tokenizer: Tokenizer | None = None,
) -> CausalLM:
    """Return a language model whose weights are not initialised.

    Args:
        description: description of the model.
        scorer: a loaded scorer; ``None`` to build the one described, without its weights.
        tokenizer: tokenizer of a token model.

    Raises:
        PatchingError: its patching rule has not been calibrated.
    """
    patcher = None
    if description.patching is not None:
        # Not on the meta device: a rule may hold tensors that no checkpoint restores.
        with torch.device("cpu"):
            patcher = build_patcher(description.patching)
    if scorer is None and description.scorer is not None:
        scorer = build_scorer(description.scorer)
    return _build(description.model, Parts(patcher, scorer, tokenizer))


def register_model(config: type[ConfigT], build: Callable[[ConfigT, Parts], CausalLM]) -> None:
    """Register a kind of model for recipes, checkpoints and commands.

    Register how its costs are counted with :func:`bytelm.accounting.register_parts`.

    Args:
        config: class of its configuration, with a ``kind`` of its own.
        build: returns the language model of a configuration and of the other parts.

    Raises:
        ConfigError: the kind is taken.
    """
    MODELS.add(config)
    _build.register(config, build)


def _transformer(config: TransformerConfig, parts: Parts) -> CausalLM:
    transformer = Transformer(config)
    return TokenLM(transformer, parts.tokenizer) if parts.tokenizer else ByteLM(transformer)


def _blt(config: BLTConfig, parts: Parts) -> CausalLM:
    assert parts.patcher is not None
    return PatchedLM(BLT(config), parts.patcher, parts.scorer)


register_model(TransformerConfig, _transformer)
register_model(BLTConfig, _blt)
