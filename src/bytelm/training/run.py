"""A training run: a folder with a recipe, metrics and checkpoints, that can be left and resumed."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bytelm.checkpoint import saved_steps
from bytelm.config import Recipe, differences, dump_yaml, load_recipe
from bytelm.errors import CheckpointError, ConfigError, TrainingError
from bytelm.progress import Callback, StopTraining
from bytelm.storage import disk_errors, is_vacant, locked, write_text
from bytelm.tracking import JsonlMetrics, TensorBoardMetrics
from bytelm.training.objective import Likelihood, total
from bytelm.training.state import load_step, save_step, step_folder
from bytelm.training.trainer import Trainer

RECIPE, METRICS, TENSORBOARD = "recipe.yaml", "metrics.jsonl", "tensorboard"
RESUME = "{remedy} and run the same command again: it resumes from the last checkpoint"
"""Advice when the disk refuses; see :func:`bytelm.storage.disk_errors`."""

# Settings that may change when a run is resumed: they do not change what is computed (though
# another device rounds differently).
RESUME_FREELY = {
    "data.path",
    "data.tokenizer",
    "data.verify",
    "train.device",
    "train.compile",
    "train.log_every",
    "train.validate_every",
    "train.validation_bytes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.tensorboard",
}


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended."""

    step: int
    finished: bool
    """False where it was stopped before its last step."""
    validation: dict[str, Likelihood]
    """Held-out text by source, at the last step; empty where the run stopped early."""
    flops: float
    bytes_seen: int


def train(
    recipe: Recipe,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    time_limit: float | None = None,
) -> TrainingResult:
    """Train a recipe in a folder, or go on with the run that is there.

    SIGINT and SIGTERM end the run after the step in progress, with a checkpoint.

    Args:
        recipe: of a transformer or a BLT.
        folder: of the run; made if need be.
        callbacks: told how the run goes on, in this order.
        time_limit: seconds after which to stop as if by a signal.

    Raises:
        ConfigError: the recipe lacks something, or differs from that of the run in the folder.
        DataError: the data is missing, damaged or unfit.
        CheckpointError: a checkpoint is damaged or cannot be written.
        TrainingError: the loss is no longer finite.
    """
    _check_folder(recipe, folder)
    trainer = Trainer(recipe)
    with disk_errors(folder, CheckpointError, RESUME), locked(folder):
        # Only now: a recipe that cannot be used must not keep the folder from one that can.
        _write_recipe(recipe, folder)
        metrics_bytes = _resume(folder, trainer)
        run = _Run(folder, trainer, metrics_bytes, callbacks)
        try:
            return run.train(time_limit)
        finally:
            run.end()


