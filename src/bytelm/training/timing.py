"""What a step of a recipe costs on this computer, found by taking a few."""

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
    """Take a few steps of a recipe, thrown away, and time them.

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
