"""A training run: a folder with a recipe, metrics and checkpoints, that can be left and resumed."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bytelm.checkpoint import is_vacant, locked, saved_steps
from bytelm.config import Recipe, differences, dump_yaml, load_recipe
from bytelm.errors import CheckpointError, ConfigError, TrainingError
from bytelm.evaluation import Likelihood, total
from bytelm.tracking import JsonlSink, LiveLine, Sink, TensorBoardSink
from bytelm.training.state import load_step, save_step, step_folder
from bytelm.training.trainer import Trainer

RECIPE, METRICS, TENSORBOARD = "recipe.yaml", "metrics.jsonl", "tensorboard"

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
    console: Console | None = None,
    title: str = "training",
    time_limit: float | None = None,
) -> TrainingResult:
    """Train a recipe in a folder, or go on with the run that is there.

    SIGINT and SIGTERM end the run after the step in progress, with a checkpoint.

    Args:
        recipe: of a transformer or a BLT.
        folder: of the run; made if need be.
        console: where progress is shown.
        title: of the progress line.
        time_limit: seconds after which to stop as if by a signal.

    Raises:
        ConfigError: the recipe lacks something, or differs from that of the run in the folder.
        DataError: the data is missing, damaged or unfit.
        CheckpointError: a checkpoint is damaged or cannot be written.
        TrainingError: the loss is no longer finite.
    """
    _check_folder(recipe, folder)
    trainer = Trainer(recipe)
    with _disk_errors(folder), locked(folder):
        # Only now: a recipe that cannot be used must not keep the folder from one that can.
        _write_recipe(recipe, folder)
        metrics_bytes = _resume(folder, trainer)
        run = _Run(folder, trainer, metrics_bytes)
        shown = console or Console(quiet=True)
        with LiveLine(shown, title, recipe.train.steps, trainer.num_steps) as line:
            try:
                return run.train(line, time_limit)
            finally:
                run.close()


class _Run:
    """A trainer and the folder that keeps what it does."""

    def __init__(self, folder: Path, trainer: Trainer, metrics_bytes: int) -> None:
        self.folder, self.trainer = folder, trainer
        self.jsonl = JsonlSink(folder / METRICS, metrics_bytes)
        self.sinks: list[Sink] = [self.jsonl]
        if trainer.recipe.train.tensorboard:
            self.sinks.append(TensorBoardSink(folder / TENSORBOARD, trainer.num_steps))

    def train(self, line: LiveLine, time_limit: float | None) -> TrainingResult:
        """Take steps to the last, or until told to stop."""
        trainer, config, began = self.trainer, self.trainer.recipe.train, time.monotonic()
        validation: dict[str, Likelihood] = {}
        with _stop_signals() as stop:
            while trainer.num_steps < config.steps and not stop:
                self._step()
                step = trainer.num_steps
                is_last = step == config.steps
                if step % config.log_every == 0 or is_last:
                    self._report(line)
                if step % config.validate_every == 0 or is_last:
                    validation = self._validate(line)
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

    def close(self) -> None:
        """Nothing more will come."""
        for sink in self.sinks:
            sink.close()

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

    def _report(self, line: LiveLine) -> None:
        metrics = self.trainer.report()
        self._write(metrics)
        figures = f"{metrics['bpb']:.3f} bpb  {_si(metrics['bytes_per_second'])}B/s"
        if "patch_size" in metrics:
            padded = (metrics["padded_bytes"], metrics["padded_patches"])
            figures += f"  {metrics['patch_size']:.2f} bytes/patch"
            figures += f"  padded {padded[0]:.0%} bytes {padded[1]:.0%} patches"
        line.update(self.trainer.num_steps, figures)

    def _write(self, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.trainer.num_steps, metrics)

    def _validate(self, line: LiveLine) -> dict[str, Likelihood]:
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
        if everything.num_patches:
            metrics["validation_patch_size"] = everything.patch_size
        for name, likelihood in sorted(by_source.items()):
            metrics[f"validation_bpb/{name}"] = likelihood.bits_per_byte
        self._write(metrics)
        step = self.trainer.num_steps
        line.note(f"  step {step}: held-out {everything.bits_per_byte:.4f} bpb")
        return by_source

    def _save(self) -> None:
        trainer = self.trainer
        if step_folder(self.folder, trainer.num_steps).exists():
            return
        if not all(bool(p.isfinite().all()) for p in trainer.setup.trained.parameters()):
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
        temporary = folder / f".{RECIPE}"
        temporary.write_text(dump_yaml(recipe), "utf-8")
        temporary.replace(folder / RECIPE)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn a refusal of the disk into an error that names the remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"could not write {error.filename or folder}: {error.strerror or error}; free some "
            "space or check the path, and run the same command again: it goes on from the last "
            "checkpoint"
        ) from error


def _resume(folder: Path, trainer: Trainer) -> int:
    """Go on from the newest checkpoint, if there is one; where its metrics ended."""
    saved = saved_steps(folder)
    if not saved:
        return 0
    state = load_step(saved[-1], trainer.setup.trained, trainer.optimizer, trainer.device)
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


def _si(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"
