"""Folders of training runs and checkpoints: where their files are, and which checkpoint is meant.

::

    RUN/recipe.yaml                    recipe of the run
    RUN/checkpoints/step-00000500/     a checkpoint: complete by itself
    RUN/best.json                      step of the one with the lowest held-out bits per byte
    RUN/metrics.jsonl                  metrics of the run

``RUN`` and ``RUN/checkpoints`` name the newest checkpoint of a run, ``RUN/best`` the best.
"""

from pathlib import Path

from bytelm.errors import CheckpointError
from bytelm.storage import FILES, at_home, check_folder, read_json

CONFIG, MODEL, SCORER, TOKENIZER = (
    "config.json",
    "model.safetensors",
    "scorer.safetensors",
    "tokenizer.json",
)
"""Files of a checkpoint."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in that of a run."""
RECIPE, METRICS, BEST = "recipe.yaml", "metrics.jsonl", "best.json"
"""Files of a run; the last one records its best checkpoint."""


def check_checkpoint(folder: Path) -> None:
    """Check that a folder is a checkpoint, and every file of it.

    Raises:
        CheckpointError: the folder is not a checkpoint, or a file is missing, cut short or altered.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: {missing(folder)}")
    if not (folder / FILES).is_file():
        inside = [one for one in sorted(folder.iterdir()) if is_checkpoint(one)]
        if inside:
            names = ", ".join(map(str, inside[:5]))
            raise CheckpointError(
                f"{folder} is not a checkpoint but holds some: name one of {names}"
            )
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {FILES} (a checkpoint, or the folder of a "
            "training run, is expected)"
        )
    check_folder(folder)


def missing(folder: Path) -> str:
    """Return why a path that is no folder is no checkpoint, and the remedy if it is a file."""
    if not folder.exists():
        return "there is no such folder"
    if (folder.parent / FILES).is_file():
        return f"it is a file of one; name the folder, {folder.parent}"
    return (
        "it is a file, and a checkpoint is a folder (weights of other projects are converted by "
        "`bytelm import`)"
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint or a training run that has one."""
    return (folder / FILES).is_file() or bool(saved_steps(folder))


def find_checkpoint(path: Path) -> Path:
    """Return the folder of a checkpoint.

    Args:
        path: a checkpoint; a training run, for its newest checkpoint; or ``RUN/best``, for the best
            one of a run. ``~`` at the beginning is the home folder.

    Raises:
        CheckpointError: the training run has no checkpoint yet, or none that was validated.
    """
    path = at_home(path)
    if path.name == "best" and not path.exists() and (path.parent / CHECKPOINTS).is_dir():
        best = best_step(path.parent)
        if best is None:
            raise CheckpointError(
                f"the run in {path.parent} has no best checkpoint yet: only steps that are both "
                "saved and validated count (train.checkpoint_every, train.validate_every)"
            )
        return best
    steps = saved_steps(path.parent if path.name == CHECKPOINTS else path)
    if steps:
        return steps[-1]
    if path.is_dir() and not (path / FILES).exists() and (path / CHECKPOINTS).is_dir():
        raise CheckpointError(
            f"the run in {path} has not saved a checkpoint yet: train it for longer"
        )
    return path


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def best_step(run: Path) -> Path | None:
    """Return the checkpoint of a run with the lowest held-out bits per byte, if one is recorded.

    Raises:
        CheckpointError: the record is damaged.
    """
    if not (run / BEST).exists():
        return None
    folder = step_folder(run, int(read_json(run / BEST)["step"]))
    return folder if folder.is_dir() else None


def saved_steps(run: Path) -> list[Path]:
    """Return the checkpoint folders of a training run, oldest first."""
    folders = (run / CHECKPOINTS).glob("step-*") if run.is_dir() else []
    steps = [p for p in folders if p.name.removeprefix("step-").isdecimal()]
    return sorted(steps, key=step_number)


def step_number(checkpoint: Path) -> int:
    """Return the step of a checkpoint of a run."""
    return int(checkpoint.name.removeprefix("step-"))
