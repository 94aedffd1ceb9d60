"""The pace of models that train in turns until a deadline: decisions, without clocks or models.

All models get the same FLOPs. They train at the peak learning rate until the time left is only
enough for a cooldown, which they then share; see :class:`bytelm.progress.BeginCooldown`. ::

    FLOPs of each model   0 ------------------> start of cooldown --------> end
                          next step: the model    (1 - cooldown) end        never moved later
                          with the fewest FLOPs
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SLACK = 0.95
"""Share of the time left that a shortened cooldown plans to use."""


@dataclass(frozen=True)
class Budget:
    """Limits of training models in turns."""

    step_flops: tuple[float, ...]
    """FLOPs of one step of each model."""
    flops: float
    """FLOPs of each model, if the time allows."""
    cooldown: float
    """Share of a model's FLOPs that its cooldown takes."""

    def spent(self, steps: Sequence[int]) -> list[float]:
        """Return the FLOPs of each model."""
        return [n * flops for n, flops in zip(steps, self.step_flops, strict=True)]


class Turn(NamedTuple):
    """Decision about the next step."""

    model: int | None
    """Index of the model that takes it; ``None`` if all have finished."""
    last: tuple[int, ...] | None
    """Steps of each model when it ends; ``None`` before the cooldown."""


def next_turn(
    budget: Budget,
    steps: Sequence[int],
    last: tuple[int, ...] | None,
    seconds: float,
    speed: float,
) -> Turn:
    """Decide which model takes the next step, and when the training ends.

    Args:
        budget: limits of the training.
        steps: steps that each model has taken.
        last: steps at which each model ends, as decided before; ``None`` before the cooldown.
        seconds: time left; not positive if the training should have ended.
        speed: FLOPs per second of all models together; infinite if unknown.
    """
    reachable = reachable_flops(budget, steps, seconds, speed)
    spent = budget.spent(steps)
    mean = sum(spent) / len(spent)
    if last is None:
        if mean >= (1 - budget.cooldown) * reachable:
            last = _last_steps(budget, steps, reachable)
    elif all(n < end for n, end in zip(steps, last, strict=True)):
        end = sum(budget.spent(last)) / len(last)
        if reachable < end:
            shorter = _last_steps(budget, steps, mean + SLACK * (reachable - mean))
            last = shorter if all(a <= b for a, b in zip(shorter, last, strict=True)) else last
    waiting = [i for i in range(len(steps)) if last is None or steps[i] < last[i]]
    return Turn(min(waiting, key=lambda i: spent[i], default=None), last)


def reachable_flops(budget: Budget, steps: Sequence[int], seconds: float, speed: float) -> float:
    """Return the FLOPs of each model at the end of the time, at most those of the budget."""
    spent = budget.spent(steps)
    mean = sum(spent) / len(spent)
    if seconds <= 0:
        return min(budget.flops, mean)
    return min(budget.flops, mean + seconds * speed / len(spent))


def _last_steps(budget: Budget, steps: Sequence[int], flops: float) -> tuple[int, ...]:
    """Return the steps of each model that come closest to the FLOPs, at least one more each."""
    costs = budget.step_flops
    least = max(spent + cost for spent, cost in zip(budget.spent(steps), costs, strict=True))
    flops = max(flops, least)
    return tuple(max(round(flops / cost), n + 1) for n, cost in zip(steps, costs, strict=True))


class Speed:
    """Speed of the recent past, by which the near future is predicted.

    The next s seconds are expected to be as fast as the last s seconds: a pause of ten seconds
    changes little in the plan for the next five minutes, and much in that for the next ten.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._flops: list[float] = []

    def add(self, seconds: float, flops: float) -> None:
        """Add that ``flops`` were spent after ``seconds``, on any clock."""
        self._times.append(seconds)
        self._flops.append(flops)

    def over(self, seconds: float) -> float:
        """Return the FLOPs per second of the last ``seconds``; infinite before the first step."""
        times, flops = self._times, self._flops
        if len(times) < 2:
            return math.inf
        first = min(bisect_left(times, times[-1] - seconds), len(times) - 2)
        return (flops[-1] - flops[first]) / max(times[-1] - times[first], 1e-9)
