"""The optimiser and its schedule (paper section 4.8)."""

import math

import torch
from torch import nn

from bytelm.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices, but not on norms, biases and embeddings.

    A hash embedding is read rarely, and weight decay would erase it in between. The parameter
    groups have an ``lr_multiplier``, by which their learning rate is multiplied.
    """
    kinds = nn.Embedding | nn.EmbeddingBag
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_embedding = id(parameter) in embeddings
        decay = config.weight_decay if parameter.dim() > 1 and not is_embedding else 0.0
        is_output = name.removeprefix("decoder.") == "output.weight"
        part = "embeddings" if is_embedding else "output" if is_output else _part(name)
        multiplier = config.lr_multipliers.get(part, 1.0)
        groups.setdefault((decay, multiplier), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_multiplier": multiplier}
            for (decay, multiplier), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def _part(name: str) -> str:
    return name.partition(".")[0].removesuffix("_model")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to ``final_ratio``.

    ::

        warm-up  peak (step + 1) / warmup_steps
        then     peak (r + (1 - r) (1 + cos(pi t)) / 2),  t from 0 to 1 at the last step
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    t = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(t, 1.0))) / 2
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * cosine)
