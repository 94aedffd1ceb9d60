"""Extend a run beyond its last step, from a checkpoint that a longer run would also have.

::

    RUN/superseded/1000-steps/       the run of 1,000 steps as it was: a folder of a run
        recipe.yaml, metrics.jsonl, best.json
        checkpoints/                 those after the checkpoint that the run is extended from

Nothing is deleted. A kill at any moment leaves a run that can be resumed as it was, or extended by
the same command: the new recipe, which is written last, decides which.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from bytelm.checkpoint import read_config
from bytelm.config import Recipe, dump_yaml, parse
from bytelm.errors import CheckpointError, ConfigError
from bytelm.layout import BEST, METRICS, RECIPE, best_step, saved_steps, step_number
from bytelm.storage import move_folder, write_bytes, write_json, write_text
from bytelm.tracking import read_jsonl
from bytelm.training.best import BPB
from bytelm.training.optim import learning_rate

SUPERSEDED = "superseded"
SCHEDULE = {"train.steps", "optimizer.cooldown", "optimizer.cooldown_fraction"}
"""Settings that may change when a run is extended."""


def find_base(recipe: Recipe, folder: Path, changed: Sequence[str]) -> Path | None:
    """Return the newest checkpoint that a run can be extended from.

    All steps before it had the learning rates that they have in the longer run, so that the
    extended run equals one that had all steps from the start.

    Args:
        recipe: recipe of the longer run.
        folder: folder of a run with checkpoints.
        changed: paths of the settings in which the recipe differs from that of the run.

    Returns:
        The checkpoint, or ``None`` if the recipe does not extend the run.

    Raises:
        ConfigError: no checkpoint has the learning rates of the longer run.
        CheckpointError: a checkpoint is damaged.
    """
    if "train.steps" not in changed or not set(changed) <= SCHEDULE:
        return None
    saved = saved_steps(folder)
    recorded = [_recorded(checkpoint) for checkpoint in saved]
    steps, last = recipe.train.steps, recorded[-1].train.steps
    if steps <= last:
        return None
    for checkpoint, old in reversed(list(zip(saved, recorded, strict=True))):
        # A cooldown that was decided in the run is recorded from the step at which it was decided.
        is_decided = old.optimizer.cooldowns is not None
        if not is_decided and _first_difference(old, recipe, step_number(checkpoint)) is None:
            return checkpoint
    oldest = step_number(saved[0])
    differs = _first_difference(recorded[0], recipe, oldest)
    differs = oldest if differs is None else differs
    schedule = recorded[0].optimizer.schedule
    raise ConfigError(
        f"{folder} holds a run of {last} steps that cannot be extended to {steps}: with "
        f"optimizer.schedule={schedule}, its learning rates differ from those of {steps} steps "
        f"after step {differs}, and its oldest checkpoint is of step {oldest}. Train on from its "
        f"weights with another schedule, in another folder: init.from={folder}"
    )


def _recorded(checkpoint: Path) -> Recipe:
    """Return the recipe of a run as one of its checkpoints records it."""
    training = read_config(checkpoint).training or {}
    if "recipe" not in training:
        raise CheckpointError(f"{checkpoint} records no recipe: use another folder")
    return parse(Recipe, training["recipe"], str(checkpoint))


def _first_difference(old: Recipe, new: Recipe, step: int) -> int | None:
    """Return the first of some steps at which the learning rates of two recipes differ."""

    def rates(recipe: Recipe) -> Iterator[float]:
        return (learning_rate(i, recipe.train.steps, recipe.optimizer) for i in range(step))

    pairs = zip(rates(old), rates(new), strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def extend(recipe: Recipe, folder: Path, base: Path) -> Path | None:
    """Let a run continue from a checkpoint with another recipe; the caller holds its lock.

    Returns:
        The folder that what follows the checkpoint was moved to; ``None`` if nothing follows.

    Raises:
        OSError: a file cannot be written or moved.
    """
    later = [one for one in saved_steps(folder) if step_number(one) > step_number(base)]
    place = _supersede(folder, later) if later else None
    _correct_best(folder, base)
    write_text(folder / RECIPE, dump_yaml(recipe))
    return place


def _supersede(folder: Path, later: Sequence[Path]) -> Path:
    """Move checkpoints away, newest first, so that those that remain are always a run."""
    kept = {name: (folder / name).read_bytes() for name in (RECIPE, METRICS)}
    best = best_step(folder)
    if best in later:
        kept[BEST] = (folder / BEST).read_bytes()
    steps = _recorded(later[0]).train.steps
    place = _vacant_place(folder / SUPERSEDED / f"{steps}-steps", kept, later)
    (place / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name, data in kept.items():
        write_bytes(place / name, data)
    for checkpoint in reversed(later):
        move_folder(checkpoint, place / "checkpoints" / checkpoint.name)
    return place


def _vacant_place(wanted: Path, kept: dict[str, bytes], later: Sequence[Path]) -> Path:
    """Return a folder that has none of these files, or those that a killed extension put there."""

    def has_room(place: Path) -> bool:
        return not any((place / "checkpoints" / one.name).exists() for one in later) and all(
            not (place / name).exists() or (place / name).read_bytes() == data
            for name, data in kept.items()
        )

    names = (f"{wanted.name}-{number}" if number > 1 else wanted.name for number in count(1))
    return next(place for place in map(wanted.with_name, names) if has_room(place))


def _correct_best(folder: Path, base: Path) -> None:
    """Record the best of the checkpoints that remain, if the one on record was superseded."""
    if not (folder / BEST).exists() or best_step(folder) is not None:
        return
    remaining = {step_number(one) for one in saved_steps(folder)}
    validated = [
        (metrics[BPB], metrics["step"])
        for metrics in read_jsonl(folder / METRICS)
        if metrics["step"] in remaining and metrics.get(BPB) is not None
    ]
    if validated:
        bpb, step = min(validated)
        write_json(folder / BEST, {"step": step, BPB: bpb})
    else:
        (folder / BEST).unlink()
