"""Apply parallelism to a model from outside."""

from torch import nn

from bytelm.config import TrainConfig


def parallelize(model: nn.Module, config: TrainConfig) -> None:
    """Prepare an initialised model, in place, for training on the available devices.

    On one device there is nothing to do. On several, this is the place to apply activation
    checkpointing, per-block compilation and sharding, in that order; the rest of the package does
    not depend on them. What is applied must keep the module and its parts where they are, as
    ``fully_shard`` and ``nn.Module.compile`` do, since the language model holds them already.

    ``fully_shard`` gathers a module's weights in its ``forward``, so it can be applied to modules
    that are entered through it alone: the blocks of every stack, ``global_model``, the encoder's
    cross-attentions and, for training steps, the whole model. It cannot be applied to ``encoder``
    and ``decoder`` of a BLT, which are also entered through ``patch_vectors``, ``read_latents``
    and ``logits``, nor to the decoder's cross-attentions (``project_keys_values``); their weights
    belong to the whole model's group. With a learned patching rule a BLT is not entered through
    ``forward`` either.

    Args:
        model: the trained part of a language model.
        config: configuration of the run.
    """
