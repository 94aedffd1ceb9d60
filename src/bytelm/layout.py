"""Folders of training runs and checkpoints: where their files are, and which checkpoint is meant.

::

    RUN/recipe.yaml                    recipe of the run
    RUN/checkpoints/step-00000500/     a checkpoint: complete by itself
"""

from pathlib import Path

from bytelm.errors import CheckpointError
from bytelm.storage import FILES, check_folder

CONFIG, MODEL, SCORER, TOKENIZER = (
    "config.json",
    "model.safetensors",
    "scorer.safetensors",
    "tokenizer.json",
)
"""Files of a checkpoint."""


def check_checkpoint(folder: Path) -> None:
    """Check that a folder is a checkpoint, and every file of it.

    Raises:
        CheckpointError: the folder is not a checkpoint, or a file is missing, cut short or altered.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: there is no such folder")
    if not (folder / FILES).is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {FILES} (a folder of a training run or of "
            "`bytelm quickstart` is expected)"
        )
    check_folder(folder)


def find_checkpoint(path: Path) -> Path:
    """Return the folder of the checkpoint at ``path``, or of the newest one of a training run.

    Raises:
        CheckpointError: the training run has no checkpoint yet.
    """
    steps = saved_steps(path)
    if steps:
        return steps[-1]
    if path.is_dir() and not (path / FILES).exists() and (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"the run in {path} has not saved a checkpoint yet: train it for longer"
        )
    return path


def saved_steps(run: Path) -> list[Path]:
    """Return the checkpoint folders of a training run, oldest first."""
    folders = (run / "checkpoints").glob("step-*") if run.is_dir() else []
    steps = [p for p in folders if p.name.removeprefix("step-").isdecimal()]
    return sorted(steps, key=lambda p: int(p.name.removeprefix("step-")))
