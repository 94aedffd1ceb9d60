"""Save and load the state of a run: model, optimiser moments, and position.

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

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytelm.checkpoint import (
    check_checkpoint,
    load_tensors,
    present_name,
    save_tensors,
    write_description,
    write_model,
)
from bytelm.data import LoaderState
from bytelm.errors import CheckpointError
from bytelm.layout import MODEL, best_step, saved_steps, step_folder, step_number
from bytelm.shards import part_of, read_parts, stored_names, write_parts
from bytelm.storage import (
    atomic_folder,
    disk_errors,
    read_json,
    remove_unfinished,
    write_json,
)
from bytelm.training.distributed import World
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
    world: World | None = None,
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
        world: the ranks, which all call this; ``None`` for one.

    Raises:
        CheckpointError: the checkpoint cannot be written; earlier ones are unchanged.
    """
    world = world or World()
    folder = step_folder(run, state.step)
    with _written_together(folder, world) as temporary:
        if world.is_main:
            write_json(temporary / TRAINER, asdict(state))
        moments = _moments(setup.lm.trained, optimizer)
        if world.size == 1:
            write_model(temporary, setup.lm, setup.description, training)
            save_tensors(temporary / OPTIMIZER, moments)
        else:
            _write_parts(temporary, setup, training, moments, world)
    if world.is_main:
        _remove_old(run, setup.recipe.train.keep_checkpoints, last_shared_step)


@contextmanager
def _written_together(folder: Path, world: World) -> Iterator[Path]:
    """Yield a temporary folder to all ranks, which becomes ``folder`` if all succeed."""
    with ExitStack() as stack:

        def begin() -> Path:
            remove_unfinished(folder.parent)
            return stack.enter_context(atomic_folder(folder))

        temporary = world.decide(begin)
        yield temporary
        world.decide(stack.close)


def _write_parts(
    folder: Path,
    setup: Setup,
    training: dict[str, Any],
    moments: dict[str, Tensor],
    world: World,
) -> None:
    """Write this rank's parts of a checkpoint, and on rank 0 what is not sharded."""
    trained = {name: part_of(tensor) for name, tensor in setup.lm.trained.state_dict().items()}
    parts = {MODEL: trained, OPTIMIZER: {name: part_of(one) for name, one in moments.items()}}

    def write() -> None:
        for file, tensors in parts.items():
            write_parts(folder / file, tensors, has_header=world.is_main)
        if world.is_main:
            write_description(folder, setup.lm, setup.description, training)
            for name, module in setup.lm.saved.items():
                if module is not setup.lm.trained:
                    save_tensors(folder / f"{name}.safetensors", module.state_dict())

    with disk_errors(folder, CheckpointError, "nothing was changed: {remedy}"):
        world.agree(write)


def _remove_old(run: Path, num_kept: int, last_shared_step: int | None) -> None:
    saved, kept = saved_steps(run), {best_step(run)}
    if last_shared_step is not None:
        kept.update([one for one in saved if step_number(one) <= last_shared_step][-1:])
    for old in saved[:-num_kept]:
        if old not in kept:
            shutil.rmtree(old)


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
        CheckpointError: the checkpoint is damaged.
    """
    world = world or World()
    world.decide(lambda: _check(folder))
    if world.size == 1:
        trained.load_state_dict(load_tensors(folder / MODEL, trained, device))
        _set_moments(trained, optimizer, load_tensors(folder / OPTIMIZER, trained, device))
    else:
        world.agree(lambda: _load_parts(folder, trained, optimizer, device))
    data = read_json(folder / TRAINER)
    interval = {_INTERVAL.get(name, name): value for name, value in data["interval"].items()}
    return TrainerState(**{**data, "data": LoaderState(**data["data"]), "interval": interval})


def _check(folder: Path) -> None:
    try:
        check_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} (or remove {folder} to resume from the checkpoint before it)"
        ) from None


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
    _set_moments(trained, optimizer, moments)


def _read_parts(path: Path, known: dict[str, Tensor], place: Callable[[str], Tensor]) -> None:
    names = {stored: present_name(stored, known) for stored in stored_names(path)}
    read_parts(path, {stored: place(name) for stored, name in names.items()})


def _set_moments(
    trained: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]
) -> None:
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
