"""Runs: what each costs, before anything is trained; then trained, in slices, and measured.

::

    STUDY/runs/NAME/                a training run, as `bytelm train` makes it
    STUDY/runs/NAME/slices.jsonl    a line for each time it was worked on
    STUDY/runs/NAME/result.json     written last, when it is trained and measured
    STUDY/settled.json              thresholds and mean patches, found once

A run is a process of its own: one that dies takes nothing with it, and goes on next time from its
last checkpoint to the same numbers.
"""

import json
import math
import os
import platform
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bytelm.accounting import forward_flops, parameter_counts
from bytelm.checkpoint import load_model, read_config, read_json, write_json
from bytelm.config import (
    BLTConfig,
    CalibratedPatching,
    Recipe,
    StaticPatching,
    TransformerConfig,
    parse,
)
from bytelm.data import Dataset
from bytelm.errors import BytelmError, ConfigError, TrainingError
from bytelm.evaluation import Likelihood, dataset_pieces, evaluate_pieces, total
from bytelm.model.blt import BLT
from bytelm.model.ngram import NgramScorer
from bytelm.model.transformer import Transformer
from bytelm.study.plan import Plan, Run, run_recipe
from bytelm.study.text import (
    leaked_documents,
    scorer_folder,
    text_folder,
    tokenizer_path,
)
from bytelm.tracking import LiveLine, read_jsonl
from bytelm.training import TrainingResult, settle, step_flops, train, with_room
from bytelm.training.run import METRICS
from bytelm.training.setup import PATCH_MARGIN
from bytelm.version import __version__

TOLERANCE = 0.01
"""How far a run's FLOPs may be from its budget."""
RESULT, SLICES, ERROR, SETTLED = "result.json", "slices.jsonl", ".error.txt", "settled.json"
FAILED = 3
"""Exit status of a run's process that wrote down why it could not go on."""
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Settled:
    """A run whose recipe is complete."""

    run: Run
    recipe: Recipe
    step_flops: float
    """Of training, padding included; see :mod:`bytelm.accounting`."""
    scorer_step_flops: float
    """Of scoring the rows of a step, once, by the entropy model."""
    counts_scorer: bool

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.recipe.train.steps

    @property
    def flops(self) -> float:
        """Training FLOPs; the entropy model's among them where the plan says so."""
        scorer = self.scorer_step_flops if self.counts_scorer else 0.0
        return self.steps * (self.step_flops + scorer)

    @property
    def row_bytes(self) -> float:
        """Room for text in all rows."""
        data = self.recipe.data
        return float(self.steps * data.rows_per_step * data.row_bytes)

    def parameters(self) -> dict[str, int]:
        """Parameters by part."""
        with torch.device("meta"):
            if isinstance(self.recipe.model, BLTConfig):
                return parameter_counts(BLT(self.recipe.model))
            assert isinstance(self.recipe.model, TransformerConfig)
            return parameter_counts(Transformer(self.recipe.model))

    def inference_flops(self, unit_bytes: float | None) -> float:
        """Forward FLOPs per byte over a row, without padding.

        Args:
            unit_bytes: mean bytes per patch or token; ``None`` for a model of bytes.
        """
        return inference_flops(self.recipe, unit_bytes)


def inference_flops(recipe: Recipe, unit_bytes: float | None) -> float:
    """Forward FLOPs per byte over a row without padding."""
    row = recipe.data.row_bytes
    units = round(row / unit_bytes) if unit_bytes else 0
    assert isinstance(recipe.model, BLTConfig | TransformerConfig)
    length = row if recipe.data.tokenizer is None else units
    parts = forward_flops(recipe.model, length, units)
    return sum(part.total for part in parts.values()) / row


def is_finished(out: Path, run: Run) -> bool:
    """Whether a run is trained and measured."""
    return (out / "runs" / run.name / RESULT).exists()


