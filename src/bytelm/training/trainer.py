"""The training loop: one for entropy models, BLTs and plain byte transformers."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.utils import clip_grad_norm_

from bytelm import codec
from bytelm.accounting import training_flops
from bytelm.checkpoint import saved_steps
from bytelm.config import BLTConfig, Recipe, TransformerConfig, differences, dump_yaml, load_recipe
from bytelm.data import IGNORED, Batch, Dataset, Loader
from bytelm.data.dataset import MANIFEST, file_hash
from bytelm.errors import ConfigError, TrainingError
from bytelm.evaluation import (
    Likelihood,
    batch_logits,
    dataset_pieces,
    evaluate_pieces,
    position_nats,
    total,
)
from bytelm.patching import build_patcher
from bytelm.tracking import JsonlSink, LiveLine, Sink, TensorBoardSink
from bytelm.training.optim import build_optimizer, learning_rate
from bytelm.training.setup import Setup, choose_device, set_up
from bytelm.training.state import TrainerState, load_step, save_step, step_folder

RECIPE, METRICS = "recipe.yaml", "metrics.jsonl"

# Settings that may change when a run is resumed: they do not change the numbers.
RESUME_FREELY = {
    "data.path",
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


@dataclass
class _Interval:
    """Totals since the last report; part of a checkpoint, so that reports survive a stop."""

    byte_nats: float = 0.0
    target_nats: float = 0.0
    num_bytes: int = 0
    num_targets: int = 0
    num_patches: int = 0
    room_bytes: int = 0
    room_patches: int = 0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Figures of the interval."""
        figures = {
            "loss": self.target_nats / self.num_targets,
            "bpb": self.byte_nats / math.log(2) / max(self.num_bytes, 1),
            "bytes_per_second": self.num_bytes / self.seconds,
            "padded_bytes": 1 - self.num_targets / self.room_bytes,
        }
        if self.num_patches:
            figures["patch_size"] = self.num_targets / self.num_patches
            figures["padded_patches"] = 1 - self.num_patches / self.room_patches
        return figures


def train(
    recipe: Recipe,
    run: Path,
    *,
    console: Console | None = None,
    title: str = "training",
    time_limit: float | None = None,
) -> TrainingResult:
    """Train a recipe in a folder, or go on with the run that is there.

    SIGINT and SIGTERM end the run after the step in progress, with a checkpoint.

    Args:
        recipe: of a transformer or a BLT.
        run: folder of the run; made if need be.
        console: where progress is shown.
        title: of the progress line.
        time_limit: seconds after which to stop as if by a signal.

    Raises:
        ConfigError: the recipe lacks something, or differs from that of the run in the folder.
        DataError: the data is missing, damaged, unfit, or not that of the run.
        CheckpointError: a checkpoint is damaged or cannot be written.
        TrainingError: the loss is no longer finite.
    """
    return _Trainer(recipe, run, console or Console(quiet=True), title).run(time_limit)


