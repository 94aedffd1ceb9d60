"""Scorers from their configuration."""

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
    """Return a scorer, a module that is a :class:`~bytelm.patching.Scorer`, without its weights."""
    return _build(config.model, config.reset_at_newline)


def register_scorer(config: type[ConfigT], build: Callable[[ConfigT, bool], nn.Module]) -> None:
    """Make a kind of scorer known: to checkpoints, and wherever one serves as a scorer.

    Args:
        config: its configuration, with a ``kind`` of its own.
        build: makes the scorer, a module, of a configuration and of whether a newline begins a new
            context; its state dict is what a checkpoint keeps of it.

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