def settle_run(plan: Plan, run: Run, out: Path) -> Settled:
    """Complete a run's recipe: thresholds, room, steps.

    With the study's text in ``out`` patches and tokens are measured; without it, for a dry run,
    their mean length is what the plan says.

    Raises:
        ConfigError: the budget is too small for its steps to meet it, or the plan does not say how
            long patches or tokens are.
        DataError, PatchingError: as :func:`bytelm.training.setup.settle`.
    """
    family = plan.family(run.family)
    recipe = run_recipe(plan, run)
    data = recipe.data.model_copy(update={"verify": False})
    folder = text_folder(plan, run.family, out)
    if family.vocab_size is not None:
        tokenizer = tokenizer_path(out, family.vocab_size)
        data = data.model_copy(update={"tokenizer": str(tokenizer)})
    scorer = 0.0
    if (folder / "manifest.json").exists():
        data = data.model_copy(update={"path": str(folder)})
        recipe = _settle_once(recipe.model_copy(update={"data": data}), folder, out)
        if family.scorer is not None:
            scorer = scorer_flops(out, family.scorer, data.row_bytes * data.rows_per_step)
    else:
        unit = _assumed_unit(plan, run, recipe)
        data = with_room(data, unit) if unit else data
        recipe = recipe.model_copy(update={"data": data})
    one = step_flops(recipe)
    counted = one + (scorer if plan.include_scorer else 0.0)
    if run.flops is not None:
        steps = round(run.flops / counted)
        if not steps or abs(steps * counted / run.flops - 1) > TOLERANCE:
            raise ConfigError(
                f"run {run.name!r}: {run.flops:.3g} FLOPs are {run.flops / counted:.2f} steps of "
                f"{counted:.3g}, so no number of steps comes within {TOLERANCE:.0%}: raise the "
                "budget, or make rows or data.rows_per_step smaller"
            )
    else:
        assert run.bytes is not None
        steps = max(round(run.bytes / (data.row_bytes * data.rows_per_step)), 1)
    return Settled(run, _with_steps(plan, recipe, steps), one, scorer, plan.include_scorer)


@dataclass(frozen=True)
class Cost:
    """What a run takes, as a dry run shows it."""

    name: str
    parameters: int
    """Without look-up tables: embeddings of bytes, n-grams and tokens."""
    table_parameters: int
    inference_flops: float
    """Forward, per byte, the entropy model left out."""
    steps: int
    train_bytes: float
    epochs: float | None
    flops: float
    deviation: float | None
    """From the budget, where that is in FLOPs."""
    scorer_flops: float
    """Of scoring the text that is read, once."""
    seconds: float
    disk_bytes: int
    done: float
    is_finished: bool


def run_cost(plan: Plan, run: Run, out: Path, speed: float) -> Cost:
    """What a run takes.

    Args:
        plan: of the study.
        run: which.
        out: folder of the study, with or without text.
        speed: FLOPs per second.

    Raises:
        ConfigError, DataError, PatchingError: as :func:`settle_run`.
    """
    settled = settle_run(plan, run, out)
    recipe, data = settled.recipe, settled.recipe.data
    parameters = settled.parameters()
    tables = sum(count for part, count in parameters.items() if "embedding" in part)
    read = settled.row_bytes
    text = None
    if data.path is not None:
        text = int(Dataset(Path(data.path), "train").lengths.sum())
    unit = PATCH_MARGIN * data.row_bytes / data.row_patches if data.row_patches else None
    stored = sum(parameters.values())
    finished = is_finished(out, run)
    return Cost(
        name=run.name,
        parameters=stored - tables,
        table_parameters=tables,
        inference_flops=inference_flops(recipe, unit),
        steps=settled.steps,
        train_bytes=read,
        epochs=None if text is None else read / text,
        flops=settled.flops,
        deviation=None if run.flops is None else settled.flops / run.flops - 1,
        scorer_flops=settled.steps * settled.scorer_step_flops,
        seconds=settled.flops / speed,
        # Weights and two moments in fp32, and as much again while a checkpoint replaces another.
        disk_bytes=4 * 3 * 2 * stored,
        done=1.0 if finished else min(_spent(out, run) / settled.flops, 1.0),
        is_finished=finished,
    )


