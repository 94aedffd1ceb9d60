"""The training step of all models: data, model and optimiser, without files."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from bytelm.config import Cooldown, Recipe
from bytelm.data import IGNORED, Batch, Dataset, LoaderState
from bytelm.errors import ConfigError
from bytelm.progress import ignore
from bytelm.stopping import Stopped, Stopping
from bytelm.training.distributed import World
from bytelm.training.flops import (
    Stretches,
    full_step_flops,
    mean_step_flops,
    peak_flops,
    sample_stretches,
)
from bytelm.training.guards import Guard
from bytelm.training.objective import Likelihood, measure_spans, position_nats
from bytelm.training.optim import (
    build_optimizer,
    last_shared_step,
    learning_rate,
    planned_cooldown,
)
from bytelm.training.parallel import parallelize, whole
from bytelm.training.rows import load_rows
from bytelm.training.setup import choose_device, set_up
from bytelm.training.state import TrainerState
from bytelm.training.validation import held_out_spans

SAMPLE_STEPS = 100
"""Steps that a sample of rows counts for, beside those taken, in what to expect of a step."""


@dataclass
class _Interval:
    """Totals since the last report; saved in checkpoints, so that resumed reports are the same."""

    byte_nats: float = 0.0
    target_nats: float = 0.0
    num_bytes: int = 0
    num_targets: int = 0
    num_positions: int = 0
    num_units: int = 0
    room_bytes: int = 0
    room_units: int = 0
    seconds: float = 0.0
    flops: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the interval."""
        figures = {
            "loss": self.target_nats / max(self.num_targets, 1),
            "bpb": self.byte_nats / math.log(2) / max(self.num_bytes, 1),
            "bytes_per_second": self.num_bytes / self.seconds,
            "padded_bytes": 1 - self.num_positions / max(self.room_bytes, 1),
        }
        if self.num_units:
            figures["patch_size"] = self.num_positions / self.num_units
            figures["padded_patches"] = 1 - self.num_units / self.room_units
        return figures


class _Counts(NamedTuple):
    """What the rows of a step hold."""

    targets: int
    bytes: int
    positions: int
    units: int
    room_bytes: int
    room_units: int
    flops: float


class _Nats(NamedTuple):
    """Negative log-likelihood of a step's targets, and of its bytes."""

    targets: float
    bytes: float


