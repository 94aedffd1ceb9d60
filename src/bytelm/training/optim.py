"""The optimiser and its schedule (paper section 4.8)."""

import math

import torch
from torch import nn

from bytelm.config import Cooldown, OptimizerConfig
from bytelm.training.parts import parts_by_parameter


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices, but not on norms, biases and embeddings.

    A hash embedding is read rarely, and weight decay would erase it in between. The parameter
    groups have an ``lr_multiplier``, by which their learning rate is multiplied. Frozen parameters
    are in no group.
    """
    parts = parts_by_parameter(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_embedding = "embeddings" in parts[name]
        decay = config.weight_decay if parameter.dim() > 1 and not is_embedding else 0.0
        multipliers = (config.lr_multipliers.get(part) for part in parts[name])
        multiplier = next((one for one in multipliers if one is not None), 1.0)
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


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay or wsd.

    Both end at ``final_ratio``, here r::

        warm-up  peak (step + 1) / warmup_steps
        cosine   peak (r + (1 - r) (1 + cos(pi t)) / 2),  t from 0 to 1 at the last step
        wsd      peak (r + (1 - r) (1 - t)),              t from 0 to 1 after the last step,
              or peak (r + (1 - r) (1 - sqrt(t)))         and 0 before the cooldown

    Args:
        step: steps before this one.
        steps: steps of the run.
        config: the schedule.
    """
    warm_up = min((step + 1) / max(config.warmup_steps, 1), 1.0)
    if config.schedule == "wsd":
        t = cooldown_progress(step, steps, config)
        left = 1 - (t if config.cooldown == "linear" else math.sqrt(t))
        ratio = config.final_ratio + (1 - config.final_ratio) * left
        return config.learning_rate * min(warm_up, ratio)
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    t = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(t, 1.0))) / 2
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * cosine)


def planned_cooldown(steps: int, config: OptimizerConfig) -> Cooldown:
    """Return the cooldown of a run whose end is not decided while it is in progress."""
    return Cooldown(start=steps - max(round(config.cooldown_fraction * steps), 1), end=steps)


def last_shared_step(steps: int, config: OptimizerConfig) -> int | None:
    """Return the last step at which a wsd run is as one with more steps; ``None`` for others.

    It precedes the cooldown. A cooldown that was decided in the run belongs to the step at which it
    was decided.
    """
    if config.schedule != "wsd":
        return None
    if config.cooldowns:
        return config.cooldowns[0].start - 1
    return planned_cooldown(steps, config).start


def cooldown_progress(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the share of the cooldown before a step: 0 until it starts, 1 when training ends.

    ::

        cooldowns                start 4, end 8       start 4, end 8; from step 6 on, end 7
        steps before             0 to 4  5    6  7    0 to 4  5    6
        share of the cooldown    0       1/4 1/2 3/4  0       1/4  1/2
    """
    cooldowns = config.cooldowns or [planned_cooldown(steps, config)]
    progress = 0.0
    for number, (start, end) in enumerate((c.start, c.end) for c in cooldowns):
        until = cooldowns[number + 1].start if number + 1 < len(cooldowns) else end
        covered = (min(step, until, end) - start) / (end - start)
        progress += (1 - progress) * max(covered, 0.0)
    return progress