def scorer_flops(out: Path, name: str, num_bytes: int) -> float:
    """FLOPs of an entropy model's forward pass over some bytes; a table has none."""
    module, config = load_model(scorer_folder(out, name))
    if isinstance(module, NgramScorer):
        return 0.0
    assert isinstance(config.model, TransformerConfig)
    length = config.context_bytes or 8192
    parts = forward_flops(config.model, length)
    return sum(part.total for part in parts.values()) / length * num_bytes


def scorer_training_flops(out: Path, name: str) -> float:
    """What training an entropy model has cost; nothing for a table."""
    folders = sorted((scorer_folder(out, name) / "checkpoints").glob("step-*"))
    if not folders:
        return 0.0
    training = read_config(folders[-1]).training or {}
    return float(training.get("flops", 0.0))


def _settle_once(recipe: Recipe, folder: Path, out: Path) -> Recipe:
    """Settle a recipe, or find what was settled for the same rows of the same data."""
    path = out / SETTLED
    known = read_json(path) if path.exists() else {}
    what = {
        "patching": recipe.patching.model_dump(mode="json") if recipe.patching else None,
        "text": str(folder.relative_to(out)),
        "tokenizer": Path(recipe.data.tokenizer).name if recipe.data.tokenizer else None,
        "row_bytes": recipe.data.row_bytes,
        "row_patches": recipe.data.row_patches,
    }
    key = json.dumps(what, sort_keys=True)
    if key not in known:
        settled = settle(recipe, Dataset(folder, "train")).model_dump(mode="json")
        known[key] = {
            "patching": settled["patching"],
            "row_patches": settled["data"]["row_patches"],
        }
        temporary = path.with_name(f".{SETTLED}-{os.getpid()}")
        write_json(temporary, known)
        temporary.replace(path)
    found = known[key]
    data = {**recipe.data.model_dump(mode="json"), "row_patches": found["row_patches"]}
    changed = {**recipe.model_dump(mode="json"), "patching": found["patching"], "data": data}
    return parse(Recipe, changed, str(path))


def _assumed_unit(plan: Plan, run: Run, recipe: Recipe) -> float | None:
    """Bytes per patch or token without data to measure; ``None`` for a model of bytes."""
    family, patching = plan.family(run.family), recipe.patching
    if family.unit_bytes is not None:
        return family.unit_bytes
    if isinstance(patching, CalibratedPatching) and patching.patch_size is not None:
        return patching.patch_size
    if isinstance(patching, StaticPatching):
        return float(patching.length)
    if patching is None and family.vocab_size is None:
        return None
    raise ConfigError(
        f"family {run.family!r} does not say how long its patches or tokens are: add "
        f"families.{run.family}.unit_bytes, or run without --dry-run first so that text is there"
    )


