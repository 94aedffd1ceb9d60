"""Training runs: folders with a recipe, metrics and checkpoints, which can be resumed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from bytelm.checkpoint import saved_steps
from bytelm.config import Recipe
from bytelm.errors import ConfigError, NumericalError, TrainingError
from bytelm.layout import METRICS as METRICS
from bytelm.layout import step_folder, step_number
from bytelm.progress import BeginCooldown, Callback, StopTraining
from bytelm.stopping import Stopped, Stopping
from bytelm.tracking import JsonlMetrics
from bytelm.training.best import BestCheckpoint
from bytelm.training.distributed import World, join
from bytelm.training.objective import Likelihood, total
from bytelm.training.parallel import local
from bytelm.training.profiling import Profiler
from bytelm.training.saving import Saver, count_damaged, remove_old
from bytelm.training.setup import choose_device
from bytelm.training.starting import (
    Start,
    as_recorded,
    claim,
    extend_from,
    find_start,
    read_origin,
    writing,
)
from bytelm.training.state import TrainerState, load_step
from bytelm.training.trackers import check_trackers, open_trackers
from bytelm.training.trainer import Trainer
from bytelm.training.watchdog import watched


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a run."""

    step: int
    finished: bool
    """False if the run was stopped before its last step."""
    validation: dict[str, Likelihood]
    """Likelihood of held-out text by source at the last step; empty if the run was stopped."""
    flops: float
    bytes_seen: int
    stopped: str | None = None
    """Why it was stopped, such as ``SIGINT`` or ``time limit``; ``None`` if it has finished."""


def train(
    recipe: Recipe,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    time_limit: float | None = None,
    profile: tuple[int, int] | None = None,
) -> TrainingResult:
    """Train a recipe in a folder, or resume the run in that folder.

    If ``train.steps`` exceeds the steps of that run, the run is extended, from the newest
    checkpoint whose steps had the learning rates of the longer run. Later checkpoints are moved to
    ``superseded`` in the folder.

    SIGINT and SIGTERM end the run at once, with a checkpoint of the last complete step. A
    validation that is not complete then is made when the run is resumed.

    Processes that torchrun or SLURM started together train together, and stop together after the
    step in progress. All need the folder; rank 0 writes to it, all write checkpoints.

    Args:
        recipe: recipe of a transformer or a BLT.
        folder: folder of the run, created if it does not exist.
        callbacks: receivers of the run's events, called in this order, on rank 0 only.
        time_limit: seconds after which to stop, as after a signal; the step in progress may take
            :data:`bytelm.stopping.OVERTIME` longer.
        profile: first and last step to profile (:mod:`bytelm.training.profiling`).

    Raises:
        ConfigError: the recipe is incomplete, or differs from that of the run in the folder, or
            that run cannot be extended, or the ranks cannot share the rows.
        DataError: the data is missing, damaged or unsuitable.
        PatchingError: the wanted patch size cannot be reached.
        CheckpointError: a checkpoint is damaged or cannot be written.
        TrainingError: the loss or a weight is not finite.
        Stopped: a stop was requested before the run was set up.
    """
    hang = recipe.train.hang_seconds
    # Longer than the watch, which names the rank that hangs.
    timeout = None if hang is None else timedelta(seconds=2 * hang)
    with join(choose_device(recipe.train).type, timeout) as world:
        stop = world.stopping(time_limit)
        options: dict[str, Any] = {"callbacks": callbacks, "stop": stop, "world": world}
        with (
            watched(world, hang),
            stop.listening(),
            open_run(recipe, folder, **options) as run,
        ):
            run.profiler = Profiler(folder, profile, world.rank)
            return run.train()


@contextmanager
def open_run(
    recipe: Recipe,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    stop: Stopping | None = None,
    world: World | None = None,
) -> Iterator["Run"]:
    """Open a run, new or resumed, to take its steps one by one; :func:`train` takes them all.

    The folder is locked until the context ends. Arguments and errors are those of :func:`train`;
    ``stop`` has the requests to stop, which interrupt if it is listening. With a ``world`` of
    several ranks, all call this.
    """
    stop, world = stop or Stopping(), world or World()
    found = world.decide(lambda: _find_start(recipe, folder))
    recorded, has_weights = as_recorded(recipe, found.checkpoint), found.checkpoint is not None
    with stop.interruptible():
        trainer = world.agree(lambda: Trainer(recorded, has_weights=has_weights, world=world))
    with ExitStack() as stack:
        origin = trainer.setup.origin
        found = world.decide(lambda: claim(recipe, folder, found, origin, stack))
        start, state, superseded = found.checkpoint, None, None
        if start is not None:
            state = world.agree(lambda: _resume(folder, start, trainer))
            if found.is_extended:
                superseded = world.decide(lambda: extend_from(recipe, folder, start))
        run = world.agree(lambda: Run(folder, trainer, state, callbacks, stop))
        try:
            for damaged, reason in found.damaged:
                run.announce(lambda one, x=damaged, y=reason: one.on_damaged(x, y))
            if found.is_extended:
                step = trainer.num_steps
                run.announce(lambda one: one.on_extend(step, superseded))
            yield run
        finally:
            run.end()


