"""Train several models in turns against the clock, with the same FLOPs each."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bytelm.config import Recipe
from bytelm.errors import ConfigError
from bytelm.progress import Callback
from bytelm.stopping import Stopped, Stopping
from bytelm.training.pace import Budget, Speed, next_turn, reachable_flops
from bytelm.training.run import Run, TrainingResult, open_run
from bytelm.training.trainer import Trainer

VALIDATION_SHARE = 0.02
"""Share of the time that the last validations are expected to take, until some are measured."""
MOST_VALIDATION = 0.1
"""Most time that validations take, as a share of that between them."""


@dataclass
class Turns:
    """State of training in turns."""

    share: float = 0.0
    """Share that is done: of the time or of the FLOPs, whichever is more."""
    reachable: float = 0.0
    """FLOPs that each model will have got at the end, as the speed is now."""
    seconds: float = 0.0
    """Time since the beginning, or since it was resumed."""
    flops_per_second: float = 0.0
    """Speed of all models together, validations included."""
    validation_seconds: float | None = None
    """Duration of the last validation of all models; ``None`` before the first."""


def train_in_turns(
    recipes: Sequence[tuple[Recipe, Path]],
    flops: float,
    deadline: float,
    *,
    validations: int = 5,
    callbacks: Sequence[Callback] = (),
    report: Callable[[Turns], None] = lambda turns: None,
) -> list[TrainingResult]:
    """Train models of wsd recipes in turns, or resume; their steps are decided by the clock.

    They get the same FLOPs to half a step each, and all complete a cooldown over the share of the
    FLOPs that the first recipe's ``cooldown_fraction`` is. Steps that begin before the deadline are
    completed. After SIGINT or SIGTERM the runs are saved, and resume from there.

    Args:
        recipes: recipe and folder of each run.
        flops: FLOPs of each model, if the time allows.
        deadline: when to end, last validation included, on the clock of ``time.monotonic``.
        validations: number of validations and checkpoints, the last ones included; fewer on slow
            computers.
        callbacks: a receiver of the events of each run.
        report: called after each step.

    Raises:
        ConfigError: a schedule is not wsd; or as :func:`bytelm.training.train`.
        DataError, PatchingError, CheckpointError, TrainingError: as :func:`bytelm.training.train`.
        Stopped: a stop was requested.
    """
    if any(recipe.optimizer.schedule != "wsd" for recipe, _ in recipes):
        raise ConfigError("training in turns decides its end: set optimizer.schedule=wsd")
    stop = Stopping()
    with stop.listening(), ExitStack() as stack:
        runs = [
            stack.enter_context(open_run(recipe, folder, callbacks=callbacks[i : i + 1], stop=stop))
            for i, (recipe, folder) in enumerate(recipes)
        ]
        try:
            _train(runs, flops, deadline, validations, report)
        except Stopped:
            for run in runs:
                run.save()
            raise
        return [run.result() for run in runs]


def _train(
    runs: Sequence[Run],
    flops: float,
    deadline: float,
    validations: int,
    report: Callable[[Turns], None],
) -> None:
    trainers = [run.trainer for run in runs]
    last = _decided(trainers)
    for run in runs:
        run.begin()
    began, speed, turns = time.monotonic(), Speed(), Turns()
    speed.add(0.0, sum(trainer.flops for trainer in trainers))
    mean = sum(trainer.flops for trainer in trainers) / len(trainers)
    validated = int(mean / flops * validations)
    next_validation = 0.0
    while True:
        now = time.monotonic()
        last_validations = turns.validation_seconds or VALIDATION_SHARE * (deadline - began)
        left = deadline - now - last_validations
        rate = speed.over(left)
        steps = [trainer.num_steps for trainer in trainers]
        # What a step takes becomes known better while they train.
        budget = Budget(
            tuple(trainer.step_flops for trainer in trainers),
            flops,
            trainers[0].recipe.optimizer.cooldown_fraction,
        )
        turns.reachable = reachable_flops(budget, steps, left, rate)
        turn = next_turn(budget, steps, last, left, rate)
        if turn.last != last and turn.last is not None:
            for trainer, end in zip(trainers, turn.last, strict=True):
                trainer.cool_down(end - trainer.num_steps)
        last = turn.last
        if turn.model is None:
            return
        runs[turn.model].step()
        spent = [trainer.flops for trainer in trainers]
        turns.seconds = seconds = time.monotonic() - began
        speed.add(seconds, sum(spent))
        turns.flops_per_second = speed.over(seconds)
        end = sum(budget.spent(last)) / len(spent) if last else flops
        time_share = seconds / max(seconds + left, 1e-9)
        turns.share = min(max(sum(spent) / len(spent) / end, time_share if not last else 0.0), 1.0)
        report(turns)
        is_due = turns.share >= (validated + 1) / validations and seconds >= next_validation
        if is_due and not any(run.has_all_steps for run in runs):
            validated = int(turns.share * validations)
            _validate(runs, turns)
            pause = (turns.validation_seconds or 0.0) / MOST_VALIDATION
            next_validation = time.monotonic() - began + pause


def _decided(trainers: Sequence[Trainer]) -> tuple[int, ...] | None:
    """Return the steps of each model if their cooldown began before they were resumed.

    A model that was killed before it was saved in its cooldown joins those that were.
    """
    decided = [trainer for trainer in trainers if trainer.recipe.optimizer.cooldowns]
    if not decided:
        return None
    flops = decided[0].last_step * decided[0].step_flops
    for trainer in trainers:
        if trainer not in decided:
            trainer.cool_down(round(flops / trainer.step_flops) - trainer.num_steps)
    return tuple(trainer.last_step for trainer in trainers)


def _validate(runs: Sequence[Run], turns: Turns) -> None:
    """Save and validate all runs, and measure how long that takes."""
    began = time.monotonic()
    for run in runs:
        run.save()
        run.validate()
    turns.validation_seconds = time.monotonic() - began
