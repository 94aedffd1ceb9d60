"""Save checkpoints of a run: at once in one process, in the background on several ranks.

On several ranks, training waits only while the rows of each rank are copied, into memory that the
next checkpoint uses again. A thread of each rank then writes them into the same files, in a folder
that rank 0 renames when all are complete; a kill of any rank at any moment leaves the checkpoints
that were there before. ::

    steps       ... 499 500 | copy | 501 502 503 ...
    threads                        | write | all have written | hash | rename | remove old ones
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bytelm.checkpoint import save_tensors, write_description, write_model
from bytelm.errors import CheckpointError
from bytelm.layout import MODEL, best_step, saved_steps, step_folder, step_number
from bytelm.shards import Part, part_of, write_parts
from bytelm.storage import atomic_folder, disk_errors, remove_unfinished, write_json
from bytelm.training.distributed import World
from bytelm.training.setup import Setup
from bytelm.training.state import OPTIMIZER, TRAINER, TrainerState


def save_step(
    run: Path,
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    training: dict[str, Any],
) -> None:
    """Save a step of a run in one process.

    Args:
        run: folder of the run.
        setup: model and description.
        optimizer: optimiser of the run.
        state: state of the trainer.
        training: record of the training for the model's configuration.

    Raises:
        CheckpointError: the checkpoint cannot be written; earlier ones are unchanged.
    """
    folder = step_folder(run, state.step)
    remove_unfinished(folder.parent)
    with atomic_folder(folder) as temporary:
        write_model(temporary, setup.lm, setup.description, training)
        save_tensors(temporary / OPTIMIZER, moments(setup.lm.trained, optimizer))
        write_json(temporary / TRAINER, asdict(state))


class Saver:
    """Writer of the checkpoints of a run; all ranks make the same calls.

    Args:
        run: folder of the run.
        world: the ranks.
    """

    def __init__(self, run: Path, world: World) -> None:
        self._run, self._world = run, world
        # The threads have a process group of their own: its calls have another order.
        self._apart = world.apart()
        self._folder: Path | None = None
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        # Memory that is new must be cleared page by page, which takes longer than to copy.
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def save(
        self,
        setup: Setup,
        optimizer: torch.optim.Optimizer,
        state: TrainerState,
        training: dict[str, Any],
        then: Callable[[], None],
    ) -> None:
        """Save a step, or begin to if there are several ranks; see :func:`save_step`.

        Args:
            setup: model and description.
            optimizer: optimiser of the run.
            state: state of the trainer.
            training: record of the training for the model's configuration.
            then: called on rank 0 when the checkpoint is complete; on several ranks by the thread
                that wrote it.

        Raises:
            CheckpointError: the checkpoint cannot be written; on several ranks :meth:`finish`
                raises it.
        """
        assert self._folder is None, "a checkpoint is being written"
        if self._world.size == 1:
            save_step(self._run, setup, optimizer, state, training)
            then()
        else:
            copy = _Copy.of(setup, optimizer, state, training, self._buffers)
            self._thread = Thread(target=self._write, args=(copy, then), daemon=True)
            self._thread.start()
        self._folder = step_folder(self._run, state.step)

    def finish(self, *, wait: bool) -> Path | None:
        """Return the checkpoint that is complete since the last call, if there is one.

        Args:
            wait: whether to wait for one that is being written.

        Raises:
            CheckpointError: it could not be written; earlier ones are unchanged.
        """
        if self._folder is None:
            return None
        if self._thread is not None:
            (num_writing,) = self._world.sum(int(self._thread.is_alive()))
            if num_writing and not wait:
                return None
            self._thread.join()
        folder, error = self._folder, self._error
        self._folder = self._thread = self._error = None
        if error is not None:
            raise error
        return folder

    def end(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, copy: "_Copy", then: Callable[[], None]) -> None:
        folder = step_folder(self._run, copy.state.step)
        try:
            with _written_together(folder, self._apart) as temporary:
                self._apart.agree(lambda: copy.write(temporary, self._apart.is_main))
            self._apart.decide(then)
        except BaseException as error:
            self._error = error


class _Copy(NamedTuple):
    """What a rank writes of a checkpoint, which later steps do not change."""

    setup: Setup
    state: TrainerState
    training: dict[str, Any]
    parts: dict[str, dict[str, Part]]
    """Parts of the tensors of each file."""

    @classmethod
    def of(
        cls,
        setup: Setup,
        optimizer: torch.optim.Optimizer,
        state: TrainerState,
        training: dict[str, Any],
        buffers: dict[tuple[str, str], Tensor],
    ) -> "_Copy":
        trained = setup.lm.trained
        files = {MODEL: trained.state_dict(), OPTIMIZER: moments(trained, optimizer)}
        parts = {
            file: {
                name: _copied(part_of(tensor), buffers, (file, name))
                for name, tensor in tensors.items()
            }
            for file, tensors in files.items()
        }
        return cls(setup, state, training, parts)

    def write(self, folder: Path, is_main: bool) -> None:
        """Write this rank's parts, and on rank 0 what is not sharded."""
        with disk_errors(folder, CheckpointError, "nothing was changed: {remedy}"):
            for file, parts in self.parts.items():
                write_parts(folder / file, parts, has_header=is_main)
            if not is_main:
                return
            lm = self.setup.lm
            write_description(folder, lm, self.setup.description, self.training)
            for name, module in lm.saved.items():
                if module is not lm.trained:
                    save_tensors(folder / f"{name}.safetensors", module.state_dict())
            write_json(folder / TRAINER, asdict(self.state))


def _copied(part: Part, buffers: dict[tuple[str, str], Tensor], key: tuple[str, str]) -> Part:
    """Return a part whose rows, if this rank writes them, are copied into its buffer."""
    if not part.is_first:
        # Of rows that other ranks write only the type matters.
        return part
    if key not in buffers:
        buffers[key] = torch.empty_like(part.rows, device="cpu", pin_memory=part.rows.is_cuda)
    return part._replace(rows=buffers[key].copy_(part.rows))


@contextmanager
def _written_together(folder: Path, world: World) -> Iterator[Path]:
    """Yield a temporary folder to all ranks, which becomes ``folder`` if all succeed."""
    with ExitStack() as stack:

        def begin() -> Path:
            remove_unfinished(folder.parent)
            return stack.enter_context(atomic_folder(folder))

        yield world.decide(begin)
        world.decide(stack.close)


def remove_old(run: Path, num_kept: int, last_shared_step: int | None = None) -> None:
    """Remove all checkpoints but the newest ``num_kept`` and two others.

    These are the best one, and the newest one from which the run could be extended.

    Args:
        run: folder of the run.
        num_kept: number of newest checkpoints to keep.
        last_shared_step: last step from which the run can be extended, if there is one.
    """
    saved, kept = saved_steps(run), {best_step(run)}
    if last_shared_step is not None:
        kept.update([one for one in saved if step_number(one) <= last_shared_step][-1:])
    for old in saved[:-num_kept]:
        if old not in kept:
            shutil.rmtree(old)


def count_damaged(tensors: Iterable[Tensor]) -> int:
    """Return how many tensors hold values that are not finite.

    A tensor's extremes are not finite if any value is not; to find them takes one pass, and no
    memory.
    """
    finite = [torch.stack(t.detach().aminmax()).isfinite().all() for t in tensors if t.numel()]
    return int((~torch.stack(finite)).sum()) if finite else 0


def moments(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimiser by the names of the parameters it belongs to."""
    return {
        f"{name}/{key}": value
        for name, parameter in trained.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
