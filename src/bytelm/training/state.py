"""The state of a run, and loading it: model, optimiser moments, and position.

::

    RUN/recipe.yaml                      the recipe of the run
    RUN/metrics.jsonl
    RUN/checkpoints/step-00000500/       a complete model checkpoint, and
        optimizer.safetensors            moments by parameter name
        trainer.json                     step, data position, metrics position

The files are the same on any number of ranks; each writes and reads its own rows of the tensors
(:mod:`bytelm.shards`).

A resumed run is bitwise equal to an uninterrupted one: the order of the data is the only randomness
in training, and is a function of the position. Sums depend on the number of threads in their last
bits, so the command line resumes with the number that the checkpoint was made with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytelm.checkpoint import (
    load_tensors,
    present_name,
)
from bytelm.data import LoaderState
from bytelm.errors import CheckpointError
from bytelm.layout import MODEL, saved_steps
from bytelm.shards import read_parts, stored_names
from bytelm.storage import (
    read_json,
)
from bytelm.training.distributed import World

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
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the guard against losses that jump; earlier versions had none."""
    threads: int | None = None
    """Threads that the step was computed with; sums depend on it in their last bits."""


def load_step(
    folder: Path,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    world: World | None = None,
) -> TrainerState:
    """Restore parameters and moments, and return the rest of the state.

    Args:
        folder: the checkpoint.
        trained: the trained part of the model.
        optimizer: its optimiser, without state.
        device: device of the model.
        world: the ranks, which all call this; ``None`` for one.

    Raises:
        CheckpointError: a file cannot be read, or does not fit the model.
    """
    world = world or World()
    if world.size == 1:
        trained.load_state_dict(load_tensors(folder / MODEL, trained, device))
        set_moments(trained, optimizer, load_tensors(folder / OPTIMIZER, trained, device))
    else:
        world.agree(lambda: _load_parts(folder, trained, optimizer, device))
    data = read_json(folder / TRAINER)
    interval = {_INTERVAL.get(name, name): value for name, value in data["interval"].items()}
    return TrainerState(**{**data, "data": LoaderState(**data["data"]), "interval": interval})


def _load_parts(
    folder: Path, trained: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Restore this rank's parts of the parameters and moments."""
    parameters = trained.state_dict()
    _read_parts(folder / MODEL, parameters, lambda name: parameters[name])
    moments: dict[str, Tensor] = {}

    def allocate(name: str) -> Tensor:
        parameter, _, key = name.partition("/")
        is_step = key == "step"
        made = (
            torch.zeros((), device=device) if is_step else torch.zeros_like(parameters[parameter])
        )
        return moments.setdefault(name, made)

    _read_parts(folder / OPTIMIZER, parameters, allocate)
    set_moments(trained, optimizer, moments)


def _read_parts(path: Path, known: dict[str, Tensor], place: Callable[[str], Tensor]) -> None:
    names = {stored: present_name(stored, known) for stored in stored_names(path)}
    read_parts(path, {stored: place(name) for stored, name in names.items()})


def set_moments(
    trained: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]
) -> None:
    """Restore the state of an optimiser from :func:`bytelm.training.saving.moments`."""
    names = {id(p): name for name, p in trained.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            keys = {key: f"{names[id(parameter)]}/{key}" for key in MOMENTS}
            # A parameter without a gradient so far has no moments.
            if keys["step"] in moments:
                optimizer.state[parameter] = {key: moments[name] for key, name in keys.items()}


_INTERVAL = {"num_patches": "num_units", "room_patches": "room_units"}
"""Names of totals in earlier versions, and their present names."""


def recorded_threads(run: Path) -> int | None:
    """Return the number of threads of the newest checkpoint of a run, if there is one."""
    for checkpoint in reversed(saved_steps(run)):
        try:
            return read_json(checkpoint / TRAINER).get("threads")
        except CheckpointError:
            # Damaged: the run resumes from the one before.
            continue
    return None


def charges_full_rows(run: Path) -> bool:
    """Whether the FLOPs of a run with checkpoints are counted as if each row were one document."""
    return read_json(saved_steps(run)[-1] / TRAINER).get("attended_flops") is None
