"""Training runs: folders with a recipe, metrics and checkpoints, which can be resumed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.checkpoint import read_config, saved_steps
from bytelm.config import Cooldown, Recipe, differences, dump_yaml, load_recipe
from bytelm.errors import CheckpointError, ConfigError, NumericalError, TrainingError
from bytelm.layout import METRICS as METRICS
from bytelm.layout import RECIPE
from bytelm.progress import BeginCooldown, Callback, StopTraining
from bytelm.stopping import Stopped, Stopping
from bytelm.storage import disk_errors, is_vacant, locked, read_json, write_json, write_text
from bytelm.tracking import JsonlMetrics
from bytelm.training.best import BestCheckpoint
from bytelm.training.distributed import World, join
from bytelm.training.extension import extend, find_base
from bytelm.training.objective import Likelihood, total
from bytelm.training.parallel import local
from bytelm.training.setup import choose_device
from bytelm.training.state import TrainerState, load_step, save_step, step_folder
from bytelm.training.trackers import check_trackers, open_trackers
from bytelm.training.trainer import Trainer, with_cooldowns

ORIGIN = "init.json"
"""Record of the checkpoint that a run began with."""
RESUME = "{remedy} and run the same command again: it resumes from the last checkpoint"
"""Advice after a disk error; see :func:`bytelm.storage.disk_errors`."""

# Settings that may change when a run is resumed: they do not affect the result (except that
# another device rounds differently).
RESUME_FREELY = {
    "data.path",
    "data.tokenizer",
    "data.verify",
    "train.device",
    "train.compile",
    "train.compile_blocks",
    "train.activation_checkpointing",
    "train.shard_ranks",
    "train.reshard",
    "train.log_every",
    "train.validate_every",
    "train.validation_bytes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "track.tensorboard",
    "track.wandb",
    "track.wandb.project",
    "track.wandb.entity",
    "track.wandb.name",
    "track.wandb.mode",
}


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

    Raises:
        ConfigError: the recipe is incomplete, or differs from that of the run in the folder, or
            that run cannot be extended, or the ranks cannot share the rows.
        DataError: the data is missing, damaged or unsuitable.
        PatchingError: the wanted patch size cannot be reached.
        CheckpointError: a checkpoint is damaged or cannot be written.
        TrainingError: the loss or a weight is not finite.
        Stopped: a stop was requested before the run was set up.
    """
    with join(choose_device(recipe.train).type) as world:
        stop = world.stopping(time_limit)
        options: dict[str, Any] = {"callbacks": callbacks, "stop": stop, "world": world}
        with stop.listening(), open_run(recipe, folder, **options) as run:
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
    start = world.decide(lambda: _check_start(recipe, folder)).start
    with stop.interruptible():
        recorded = _as_recorded(recipe, start)
        trainer = world.agree(lambda: Trainer(recorded, has_weights=start is not None, world=world))
    with ExitStack() as stack:
        # Another process may have trained in the meantime.
        start, is_extended = world.decide(lambda: _claim(recipe, folder, trainer, stack))
        state = superseded = None
        if start is not None:
            state = world.agree(lambda: _resume(folder, start, trainer))
            if is_extended:
                superseded = world.decide(lambda: _extend(recipe, folder, start))
        run = world.agree(lambda: Run(folder, trainer, state, callbacks, stop))
        try:
            if is_extended:
                run.announce(superseded)
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
        self.origin = _read_origin(folder)
        self.jsonl: JsonlMetrics | None = None
        self.writers: list[Callback] = []
        if self.world.is_main:
            with _writing(folder):
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
        return self.result()

    def announce(self, superseded: Path | None) -> None:
        """Report that the run was extended, and the folder that later checkpoints are in."""
        self._call(lambda callback: callback.on_extend(self.trainer.num_steps, superseded))

    def begin(self) -> None:
        """Begin, or resume with a validation that is due; to be called once, before the first step.

        Raises:
            Stopped: a stop was requested.
        """
        steps = self.trainer.num_steps, self.trainer.last_step
        self._call(lambda callback: callback.on_begin(*steps))
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
        """Call the callbacks' ``on_end``."""
        if self.world.is_main:
            self._tell(lambda callback: callback.on_end())

    def _call(self, event: Callable[[Callback], None]) -> None:
        """Report an event, and begin the cooldown if a callback asks for it."""
        for steps in self.world.decide(lambda: self._tell(event)):
            self.trainer.cool_down(steps)

    def _tell(self, event: Callable[[Callback], None]) -> list[int]:
        """Report an event to the run's own writers, and then to every callback.

        Returns:
            The steps that remain, for each callback that asks to begin the cooldown.
        """
        cooldowns = []
        with _writing(self.folder):
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
        try:
            self.trainer.step(self.stop)
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
        self._call(lambda callback: callback.on_metrics(self.trainer.num_steps, metrics))

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
        """Save a checkpoint, unless this step has one."""
        trainer, folder = self.trainer, self._step_folder
        if self.world.decide(folder.exists):
            return
        parameters = map(local, trainer.lm.trained.parameters())
        (num_damaged,) = self.world.sum(sum(not bool(p.isfinite().all()) for p in parameters))
        if num_damaged:
            raise self._diverged(f"weights are no longer finite at step {trainer.num_steps}")
        training = {
            "step": trainer.num_steps,
            "bytes_seen": trainer.bytes_seen,
            "flops": trainer.flops,
            "recipe": trainer.recipe.model_dump(mode="json"),
            **self.origin,
        }
        with _writing(self.folder):
            metrics_bytes = self.jsonl.position() if self.jsonl is not None else 0
            save_step(
                self.folder,
                trainer.setup,
                trainer.optimizer,
                trainer.state(metrics_bytes, self.is_validation_due),
                training,
                trainer.last_shared_step,
                self.world,
            )
        self._call(lambda callback: callback.on_checkpoint(trainer.num_steps, folder))