class Trainer:
    """Data, model and optimiser of a recipe; independent of run folders and displays.

    Args:
        recipe: the recipe.
        has_weights: whether weights will be loaded that replace those of ``init``.
        world: the ranks that train together; ``None`` for this one alone.

    Raises:
        ConfigError, CheckpointError, DataError, PatchingError: as
            :func:`bytelm.training.setup.set_up`.
    """

    def __init__(
        self, recipe: Recipe, *, has_weights: bool = False, world: World | None = None
    ) -> None:
        self.world = world = world or World()
        world.check_shares(recipe.data.rows_per_step)
        self.device = choose_device(recipe.train)
        self.setup = set_up(recipe, self.device, has_weights=has_weights, world=world)
        self.recipe, self.lm = self.setup.recipe, self.setup.lm
        data = self.recipe.data
        parallelize(self.lm, self.recipe.train, self.device, world)
        self.loader = load_rows(
            self.recipe,
            self.setup.dataset,
            self.lm.units,
            rank=world.rank,
            world_size=world.size,
        )
        verify = data.verify and world.is_main
        self.held_out = Dataset(self.setup.dataset.folder, "validation", verify=verify)
        self.optimizer = build_optimizer(self.lm.trained, self.recipe.optimizer)
        self.attended_flops: float | None = 0.0
        """Training FLOPs of the rows so far; ``None`` in runs that earlier versions began."""
        self.data_fingerprint = self.setup.dataset.manifest.fingerprint
        if self.lm.units.fingerprint:
            self.data_fingerprint += f"/{self.lm.units.fingerprint}"
        self.num_steps = 0
        """Steps taken."""
        self.bytes_seen = 0
        self.interval = _Interval()
        self.guard = Guard()
        self._peak_flops = peak_flops(self.recipe.train, self.device)
        self._rate = self._norm = 0.0

    @property
    def step_flops(self) -> float:
        """Training FLOPs to expect of a step, from a sample of rows and the steps so far."""
        if self.attended_flops is None:
            return full_step_flops(self.recipe)
        spent = self.attended_flops + SAMPLE_STEPS * self._sampled_flops
        return spent / (self.num_steps + SAMPLE_STEPS)

    @cached_property
    def _sampled_flops(self) -> float:
        sample = sample_stretches(self.recipe, self.setup.dataset, self.lm.units)
        return mean_step_flops(self.recipe, sample)

    @property
    def flops(self) -> float:
        """Training FLOPs of all steps taken, as :mod:`bytelm.accounting` counts them.

        Runs that earlier versions began are charged as those were: as if each row were one
        document.
        """
        if self.attended_flops is None:
            return self.step_flops * self.num_steps
        return self.attended_flops

    @property
    def last_step(self) -> int:
        """Steps of the run; a cooldown that begins during the run changes them."""
        return self.recipe.train.steps

    def step(self, stop: Stopping | None = None) -> None:
        """Take one optimiser step: accumulate gradients, clip, update.

        Args:
            stop: requests to stop; they abandon the step unless the update has begun.

        The guard of the recipe may skip the update of the parameters.

        Raises:
            TrainingError: the guard ends the run; the parameters are unchanged.
            Stopped: a stop was requested; everything is as before the step.
        """
        stop, began, position = stop or Stopping(), time.monotonic(), self.loader.state()
        try:
            with stop.interruptible():
                counts, nats = self._accumulate(stop)
        except Stopped:
            self.loader.restore(position)
            self.optimizer.zero_grad(set_to_none=True)
            raise
        loss = nats.targets / max(counts.targets, 1)
        if self.guard.admits(loss, self._norm, self.num_steps + 1, self.recipe.train):
            self._update()
            self._count(counts, nats)
        else:
            self.optimizer.zero_grad(set_to_none=True)
        self._advance(counts)
        self.interval.seconds += time.monotonic() - began

    def _accumulate(self, stop: Stopping) -> tuple[_Counts, _Nats]:
        """Accumulate and clip the gradients of a step; return what the ranks have in sum."""
        self.world.mark()
        batch = self.loader.next_batch()
        counts = _Counts(*self.world.sum(*self._counts_of(batch)))
        num_targets = max(counts.targets, 1)
        all_nats, byte_nats = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in batch.split(self.recipe.train.micro_rows or len(batch.ids)):
            stop.check()
            micro = micro.to(self.device)
            with self._precision():
                nats = position_nats(self.lm, micro)
            # Divide by the targets of the whole step, so that micro-batches and the batches of
            # ranks equal one large batch; there may be none in rows of long prompts.
            (nats.sum() / num_targets).backward()
            with torch.no_grad():
                all_nats += nats.sum()
                byte_nats += (nats * (micro.target_bytes > 0)).sum()
        clip_norm = self.recipe.optimizer.clip_norm
        self._norm = float(whole(clip_grad_norm_(self.lm.trained.parameters(), clip_norm)))
        return counts, _Nats(*self.world.sum(float(all_nats), float(byte_nats)))

    def _update(self) -> None:
        settings = self.recipe.optimizer
        self._rate = learning_rate(self.num_steps, self.recipe.train.steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * group["lr_multiplier"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _counts_of(self, batch: Batch) -> _Counts:
        num_positions = int(batch.byte_counts.sum())
        # Rows of tokens have no fixed room for bytes.
        has_bytes = self.lm.units.byte_room == 1.0
        num_units = room_units = 0
        if batch.unit_counts is not None and batch.budget is not None:
            num_units = int(batch.unit_counts.sum())
            room_units = batch.budget * len(batch.ids)
        flops = 0.0
        if self.attended_flops is not None:
            flops = Stretches.of(self.recipe, [batch]).flops(self.recipe)
        return _Counts(
            targets=int((batch.targets != IGNORED).sum()),
            bytes=int(batch.target_bytes.sum()),
            positions=num_positions,
            units=num_units,
            room_bytes=batch.ids.numel() if has_bytes else num_positions,
            room_units=room_units,
            flops=flops,
        )

    def _count(self, counts: _Counts, nats: _Nats) -> None:
        """Count a step in the metrics."""
        interval = self.interval
        interval.target_nats += nats.targets
        interval.byte_nats += nats.bytes
        interval.num_bytes += counts.bytes
        interval.num_targets += counts.targets
        interval.num_positions += counts.positions
        interval.room_bytes += counts.room_bytes
        interval.num_units += counts.units
        interval.room_units += counts.room_units

    def _advance(self, counts: _Counts) -> None:
        """Count a step that has been computed, whether or not its update was made."""
        self.interval.flops += counts.flops
        if self.attended_flops is not None:
            self.attended_flops += counts.flops
        self.num_steps += 1
        self.bytes_seen += counts.bytes

    def cool_down(self, steps: int) -> None:
        """Begin the cooldown of a wsd schedule now, or change its end, which the recipe records.

        Args:
            steps: steps that remain.

        Raises:
            ConfigError: the schedule is not wsd.
        """
        if self.recipe.optimizer.schedule != "wsd":
            raise ConfigError("only optimizer.schedule=wsd can begin its cooldown at any time")
        now = Cooldown(start=self.num_steps, end=self.num_steps + max(steps, 1))
        earlier = [c for c in self.cooldowns if c.start < now.start]
        self.recipe = with_cooldowns(self.recipe, [*earlier, now])

    @property
    def cooldowns(self) -> list[Cooldown]:
        """Cooldowns of the schedule that have begun."""
        optimizer, steps = self.recipe.optimizer, self.recipe.train.steps
        cooldowns = optimizer.cooldowns or [planned_cooldown(steps, optimizer)]
        return [c for c in cooldowns if c.start < self.num_steps]

    @property
    def last_shared_step(self) -> int | None:
        """See :func:`bytelm.training.optim.last_shared_step`."""
        return last_shared_step(self.last_step, self.recipe.optimizer)

    @property
    def begins_cooldown(self) -> bool:
        """Whether the cooldown that the recipe plans begins with the next step."""
        is_planned = self.recipe.optimizer.cooldowns is None
        return is_planned and self.num_steps == self.last_shared_step

    def report(self) -> dict[str, float]:
        """Return the metrics since the last report, and begin a new interval."""
        interval, self.interval = self.interval, _Interval()
        # Each rank draws spans for its own rows.
        (epochs,) = self.world.sum(self.loader.epochs)
        figures = interval.metrics()
        if self._peak_flops is not None:
            peak = self._peak_flops * self.world.size
            figures["mfu"] = interval.flops / interval.seconds / peak
        if self.recipe.train.max_skipped:
            figures["skipped_steps"] = self.guard.skipped
        return {
            **figures,
            "learning_rate": self._rate,
            "gradient_norm": self._norm,
            "bytes_seen": self.bytes_seen,
            "epochs": epochs,
            "flops": self.flops,
        }

    def evaluate(self, report: Callable[[int], None] = ignore) -> dict[str, Likelihood]:
        """Return the likelihood of held-out text by source; empty if nothing is held out.

        Args:
            report: called with the bytes that this rank has measured so far, by all ranks as often.
        """
        if not len(self.held_out):
            return {}
        context_bytes = self.recipe.data.row_bytes
        spans = held_out_spans(
            self.held_out,
            max_bytes=self.recipe.train.validation_bytes,
            context_bytes=context_bytes,
        )
        # Held-out rows have many shapes: compiling each would take longer than running it.
        stance = torch.compiler.set_stance("force_eager")
        with _evaluating(self.lm), self._precision(), stance:
            return measure_spans(
                self.lm, spans, context_bytes=context_bytes, report=report, world=self.world
            )

    def state(self, metrics_bytes: int, is_validation_due: bool) -> TrainerState:
        """Return the state to resume from, except tensors."""
        return TrainerState(
            step=self.num_steps,
            data=LoaderState.join(self.world.gather(self.loader.state())),
            data_fingerprint=self.data_fingerprint,
            metrics_bytes=metrics_bytes,
            bytes_seen=self.bytes_seen,
            attended_flops=self.attended_flops,
            interval=asdict(self.interval),
            guard=asdict(self.guard),
            is_validation_due=is_validation_due,
            threads=torch.get_num_threads(),
        )

    def restore(self, state: TrainerState) -> None:
        """Resume from a state; parameters and moments are restored separately."""
        self.num_steps = state.step
        self.bytes_seen = state.bytes_seen
        self.attended_flops = state.attended_flops
        self.loader.restore(state.data)
        self.interval = _Interval(**state.interval)
        self.guard = Guard(**state.guard)

    def _precision(self) -> AbstractContextManager[object]:
        if self.recipe.train.precision_on(self.device.type) == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


@contextmanager
def _evaluating(lm: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and each back into its own mode afterwards.

    A scorer is in evaluation mode all the time.
    """
    training = [module for module in lm.modules() if module.training]
    lm.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def with_cooldowns(recipe: Recipe, cooldowns: list[Cooldown]) -> Recipe:
    """Return a recipe with a wsd schedule that was decided during its run."""
    optimizer = recipe.optimizer.model_copy(update={"cooldowns": cooldowns})
    train = recipe.train.model_copy(update={"steps": cooldowns[-1].end})
    return recipe.model_copy(update={"optimizer": optimizer, "train": train})