class Run:
    """A trainer, and the folder of its metrics and checkpoints; made by :func:`open_run`."""

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        state: TrainerState | None,
        callbacks: Sequence[Callback],
        stop: Stopping,
    ) -> None:
        self.folder, self.trainer, self.callbacks = folder, trainer, callbacks
        self.world = trainer.world
        self.stop = stop
        """Requests to stop."""
        self.origin = read_origin(folder)
        self.saver = Saver(folder, self.world)
        self.profiler = Profiler(folder, None, self.world.rank)
        self.jsonl: JsonlMetrics | None = None
        self.writers: list[Callback] = []
        if self.world.is_main:
            with writing(folder):
                self._open_writers(state.metrics_bytes if state else 0)
        self.validation: dict[str, Likelihood] = {}
        """Likelihood of held-out text by source at the last validation."""
        self.is_validation_due = state is not None and state.is_validation_due

    def _open_writers(self, metrics_bytes: int) -> None:
        self.jsonl = JsonlMetrics(self.folder / METRICS, metrics_bytes)
        self.writers = [self.jsonl, BestCheckpoint(self.folder)]
        self.writers += open_trackers(self.trainer.recipe, self.folder, self.trainer.num_steps)

    @property
    def _step_folder(self) -> Path:
        return step_folder(self.folder, self.trainer.num_steps)

    @property
    def has_all_steps(self) -> bool:
        """Whether all steps are taken."""
        return self.trainer.num_steps == self.trainer.last_step

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, and the last validation is made."""
        return self.has_all_steps and not self.is_validation_due

    def train(self) -> TrainingResult:
        """Train to the last step, or until a request to stop."""
        try:
            self.begin()
            while not self.finished and not self.stop.reason:
                self.step()
                self.stop.agree()
        except Stopped:
            # Nothing that counts is lost: see Trainer.step.
            pass
        if self.stop.reason:
            self.save()
        self._finish_saving(wait=True)
        return self.result()

    def begin(self) -> None:
        """Begin, or resume with a validation that is due; to be called once, before the first step.

        Raises:
            Stopped: a stop was requested.
        """
        steps = self.trainer.num_steps, self.trainer.last_step
        self.announce(lambda callback: callback.on_begin(*steps))
        if self.is_validation_due:
            self.validate()
        elif self.has_all_steps:
            self.validation = self._evaluate()

    def step(self) -> None:
        """Take a step, and report, save and validate as often as the recipe says.

        Raises:
            Stopped: a stop was requested; the step, or the validation, is not made.
        """
        trainer, config = self.trainer, self.trainer.recipe.train
        self._step()
        self._finish_saving(wait=False)
        step, is_last = trainer.num_steps, self.has_all_steps
        self.is_validation_due = step % config.validate_every == 0 or is_last
        if step % config.log_every == 0 or is_last:
            self._report(trainer.report())
        # The run can be extended from the step before its cooldown.
        if step % config.checkpoint_every == 0 or is_last or trainer.begins_cooldown:
            self.save()
        if self.is_validation_due:
            self.validate()

    def result(self) -> TrainingResult:
        """Return the outcome so far."""
        trainer = self.trainer
        return TrainingResult(
            step=trainer.num_steps,
            finished=self.finished,
            validation=self.validation if self.finished else {},
            flops=trainer.flops,
            bytes_seen=trainer.bytes_seen,
            stopped=None if self.finished else self.stop.reason,
        )

    def end(self) -> None:
        """Complete a checkpoint that is being written, and call the callbacks' ``on_end``."""
        self.profiler.end()
        self.saver.end()
        if self.world.is_main:
            self._tell(lambda callback: callback.on_end())

    def announce(self, event: Callable[[Callback], None]) -> None:
        """Report an event, and begin the cooldown if a callback asks for it."""
        for steps in self.world.decide(lambda: self._tell(event)):
            self.trainer.cool_down(steps)

    def _tell(self, event: Callable[[Callback], None]) -> list[int]:
        """Report an event to the run's own writers, and then to every callback.

        Returns:
            The steps that remain, for each callback that asks to begin the cooldown.
        """
        cooldowns = []
        with writing(self.folder):
            for writer in self.writers:
                event(writer)
        for callback in self.callbacks:
            try:
                event(callback)
            except StopTraining:
                self.stop.request("callback")
            except BeginCooldown as request:
                cooldowns.append(request.steps)
        return cooldowns

    def _step(self) -> None:
        step = self.trainer.num_steps + 1
        self.profiler.begin(step)
        try:
            self.trainer.step(self.stop)
            self.profiler.end(step)
        except TrainingError as error:
            raise self._diverged(str(error)) from None

    def _diverged(self, what: str, is_saved: bool = False) -> TrainingError:
        saved = saved_steps(self.folder)
        if is_saved:
            saved = [one for one in saved if one != self._step_folder]
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "none was saved yet"
        return TrainingError(
            f"{what}; {kept}. Start again in another folder with a lower optimizer.learning_rate "
            "or more optimizer.warmup_steps, or check the data around this step"
        )

    def _report(self, metrics: dict[str, float]) -> None:
        self.announce(lambda callback: callback.on_metrics(self.trainer.num_steps, metrics))

    def _evaluate(self) -> dict[str, Likelihood]:
        try:
            with self.stop.interruptible():
                return self.trainer.evaluate(lambda num_bytes: self.stop.check_together())
        except NumericalError as error:
            step = self.trainer.num_steps
            what = f"the held-out loss is no longer finite at step {step}"
            raise self._diverged(what, is_saved=True) from error

    def validate(self) -> None:
        """Measure and report the likelihood of held-out text by source.

        Raises:
            Stopped: a stop was requested.
        """
        self.validation = self._evaluate()
        if self.validation:
            self._report(self._validation_metrics())
        self.is_validation_due = False

    def _validation_metrics(self) -> dict[str, float]:
        by_source = self.validation
        everything = total(by_source.values())
        metrics = {
            "validation_bpb": everything.bits_per_byte,
            "validation_flops": self.trainer.flops,
        }
        if everything.num_units:
            metrics["validation_patch_size"] = everything.unit_bytes
        for name, likelihood in sorted(by_source.items()):
            metrics[f"validation_bpb/{name}"] = likelihood.bits_per_byte
        return metrics

    def save(self) -> None:
        """Save a checkpoint, unless this step has one; on several ranks, begin to."""
        self._finish_saving(wait=True)
        trainer, folder = self.trainer, self._step_folder
        if self.world.decide(folder.exists):
            return
        parameters = map(local, trainer.lm.trained.parameters())
        (num_damaged,) = self.world.sum(count_damaged(parameters))
        if num_damaged:
            raise self._diverged(f"weights are no longer finite at step {trainer.num_steps}")
        training = {
            "step": trainer.num_steps,
            "bytes_seen": trainer.bytes_seen,
            "flops": trainer.flops,
            "recipe": trainer.recipe.model_dump(mode="json"),
            **self.origin,
        }
        with writing(self.folder):
            metrics_bytes = self.jsonl.position() if self.jsonl is not None else 0
            state = trainer.state(metrics_bytes, self.is_validation_due)
            num_kept = trainer.recipe.train.keep_checkpoints
            remove = partial(remove_old, self.folder, num_kept, trainer.last_shared_step)
            self.saver.save(trainer.setup, trainer.optimizer, state, training, remove)
        self._finish_saving(wait=False)

    def _finish_saving(self, *, wait: bool) -> None:
        """Announce a checkpoint that is complete."""
        with writing(self.folder):
            folder = self.saver.finish(wait=wait)
        if folder is not None:
            self.announce(lambda callback: callback.on_checkpoint(step_number(folder), folder))


def _find_start(recipe: Recipe, folder: Path) -> Start:
    check_trackers(recipe)
    return find_start(recipe, folder)


def _resume(folder: Path, start: Path, trainer: Trainer) -> TrainerState:
    """Resume from a checkpoint, and return its state."""
    setup, world = trainer.setup, trainer.world
    state = load_step(start, setup.lm.trained, trainer.optimizer, trainer.device, world)
    if state.data_fingerprint != trainer.data_fingerprint:
        raise ConfigError(
            f"{folder} was trained on other data than {trainer.setup.dataset.folder} now holds: "
            "restore that data, or start in another folder"
        )
    trainer.restore(state)
    return state