def _with_steps(plan: Plan, recipe: Recipe, steps: int) -> Recipe:
    often = max(steps // 8, 1)
    settings = {
        "steps": steps,
        "log_every": max(steps // 200, 1),
        "validate_every": often,
        "checkpoint_every": often,
        "keep_checkpoints": 1,
    }
    train_config = recipe.train.model_copy(update=settings)
    warmup = {"warmup_steps": round(plan.warmup_share * steps)}
    optimizer = recipe.optimizer.model_copy(update=warmup)
    return recipe.model_copy(update={"train": train_config, "optimizer": optimizer})


def run_all(
    plan: Plan,
    runs: list[Run],
    out: Path,
    *,
    workers: int,
    console: Console,
    deadline: float | None = None,
) -> list[str]:
    """Train and measure every run that is not finished, several at once.

    A signal, or the deadline, ends all of them after the step in progress, with a checkpoint.

    Args:
        plan: of the study.
        runs: which.
        out: folder of the study, its text prepared.
        workers: processes; with CUDA each has a device of its own, else a share of the cores.
        console: where progress is shown.
        deadline: by ``time.time()``, after which no step begins.

    Returns:
        What went wrong, a line for each run that did.
    """
    pending = [run for run in runs if not is_finished(out, run)]
    budgets = {run.name: settle_run(plan, run, out).flops for run in pending}
    context = get_context("spawn")
    active: dict[int, tuple[Run, Any]] = {}
    problems: list[str] = []
    total_flops, done_flops = sum(budgets.values()), 0.0
    with LiveLine(console, "study", 100) as show:
        try:
            while pending or active:
                late = deadline is not None and time.time() > deadline
                for slot in range(workers):
                    if slot not in active and pending and not late:
                        run = pending.pop(0)
                        arguments = (plan, run, out, deadline, slot, workers)
                        process = context.Process(target=_work, args=arguments, name=run.name)
                        process.start()
                        active[slot] = (run, process)
                if late and not active:
                    break
                time.sleep(POLL_SECONDS)
                for slot, (run, process) in list(active.items()):
                    if process.is_alive():
                        continue
                    del active[slot]
                    if process.exitcode:
                        problems.append(f"{run.name}: {_problem(out, run, process.exitcode)}")
                    elif is_finished(out, run):
                        done_flops += budgets[run.name]
                        show.note(_line(out, run))
                spent = sum(_spent(out, run) for run, _ in active.values())
                names = ", ".join(run.name for run, _ in active.values())
                show.update(int(100 * (done_flops + spent) / total_flops), names)
        except KeyboardInterrupt:
            pending.clear()
            for _, process in active.values():
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)
            for _, process in active.values():
                process.join()
            raise
    return problems


def _work(plan: Plan, run: Run, out: Path, deadline: float | None, slot: int, workers: int) -> None:
    """A worker's process: a slice of one run."""
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())
    else:
        torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    folder = out / "runs" / run.name
    (folder / ERROR).unlink(missing_ok=True)
    try:
        left = None if deadline is None else max(deadline - time.time(), 0.0)
        run_slice(plan, run, out, left)
    except BytelmError as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).write_text(str(error), "utf-8")
        sys.exit(FAILED)


def run_slice(plan: Plan, run: Run, out: Path, time_limit: float | None) -> bool:
    """Work on a run until it is finished or time is up; whether it is finished.

    A run that diverges is finished too: that is its result.

    Raises:
        ConfigError: the study changed since the run began.
        DataError, CheckpointError: as :func:`bytelm.training.train`.
    """
    folder = out / "runs" / run.name
    settled = settle_run(plan, run, out)
    began = time.monotonic()
    try:
        trained = train(settled.recipe, folder, time_limit=time_limit)
    except TrainingError as error:
        _finish(folder, {**_described(plan, settled, out), "failure": str(error)})
        return True
    record = {
        "steps": trained.step,
        "seconds": time.monotonic() - began,
        "peak_bytes": _peak_bytes(),
        "machine": machine(),
    }
    with (folder / SLICES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if trained.finished:
        _finish(folder, _measured(plan, settled, out, trained))
    return trained.finished


def machine() -> dict[str, Any]:
    """Where a slice ran."""
    on_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bytelm": __version__,
        "python": platform.python_version(),
    }


def _described(plan: Plan, settled: Settled, out: Path) -> dict[str, Any]:
    run, recipe = settled.run, settled.recipe
    family = plan.family(run.family)
    text_bytes = int(Dataset(out / "text", "train").lengths.sum())
    scorer_training = scorer_training_flops(out, family.scorer) if family.scorer else 0.0
    return {
        "run": asdict(run),
        "label": family.label,
        "steps": settled.steps,
        "flops": settled.flops,
        "scorer_flops": settled.steps * settled.scorer_step_flops,
        "scorer_training_flops": scorer_training,
        "parameters": settled.parameters(),
        "text_bytes": text_bytes,
        "recipe": recipe.model_dump(mode="json"),
    }


