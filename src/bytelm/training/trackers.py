"""Trackers of metrics that a recipe asks for, besides the run's own file."""

from pathlib import Path

from bytelm.config import Recipe
from bytelm.progress import Callback
from bytelm.tracking import TensorBoardMetrics, WandbMetrics, check_installed

TENSORBOARD = "tensorboard"


def check_trackers(recipe: Recipe) -> None:
    """Check that the libraries of a recipe's trackers are installed.

    Raises:
        ConfigError: one is missing.
    """
    if _has_tensorboard(recipe):
        check_installed("tensorboard", "track.tensorboard")
    if recipe.track.wandb is not None:
        check_installed("wandb", "track.wandb")


def open_trackers(recipe: Recipe, folder: Path, resumed_step: int) -> list[Callback]:
    """Return the trackers of a run.

    Args:
        recipe: recipe of the run.
        folder: folder of the run.
        resumed_step: last step of an earlier part of the run to keep.

    Raises:
        ConfigError: a library is missing, or a tracker cannot be started.
    """
    trackers: list[Callback] = []
    if _has_tensorboard(recipe):
        trackers.append(TensorBoardMetrics(folder / TENSORBOARD, resumed_step))
    if recipe.track.wandb is not None:
        config = recipe.model_dump(mode="json", exclude={"track"})
        trackers.append(WandbMetrics(folder, config, **recipe.track.wandb.settings()))
    return trackers


def _has_tensorboard(recipe: Recipe) -> bool:
    return recipe.train.tensorboard or recipe.track.tensorboard