def _writing(folder: Path) -> AbstractContextManager[None]:
    """Explain errors of writing a run; those of callbacks are left as they are."""
    return disk_errors(folder, CheckpointError, RESUME)


class _Start(NamedTuple):
    start: Path | None
    """Checkpoint to resume from, if there is one."""
    is_extended: bool = False
    """Whether the run is given more steps from there."""


def _check_folder(recipe: Recipe, folder: Path) -> _Start:
    """Check that a folder is vacant, or holds a run of the same recipe or without checkpoints.

    Returns:
        Where to start in it.
    """
    path, saved = folder / RECIPE, saved_steps(folder)
    if saved:
        old = load_recipe(str(path)).model_dump(mode="json")
        changed = differences(old, recipe.model_dump(mode="json"))
        serious = [line for line in changed if line.split(":")[0] not in RESUME_FREELY]
        if serious:
            base = find_base(recipe, folder, [line.split(":")[0] for line in serious])
            if base is not None:
                return _Start(base, is_extended=True)
            raise ConfigError(
                f"{folder} holds a run of another recipe ({'; '.join(serious)}): use another "
                "folder, or the same settings to resume it"
            )
    elif not path.exists() and not is_vacant(folder):
        raise ConfigError(f"{folder} is not empty and holds no run: choose another folder")
    return _Start(saved[-1] if saved else None)


def _check_start(recipe: Recipe, folder: Path) -> _Start:
    check_trackers(recipe)
    return _check_folder(recipe, folder)


def _claim(recipe: Recipe, folder: Path, trainer: Trainer, stack: ExitStack) -> _Start:
    """Lock a folder for as long as ``stack`` lasts, and return where to start in it."""
    with _writing(folder):
        stack.enter_context(locked(folder))
        found = _check_folder(recipe, folder)
        if found.start is None:
            # Only now, so that an invalid recipe does not occupy the folder.
            _write_recipe(recipe, folder, trainer.setup.origin)
    return found


def _extend(recipe: Recipe, folder: Path, start: Path) -> Path | None:
    with _writing(folder):
        return extend(recipe, folder, start)


def _as_recorded(recipe: Recipe, start: Path | None) -> Recipe:
    """Return a recipe with what a checkpoint's run decided: how rows are filled, cooldowns."""
    if start is None:
        return recipe
    try:
        recorded = read_config(start).training or {}
    except CheckpointError:
        # Explained when the checkpoint is loaded.
        return recipe
    old = recorded.get("recipe", {})
    # Earlier versions filled rows in order.
    rows = {"row_patches": None, "packing": "in-order", **old.get("data", {})}
    for name in ("row_patches", "packing"):
        if getattr(recipe.data, name) is None:
            data = recipe.data.model_copy(update={name: rows[name]})
            recipe = recipe.model_copy(update={"data": data})
    if recipe.optimizer.cooldowns is None:
        cooldowns = old.get("optimizer", {}).get("cooldowns") or []
        if cooldowns:
            recipe = with_cooldowns(recipe, [Cooldown(**cooldown) for cooldown in cooldowns])
    return recipe


def recorded_recipe(folder: Path) -> Recipe | None:
    """Return the recipe of a run that has checkpoints, or ``None`` if there is no such run."""
    if not saved_steps(folder):
        return None
    recipe = load_recipe(str(folder / RECIPE))
    assert isinstance(recipe, Recipe)
    return recipe


def _write_recipe(recipe: Recipe, folder: Path, origin: dict[str, Any] | None) -> None:
    """Write the recipe of a new run, and the record of ``init``."""
    if origin is not None:
        write_json(folder / ORIGIN, origin)
    elif (folder / ORIGIN).exists():
        (folder / ORIGIN).unlink()
    write_text(folder / RECIPE, dump_yaml(recipe))


def _read_origin(folder: Path) -> dict[str, Any]:
    """Return what the checkpoints of a run record about the one that it began with."""
    path = folder / ORIGIN
    return {"init": read_json(path)} if path.exists() else {}


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
