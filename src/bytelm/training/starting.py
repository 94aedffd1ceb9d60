"""Where a run starts: anew, from its newest checkpoint that is whole, or from one it extends."""

from contextlib import AbstractContextManager, ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.checkpoint import read_config, saved_steps
from bytelm.config import Cooldown, Recipe, differences, dump_yaml, load_recipe
from bytelm.errors import CheckpointError, ConfigError
from bytelm.layout import RECIPE, check_checkpoint
from bytelm.storage import (
    disk_errors,
    is_vacant,
    locked,
    move_folder,
    read_json,
    write_json,
    write_text,
)
from bytelm.training.extension import extend, find_base
from bytelm.training.trainer import with_cooldowns

ORIGIN = "init.json"
"""Record of the checkpoint that a run began with."""
RESUME = "{remedy} and run the same command again: it resumes from the last checkpoint"
"""Advice after a disk error; see :func:`bytelm.storage.disk_errors`."""

# Settings that may change when a run is resumed: they do not affect the result (except that
# another device rounds differently).
RESUME_FREELY = {
    "data.path",
    "data.tokenizer",
    "data.verify",
    "train.device",
    "train.compile",
    "train.compile_blocks",
    "train.activation_checkpointing",
    "train.shard_ranks",
    "train.reshard",
    "train.hang_seconds",
    "train.peak_flops",
    # A run that diverged may resume with them from its last checkpoint.
    "train.max_skipped",
    "train.max_rise",
    "train.log_every",
    "train.validate_every",
    "train.validation_bytes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "track.tensorboard",
    "track.wandb",
    "track.wandb.project",
    "track.wandb.entity",
    "track.wandb.name",
    "track.wandb.mode",
}


def writing(folder: Path) -> AbstractContextManager[None]:
    """Explain errors of writing a run."""
    return disk_errors(folder, CheckpointError, RESUME)


class Start(NamedTuple):
    """Where a run starts."""

    checkpoint: Path | None
    """Checkpoint to resume from, if there is one."""
    is_extended: bool = False
    """Whether the run is given more steps from there."""
    damaged: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that are damaged, newest first, and what is wrong with them."""


def find_start(recipe: Recipe, folder: Path, checked: Path | None = None) -> Start:
    """Check that a folder is vacant, or holds a run of the same recipe or without checkpoints.

    Args:
        recipe: recipe of the run.
        folder: folder of the run.
        checked: checkpoint that is known to be whole.

    Returns:
        Where to start in it: at the newest checkpoint that is whole.

    Raises:
        ConfigError: the folder holds something else, or the run cannot be extended.
        CheckpointError: no checkpoint is whole, or not the one to extend the run from.
    """
    path, saved = folder / RECIPE, saved_steps(folder)
    if saved:
        old = load_recipe(str(path)).model_dump(mode="json")
        changed = differences(old, recipe.model_dump(mode="json"))
        serious = [line for line in changed if line.split(":")[0] not in RESUME_FREELY]
        if serious:
            base = find_base(recipe, folder, [line.split(":")[0] for line in serious])
            if base is not None:
                if base != checked:
                    check_checkpoint(base)
                return Start(base, is_extended=True)
            raise ConfigError(
                f"{folder} holds a run of another recipe ({'; '.join(serious)}): use another "
                "folder, or the same settings to resume it"
            )
        return _newest_whole(folder, saved, checked)
    if not path.exists() and not is_vacant(folder):
        raise ConfigError(f"{folder} is not empty and holds no run: choose another folder")
    return Start(None)


def _newest_whole(folder: Path, saved: list[Path], checked: Path | None) -> Start:
    damaged = []
    for one in reversed(saved):
        try:
            if one != checked:
                check_checkpoint(one)
        except CheckpointError as error:
            damaged.append((one, str(error)))
            continue
        return Start(one, damaged=tuple(damaged))
    raise CheckpointError(
        f"{damaged[0][1]}; no other checkpoint of the run in {folder} is whole: start again in "
        "another folder"
    )


def claim(
    recipe: Recipe,
    folder: Path,
    found: Start,
    origin: dict[str, Any] | None,
    stack: ExitStack,
) -> Start:
    """Lock a folder for as long as ``stack`` lasts, and prepare it to start there.

    A new run's recipe is written; damaged checkpoints are renamed, so that those of the run as it
    continues can have their names.

    Args:
        recipe: recipe of the run.
        folder: folder of the run.
        found: where to start, as found before the lock was held.
        origin: record of the checkpoint that a new run begins with.
        stack: ends with the run.

    Returns:
        Where to start, with the present names of damaged checkpoints.
    """
    with writing(folder):
        stack.enter_context(locked(folder))
        # Another process may have trained in the meantime.
        found = find_start(recipe, folder, found.checkpoint)
        if found.checkpoint is None:
            # Only now, so that an invalid recipe does not occupy the folder.
            _write_recipe(recipe, folder, origin)
        aside = tuple((_set_aside(one), reason) for one, reason in found.damaged)
    return found._replace(damaged=aside)


def _set_aside(checkpoint: Path) -> Path:
    names = (f"{checkpoint.name}.damaged{f'-{n}' if n > 1 else ''}" for n in count(1))
    place = next(one for one in map(checkpoint.with_name, names) if not one.exists())
    move_folder(checkpoint, place)
    return place


def extend_from(recipe: Recipe, folder: Path, checkpoint: Path) -> Path | None:
    """Extend a run; see :func:`bytelm.training.extension.extend`."""
    with writing(folder):
        return extend(recipe, folder, checkpoint)


def as_recorded(recipe: Recipe, start: Path | None) -> Recipe:
    """Return a recipe with what a checkpoint's run decided: how rows are filled, cooldowns."""
    if start is None:
        return recipe
    try:
        recorded = read_config(start).training or {}
    except CheckpointError:
        # Explained when the checkpoint is loaded.
        return recipe
    old = recorded.get("recipe", {})
    # Earlier versions filled rows in order.
    rows = {"row_patches": None, "packing": "in-order", **old.get("data", {})}
    for name in ("row_patches", "packing"):
        if getattr(recipe.data, name) is None:
            data = recipe.data.model_copy(update={name: rows[name]})
            recipe = recipe.model_copy(update={"data": data})
    if recipe.optimizer.cooldowns is None:
        cooldowns = old.get("optimizer", {}).get("cooldowns") or []
        if cooldowns:
            recipe = with_cooldowns(recipe, [Cooldown(**cooldown) for cooldown in cooldowns])
    return recipe


def recorded_recipe(folder: Path) -> Recipe | None:
    """Return the recipe of a run that has checkpoints, or ``None`` if there is no such run."""
    if not saved_steps(folder):
        return None
    recipe = load_recipe(str(folder / RECIPE))
    assert isinstance(recipe, Recipe)
    return recipe


def _write_recipe(recipe: Recipe, folder: Path, origin: dict[str, Any] | None) -> None:
    """Write the recipe of a new run, and the record of ``init``."""
    if origin is not None:
        write_json(folder / ORIGIN, origin)
    elif (folder / ORIGIN).exists():
        (folder / ORIGIN).unlink()
    write_text(folder / RECIPE, dump_yaml(recipe))


def read_origin(folder: Path) -> dict[str, Any]:
    """Return what the checkpoints of a run record about the one that it began with."""
    path = folder / ORIGIN
    return {"init": read_json(path)} if path.exists() else {}
