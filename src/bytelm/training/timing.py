"""Measure the cost of a recipe's optimiser step on this computer."""

import statistics
import time
from typing import NamedTuple

from bytelm.config import Recipe
from bytelm.training.trainer import Trainer

WARM_UP_STEPS, TIMED_STEPS = 4, 12


class StepCost(NamedTuple):
    """Cost of one optimiser step."""

    seconds: float
    flops: float


def step_cost(recipe: Recipe) -> StepCost:
    """Return the cost of an optimiser step, measured on a few steps that are discarded.

    Raises:
        ConfigError, DataError, PatchingError: as :func:`bytelm.training.train`.
    """
    trainer = Trainer(recipe)
    seconds = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        began = time.monotonic()
        trainer.step()
        seconds.append(time.monotonic() - began)
    # The first steps also allocate memory and the optimiser's state.
    return StepCost(statistics.median(seconds[WARM_UP_STEPS:]), trainer.step_flops)
