"""Language models from their configuration: the one place where a kind becomes a module."""

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
    """What a network is joined with."""

    patcher: Patcher | None = None
    scorer: Scorer | None = None
    tokenizer: Tokenizer | None = None


@singledispatch
def _build(config: Node, parts: Parts) -> CausalLM:
    # A scorer of a kind from elsewhere, saved by itself.
    return ScorerLM(build_scorer(ScorerConfig(model=config)))


def build_lm(
    description: ModelDescription,
    *,
    scorer: Scorer | None = None,
    tokenizer: Tokenizer | None = None,
) -> CausalLM:
    """Return a language model without its weights.

    Args:
        description: of the model.
        scorer: a loaded one; ``None`` for one without weights, as described.
        tokenizer: of a model of tokens.

    Raises:
        PatchingError: its patching rule has not been calibrated.
    """
    patcher = None
    if description.patching is not None:
        # Also where models are built without memory: a rule may hold tensors that nothing loads.
        with torch.device("cpu"):
            patcher = build_patcher(description.patching)
    if scorer is None and description.scorer is not None:
        scorer = build_scorer(description.scorer)
    return _build(description.model, Parts(patcher, scorer, tokenizer))


def register_model(config: type[ConfigT], build: Callable[[ConfigT, Parts], CausalLM]) -> None:
    """Make a kind of model known: to recipes, checkpoints and commands.

    What it costs is counted by :func:`bytelm.accounting.register_parts`.

    Args:
        config: its configuration, with a ``kind`` of its own.
        build: makes the language model of a configuration and of what it is joined with.

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
