"""Save and load the state of a run: model, optimiser moments, and position.

::

    RUN/recipe.yaml                      the recipe of the run
    RUN/metrics.jsonl
    RUN/checkpoints/step-00000500/       a complete model checkpoint, and
        optimizer.safetensors            moments by parameter name
        trainer.json                     step, data position, metrics position

A resumed run is bitwise equal to an uninterrupted one: the order of the data is the only randomness
in training, and is a function of the position. Sums depend on the number of threads in their last
bits, so the command line resumes with the number that the checkpoint was made with.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytelm.checkpoint import (
    check_checkpoint,
    load_tensors,
    save_tensors,
    write_model,
)
from bytelm.data import LoaderState
from bytelm.errors import CheckpointError
from bytelm.layout import best_step, saved_steps, step_folder, step_number
from bytelm.storage import atomic_folder, read_json, remove_unfinished, write_json
from bytelm.training.setup import Setup

OPTIMIZER, TRAINER = "optimizer.safetensors", "trainer.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainerState:
    """State of a trainer, except tensors."""

    step: int
    """Steps completed."""
    data: LoaderState
    data_fingerprint: str
    metrics_bytes: int
    """Size of ``metrics.jsonl`` at this step."""
    bytes_seen: int
    interval: dict[str, Any]
    """Totals since the last report."""
    attended_flops: float | None = None
    """FLOPs so far; ``None`` in checkpoints of runs whose rows are charged as one document each."""
    is_validation_due: bool = False
    """Whether the validation of this step follows; it preceded checkpoints of earlier versions."""
    threads: int | None = None
    """Threads that the step was computed with; sums depend on it in their last bits."""


def save_step(
    run: Path,
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    training: dict[str, Any],
    last_shared_step: int | None = None,
) -> None:
    """Save a step, then remove all but the newest ``train.keep_checkpoints`` and two others.

    These are the best one, and the newest one from which the run could be extended.

    Args:
        run: folder of the run.
        setup: model and description.
        optimizer: optimiser of the run.
        state: state of the trainer.
        training: record of the training for the model's configuration.
        last_shared_step: last step from which the run can be extended, if there is one.

    Raises:
        CheckpointError: the checkpoint cannot be written; earlier ones are unchanged.
    """
    folder = step_folder(run, state.step)
    remove_unfinished(folder.parent)
    with atomic_folder(folder) as temporary:
        write_model(temporary, setup.lm, setup.description, training)
        save_tensors(temporary / OPTIMIZER, _moments(setup.lm.trained, optimizer))
        write_json(temporary / TRAINER, asdict(state))
    saved, kept = saved_steps(run), {best_step(run)}
    if last_shared_step is not None:
        kept.update([one for one in saved if step_number(one) <= last_shared_step][-1:])
    for old in saved[: -setup.recipe.train.keep_checkpoints]:
        if old not in kept:
            shutil.rmtree(old)


def load_step(
    folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> TrainerState:
    """Restore parameters and moments, and return the rest of the state.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    try:
        check_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} (or remove {folder} to resume from the checkpoint before it)"
        ) from None
    trained.load_state_dict(load_tensors(folder / "model.safetensors", trained, device))
    moments = load_tensors(folder / OPTIMIZER, trained, device)
    names = {id(p): name for name, p in trained.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            keys = {key: f"{names[id(parameter)]}/{key}" for key in MOMENTS}
            # A parameter without a gradient so far has no moments.
            if keys["step"] in moments:
                optimizer.state[parameter] = {key: moments[name] for key, name in keys.items()}
    data = read_json(folder / TRAINER)
    interval = {_INTERVAL.get(name, name): value for name, value in data["interval"].items()}
    return TrainerState(**{**data, "data": LoaderState(**data["data"]), "interval": interval})


_INTERVAL = {"num_patches": "num_units", "room_patches": "room_units"}
"""Names of totals in earlier versions, and their present names."""


def recorded_threads(run: Path) -> int | None:
    """Return the number of threads of the newest checkpoint of a run, if there is one."""
    saved = saved_steps(run)
    if not saved or not (saved[-1] / TRAINER).is_file():
        return None
    return read_json(saved[-1] / TRAINER).get("threads")


def charges_full_rows(run: Path) -> bool:
    """Whether the FLOPs of a run with checkpoints are counted as if each row were one document."""
    return read_json(saved_steps(run)[-1] / TRAINER).get("attended_flops") is None


def _moments(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in trained.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
