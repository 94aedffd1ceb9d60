"""Build scorers from their configuration, and register further kinds."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any, TypeVar

from torch import nn

from bytelm.config import SCORERS, FittedNgramConfig, Node, ScorerConfig, TransformerConfig
from bytelm.model.transformer import Transformer
from bytelm.scoring.ngram import NgramScorer
from bytelm.scoring.transformer import TransformerScorer

ConfigT = TypeVar("ConfigT", bound=Node)


@singledispatch
def _build(config: Node, reset_at_newline: bool) -> nn.Module:
    raise TypeError(f"no scorer is registered for {type(config).__name__}")


def build_scorer(config: ScorerConfig) -> Any:
    """Return a scorer (a module and :class:`~bytelm.patching.Scorer`) without its weights."""
    return _build(config.model, config.reset_at_newline)


def register_scorer(config: type[ConfigT], build: Callable[[ConfigT, bool], nn.Module]) -> None:
    """Register a kind of scorer for checkpoints and patching rules.

    Args:
        config: class of its configuration, with a ``kind`` of its own.
        build: returns the scorer, a module whose state dict is saved in checkpoints. Its arguments
            are a configuration, and whether a newline begins a new context.

    Raises:
        ConfigError: the kind is taken.
    """
    SCORERS.add(config)
    _build.register(config, build)


def _transformer(config: TransformerConfig, reset_at_newline: bool) -> TransformerScorer:
    return TransformerScorer(Transformer(config), reset_at_newline=reset_at_newline)


def _ngram(config: FittedNgramConfig, reset_at_newline: bool) -> NgramScorer:
    return NgramScorer(
        max_order=config.max_order,
        num_contexts=config.num_contexts,
        reset_at_newline=reset_at_newline,
    )


register_scorer(TransformerConfig, _transformer)
register_scorer(FittedNgramConfig, _ngram)