def _measured(plan: Plan, settled: Settled, out: Path, trained: TrainingResult) -> dict[str, Any]:
    recipe = settled.recipe
    folder = out / "runs" / settled.run.name
    described = _described(plan, settled, out)
    by_document, sources, leaked = held_out_likelihood(plan, settled, out)
    whole = total(by_document.values())
    unit = whole.patch_size if whole.num_patches else None
    slices = read_jsonl(folder / SLICES)
    last = read_jsonl(folder / METRICS)
    padded = [row for row in last if "padded_bytes" in row]
    return {
        **described,
        "train_bytes": trained.bytes_seen,
        "epochs": trained.bytes_seen / described["text_bytes"],
        "bpb": whole.bits_per_byte,
        "unit_bytes": unit,
        "inference_flops": inference_flops(recipe, unit),
        "evaluated_bytes": whole.num_bytes,
        "leaked_documents": leaked,
        "padded_bytes": _mean([row["padded_bytes"] for row in padded]),
        "padded_patches": _mean([row.get("padded_patches", 0.0) for row in padded]),
        "seconds": sum(one["seconds"] for one in slices),
        "peak_bytes": max(one["peak_bytes"] for one in slices),
        "slices": len(slices),
        "machine": slices[-1]["machine"],
        "failure": None,
        "documents": [
            {"document": n, "source": sources[n], "nats": one.nats, "bytes": one.num_bytes}
            for n, one in sorted(by_document.items())
        ],
    }


def held_out_likelihood(
    plan: Plan, settled: Settled, out: Path
) -> tuple[dict[int, Likelihood], dict[int, str], int]:
    """Likelihood of held-out documents by number, their sources, and how many were left out.

    Left out are documents that also stand in the training text. The pieces are the same for all
    runs of a study whose rows have the same length.
    """
    data = settled.recipe.data
    assert data.path is not None
    held_out = Dataset(Path(data.path), "validation")
    module, _ = load_model(out / "runs" / settled.run.name)
    assert not isinstance(module, NgramScorer)
    leaked = leaked_documents(Path(data.path))
    pieces = (
        piece._replace(label=str(piece.stretch.document))
        for piece in dataset_pieces(
            held_out, max_bytes=plan.text.evaluated_bytes, context_bytes=data.row_bytes
        )
        if piece.stretch.document not in leaked
    )
    found = evaluate_pieces(module, pieces, context_bytes=data.row_bytes)
    by_document = {int(label): one for label, one in found.items()}
    names, ids = held_out.source_names, held_out.source_ids
    sources = {number: names[int(ids[number])] for number in by_document}
    return by_document, sources, len(leaked)


def _finish(folder: Path, result: dict[str, Any]) -> None:
    temporary = folder / f".{RESULT}"
    write_json(temporary, result)
    temporary.replace(folder / RESULT)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _spent(out: Path, run: Run) -> float:
    """FLOPs of a run in progress, as it last reported them."""
    path = out / "runs" / run.name / METRICS
    if not path.exists():
        return 0.0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            return float(json.loads(line)["flops"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0


def _problem(out: Path, run: Run, exit_code: int) -> str:
    path = out / "runs" / run.name / ERROR
    if exit_code == FAILED and path.exists():
        return path.read_text("utf-8")
    how = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"status {exit_code}"
    return f"its process ended early ({how}); run the same command again to go on"


def _line(out: Path, run: Run) -> str:
    result = read_json(out / "runs" / run.name / RESULT)
    if result["failure"]:
        return f"{run.name}: {result['failure']}"
    bpb = result["bpb"] if result["bpb"] is not None else math.nan
    return f"{run.name}: {bpb:.4f} bpb, {result['train_bytes'] / 1e6:.1f} MB read"