class _Trainer:
    def __init__(self, recipe: Recipe, run: Path, console: Console, title: str) -> None:
        _claim_folder(recipe, run)
        self.console, self.title, self.run_folder = console, title, run
        self.device = choose_device(recipe.train)
        self.setup = set_up(recipe, self.device)
        self.recipe = self.setup.recipe
        self.train_config = self.recipe.train
        data = self.recipe.data
        patching = self.recipe.patching
        self.loader = Loader(
            self.setup.dataset,
            row_bytes=data.row_bytes,
            row_patches=data.row_patches if patching else None,
            rows_per_step=data.rows_per_step,
            patcher=build_patcher(patching) if patching else None,
            mixture=data.mixture,
            seed=self.train_config.seed,
        )
        self.held_out = Dataset(self.setup.dataset.folder, "validation", verify=data.verify)
        self.optimizer = build_optimizer(self.setup.trained, self.recipe.optimizer)
        self.step_flops = _step_flops(self.setup)
        self.data_fingerprint = file_hash(self.setup.dataset.folder / MANIFEST)
        self.interval = _Interval()
        self.state = TrainerState(0, self.loader.state(), self.data_fingerprint, 0, 0, 0.0, {})
        self._resume()
        if self.train_config.compile or (
            self.train_config.compile is None and self.device.type == "cuda"
        ):
            self.setup.trained.compile(dynamic=False)

    def _resume(self) -> None:
        saved = saved_steps(self.run_folder)
        if not saved:
            return
        self.state = load_step(saved[-1], self.setup.trained, self.optimizer, self.device)
        if self.state.data_fingerprint != self.data_fingerprint:
            raise ConfigError(
                f"{self.run_folder} was trained on other data than {self.setup.dataset.folder} "
                "holds now: restore that data, or start in another folder"
            )
        self.loader.restore(self.state.data)
        self.interval = _Interval(**self.state.interval)

    def run(self, time_limit: float | None) -> TrainingResult:
        """Train to the last step, or until told to stop."""
        config, began = self.train_config, time.monotonic()
        resume_at = self.state.metrics_bytes if self.state.step else 0
        self.jsonl = JsonlSink(self.run_folder / METRICS, resume_at)
        self.sinks: list[Sink] = [self.jsonl]
        if config.tensorboard:
            self.sinks.append(TensorBoardSink(self.run_folder / "tensorboard", self.state.step))
        validation: dict[str, Likelihood] = {}
        try:
            with (
                _stop_signals() as stop,
                LiveLine(self.console, self.title, config.steps, self.state.step) as line,
            ):
                while self.state.step < config.steps and not stop:
                    self._step()
                    step = self.state.step
                    is_last = step == config.steps
                    if step % config.log_every == 0 or is_last:
                        self._report(line)
                    if step % config.validate_every == 0 or is_last:
                        validation = self._validate(line)
                    if time_limit is not None and time.monotonic() - began > time_limit:
                        stop.append("time limit")
                    if step % config.checkpoint_every == 0 or is_last or stop:
                        self._save()
        finally:
            for sink in self.sinks:
                sink.close()
        state = self.state
        finished = state.step == config.steps
        if finished and not validation:
            validation = self._evaluate()
        return TrainingResult(
            state.step, finished, validation if finished else {}, state.flops, state.bytes_seen
        )

    def _step(self) -> None:
        """One optimiser step: accumulate, clip, update."""
        began = time.monotonic()
        config, step = self.train_config, self.state.step
        batch = self.loader.next_batch()
        num_targets = int((batch.targets != IGNORED).sum())
        all_nats, byte_nats = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in batch.split(config.micro_rows or len(batch.ids)):
            micro = micro.to(self.device)
            with self._precision():
                nats = position_nats(batch_logits(self.setup.module, micro), micro)
            # Divided by the targets of the whole step: k micro-batches equal one large batch.
            (nats.sum() / num_targets).backward()
            with torch.no_grad():
                all_nats += nats.sum()
                byte_nats += (nats * (micro.targets >= codec.OFFSET)).sum()
        norm = float(
            clip_grad_norm_(self.setup.trained.parameters(), self.recipe.optimizer.clip_norm)
        )
        if not math.isfinite(norm):
            raise TrainingError(self._not_finite(norm))
        rate = learning_rate(step, config.steps, self.recipe.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.rate, self.norm = rate, norm
        self.interval.target_nats += float(all_nats)
        self.interval.byte_nats += float(byte_nats)
        self._count(batch, num_targets)
        self.interval.seconds += time.monotonic() - began

    def _count(self, batch: Batch, num_targets: int) -> None:
        interval = self.interval
        num_bytes = int((batch.targets >= codec.OFFSET).sum())
        interval.num_bytes += num_bytes
        interval.num_targets += num_targets
        interval.room_bytes += batch.ids.numel()
        if batch.patch_counts is not None and batch.num_patches is not None:
            interval.num_patches += int(batch.patch_counts.sum())
            interval.room_patches += batch.num_patches * len(batch.ids)
        self.state.step += 1
        self.state.bytes_seen += num_bytes
        self.state.flops += self.step_flops

    def _precision(self) -> AbstractContextManager[object]:
        wanted = self.train_config.precision
        if wanted == "auto":
            wanted = "bfloat16" if self.device.type == "cuda" else "float32"
        if wanted == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _not_finite(self, norm: float) -> str:
        saved = saved_steps(self.run_folder)
        kept = (
            f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        )
        return (
            f"the loss is no longer finite at step {self.state.step + 1} (gradient norm {norm}); "
            f"{kept}. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at "
            "the data around this step"
        )

    def _report(self, line: LiveLine) -> None:
        state, interval = self.state, self.interval
        self.interval = _Interval()
        metrics = {
            **interval.metrics(),
            "learning_rate": self.rate,
            "gradient_norm": self.norm,
            "bytes_seen": state.bytes_seen,
            "epochs": self.loader.epochs,
            "flops": state.flops,
        }
        self._write(metrics)
        figures = f"{metrics['bpb']:.3f} bpb  {_si(metrics['bytes_per_second'])}B/s"
        if "patch_size" in metrics:
            figures += (
                f"  {metrics['patch_size']:.2f} bytes/patch"
                f"  padded {metrics['padded_bytes']:.1%}, {metrics['padded_patches']:.1%}"
            )
        line.update(state.step, figures)

    def _write(self, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.state.step, metrics)

    def _evaluate(self) -> dict[str, Likelihood]:
        if not len(self.held_out):
            return {}
        context_bytes = self.recipe.data.row_bytes
        pieces = dataset_pieces(
            self.held_out,
            max_bytes=self.train_config.validation_bytes,
            context_bytes=context_bytes,
        )
        with self._precision():
            return evaluate_pieces(self.setup.module, pieces, context_bytes=context_bytes)

    def _validate(self, line: LiveLine) -> dict[str, Likelihood]:
        by_source = self._evaluate()
        if not by_source:
            return by_source
        everything = total(by_source.values())
        metrics = {"validation_bpb": everything.bits_per_byte}
        if everything.num_patches:
            metrics["validation_patch_size"] = everything.patch_size
        for name, likelihood in sorted(by_source.items()):
            metrics[f"validation_bpb/{name}"] = likelihood.bits_per_byte
        self._write(metrics)
        line.note(f"  step {self.state.step}: held-out {everything.bits_per_byte:.4f} bpb")
        return by_source

    def _save(self) -> None:
        if step_folder(self.run_folder, self.state.step).exists():
            return
        self.state.data = self.loader.state()
        self.state.interval = asdict(self.interval)
        self.state.metrics_bytes = self.jsonl.position()
        save_step(
            self.run_folder,
            self.setup.module,
            self.setup.trained,
            self.setup.description,
            self.optimizer,
            self.state,
            {
                "step": self.state.step,
                "bytes_seen": self.state.bytes_seen,
                "flops": self.state.flops,
                "recipe": self.recipe.model_dump(mode="json"),
            },
            self.train_config.keep_checkpoints,
        )


def _claim_folder(recipe: Recipe, run: Path) -> None:
    """Make the folder, or check that the run in it is of the same recipe."""
    path = run / RECIPE
    if path.exists():
        old = load_recipe(str(path)).model_dump(mode="json")
        changed = differences(old, recipe.model_dump(mode="json"))
        serious = [line for line in changed if line.split(":")[0] not in RESUME_FREELY]
        if serious:
            raise ConfigError(
                f"{run} holds a run of another recipe ({'; '.join(serious)}): use another folder, "
                "or the same settings to resume it"
            )
        return
    if run.exists() and any(run.iterdir()):
        raise ConfigError(f"{run} is not empty and holds no run: choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(recipe), "utf-8")


def _step_flops(setup: Setup) -> float:
    data = setup.recipe.data
    assert isinstance(setup.recipe.model, BLTConfig | TransformerConfig)
    row = training_flops(setup.recipe.model, data.row_bytes, data.row_patches or 0)
    return float(row * data.rows_per_step)


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