class _Run:
    """A trainer and the folder that keeps what it does."""

    def __init__(
        self, folder: Path, trainer: Trainer, metrics_bytes: int, callbacks: Sequence[Callback]
    ) -> None:
        self.folder, self.trainer = folder, trainer
        self.jsonl = JsonlMetrics(folder / METRICS, metrics_bytes)
        self.callbacks: list[Callback] = [self.jsonl]
        if trainer.recipe.train.tensorboard:
            self.callbacks.append(TensorBoardMetrics(folder / TENSORBOARD, trainer.num_steps))
        self.callbacks += callbacks

    def train(self, time_limit: float | None) -> TrainingResult:
        """Take steps to the last, or until told to stop."""
        trainer, config, began = self.trainer, self.trainer.recipe.train, time.monotonic()
        for callback in self.callbacks:
            callback.on_begin(trainer.num_steps, config.steps)
        validation: dict[str, Likelihood] = {}
        with _stop_signals() as stop:
            while trainer.num_steps < config.steps and not stop:
                self._step()
                step = trainer.num_steps
                is_last = step == config.steps
                try:
                    if step % config.log_every == 0 or is_last:
                        self._write(trainer.report())
                    if step % config.validate_every == 0 or is_last:
                        validation = self._validate()
                except StopTraining:
                    stop.append("callback")
                if time_limit is not None and time.monotonic() - began > time_limit:
                    stop.append("time limit")
                if step % config.checkpoint_every == 0 or is_last or stop:
                    self._save()
        finished = trainer.num_steps == config.steps
        if not finished:
            validation = {}
        elif not validation:
            validation = trainer.evaluate()
        return TrainingResult(
            trainer.num_steps, finished, validation, trainer.flops, trainer.bytes_seen
        )

    def end(self) -> None:
        """Tell the callbacks that the run has ended."""
        for callback in self.callbacks:
            callback.on_end()

    def _step(self) -> None:
        try:
            self.trainer.step()
        except TrainingError as error:
            raise self._diverged(str(error)) from None

    def _diverged(self, what: str) -> TrainingError:
        saved = saved_steps(self.folder)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "none was saved yet"
        return TrainingError(
            f"{what}; {kept}. Start again in another folder with a lower optimizer.learning_rate "
            "or more optimizer.warmup_steps, or look at the data around this step"
        )

    def _write(self, metrics: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.on_metrics(self.trainer.num_steps, metrics)

    def _validate(self) -> dict[str, Likelihood]:
        by_source = self.trainer.evaluate()
        if not by_source:
            return by_source
        everything = total(by_source.values())
        if not math.isfinite(everything.nats):
            raise self._diverged(
                f"the held-out loss is no longer finite at step {self.trainer.num_steps}"
            )
        metrics = {
            "validation_bpb": everything.bits_per_byte,
            "validation_flops": self.trainer.flops,
        }
        if everything.num_units:
            metrics["validation_patch_size"] = everything.unit_bytes
        for name, likelihood in sorted(by_source.items()):
            metrics[f"validation_bpb/{name}"] = likelihood.bits_per_byte
        self._write(metrics)
        return by_source

    def _save(self) -> None:
        trainer, folder = self.trainer, step_folder(self.folder, self.trainer.num_steps)
        if folder.exists():
            return
        if not all(bool(p.isfinite().all()) for p in trainer.lm.trained.parameters()):
            raise self._diverged(f"weights are no longer finite at step {trainer.num_steps}")
        training = {
            "step": trainer.num_steps,
            "bytes_seen": trainer.bytes_seen,
            "flops": trainer.flops,
            "recipe": trainer.recipe.model_dump(mode="json"),
        }
        save_step(
            self.folder,
            trainer.setup,
            trainer.optimizer,
            trainer.state(self.jsonl.position()),
            training,
        )
        for callback in self.callbacks:
            callback.on_checkpoint(trainer.num_steps, folder)


def _check_folder(recipe: Recipe, folder: Path) -> None:
    """The folder is new, or holds a run of the same recipe, or one that saved nothing."""
    path = folder / RECIPE
    if saved_steps(folder):
        old = load_recipe(str(path)).model_dump(mode="json")
        changed = differences(old, recipe.model_dump(mode="json"))
        serious = [line for line in changed if line.split(":")[0] not in RESUME_FREELY]
        if serious:
            raise ConfigError(
                f"{folder} holds a run of another recipe ({'; '.join(serious)}): use another "
                "folder, or the same settings to resume it"
            )
    elif not path.exists() and not is_vacant(folder):
        raise ConfigError(f"{folder} is not empty and holds no run: choose another folder")


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the recipe, whole or not at all; one that has saved a checkpoint stays as it is."""
    if not saved_steps(folder):
        write_text(folder / RECIPE, dump_yaml(recipe))


def _resume(folder: Path, trainer: Trainer) -> int:
    """Go on from the newest checkpoint, if there is one; where its metrics ended."""
    saved = saved_steps(folder)
    if not saved:
        return 0
    state = load_step(saved[-1], trainer.lm.trained, trainer.optimizer, trainer.device)
    if state.data_fingerprint != trainer.data_fingerprint:
        raise ConfigError(
            f"{folder} was trained on other data than {trainer.setup.dataset.folder} holds now: "
            "restore that data, or start in another folder"
        )
    trainer.restore(state)
    return state.metrics_bytes


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that fills when the process is asked to stop."""
    asked: list[str] = []

    def ask(number: int, frame: object) -> None:
        asked.append(signal.Signals(number).name)

    # Handlers can be set in the main thread only; elsewhere the caller handles signals.
    try:
        old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
