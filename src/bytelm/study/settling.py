"""What a run is and costs, before anything is trained: thresholds, room in rows, steps.

::

    STUDY/settled.json    thresholds and mean patches, found once
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from bytelm.accounting import forward_flops, parameter_counts, planned_patch_size
from bytelm.checkpoint import read_config, read_json, replacing, write_json
from bytelm.config import (
    BLTConfig,
    Recipe,
    TransformerConfig,
    load_recipe,
    parse,
)
from bytelm.data import Dataset
from bytelm.data.dataset import MANIFEST
from bytelm.errors import ConfigError
from bytelm.model.blt import BLT
from bytelm.model.transformer import Transformer
from bytelm.study.plan import Plan, Run, run_recipe
from bytelm.study.text import scorer_folder, text_folder, tokenizer_path
from bytelm.tokens import load_tokenizer
from bytelm.training import settle, step_flops, with_room
from bytelm.training.setup import PATCH_MARGIN

TOLERANCE = 0.01
"""How far a run's FLOPs may be from its budget."""
SETTLED = "settled.json"
SCORED_CONTEXT = 8192
"""Bytes of a document over which the cost of an entropy model is averaged: it reads them whole,
through its window."""


@dataclass(frozen=True)
class Settled:
    """A run whose recipe is complete."""

    run: Run
    recipe: Recipe
    step_flops: float
    """Of training, padding included; see :mod:`bytelm.accounting`."""
    scorer_step_flops: float
    """Of scoring the rows of a step by the entropy model, as if its entropies were not kept."""
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

    def parameters(self) -> tuple[int, int]:
        """Parameters in matrices and gains, and in look-up tables."""
        config = self.recipe.model
        assert isinstance(config, BLTConfig | TransformerConfig)
        with torch.device("meta"):
            counts = parameter_counts(
                BLT(config) if isinstance(config, BLTConfig) else Transformer(config)
            )
        tables = sum(count for part, count in counts.items() if "embedding" in part)
        return sum(counts.values()) - tables, tables


def inference_flops(recipe: Recipe, unit_bytes: float | None) -> float:
    """Forward FLOPs per byte over a row without padding."""
    row = recipe.data.row_bytes
    units = round(row / unit_bytes) if unit_bytes else 0
    assert isinstance(recipe.model, BLTConfig | TransformerConfig)
    length = row if recipe.data.tokenizer is None else units
    parts = forward_flops(recipe.model, length, units)
    return sum(part.total for part in parts.values()) / row


def settle_run(plan: Plan, run: Run, out: Path) -> Settled:
    """Complete a run's recipe: thresholds, room, steps.

    With the study's text (and tokenizer) in ``out`` patches and tokens are measured; without it,
    for a dry run, their mean length is what the plan says.

    Raises:
        ConfigError: the budget is too small for its steps to meet it, or the plan does not say how
            long patches or tokens are.
        DataError, PatchingError: as :func:`bytelm.training.setup.settle`.
    """
    family = plan.family(run.family)
    recipe = run_recipe(plan, run)
    data = recipe.data.model_copy(update={"verify": False})
    folder = text_folder(plan, run.family, out)
    is_there = (folder / MANIFEST).exists()
    if family.vocab_size is not None:
        tokenizer = tokenizer_path(out, family.vocab_size)
        data = data.model_copy(update={"tokenizer": str(tokenizer)})
        is_there = is_there and tokenizer.exists()
    if is_there:
        data = data.model_copy(update={"path": str(folder)})
        recipe = _settle_once(recipe.model_copy(update={"data": data}), folder, out)
    else:
        unit = _assumed_unit(plan, run, recipe)
        if unit and data.row_patches is None:
            margin = PATCH_MARGIN if family.vocab_size is None else 1.0
            data = with_room(data, unit, margin)
        recipe = recipe.model_copy(update={"data": data})
    one = step_flops(recipe)
    scorer = scorer_flops(plan, run.family, data.row_bytes * data.rows_per_step)
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
    """Of scoring all the text that is read, as if its entropies were not kept."""
    seconds: float
    disk_bytes: int


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
    parameters, tables = settled.parameters()
    read = settled.row_bytes
    text = None
    if (out / "text" / MANIFEST).exists():
        text = int(Dataset(out / "text", "train").lengths.sum())
    margin = PATCH_MARGIN if data.tokenizer is None else 1.0
    unit = margin * data.row_bytes / data.row_patches if data.row_patches else None
    return Cost(
        name=run.name,
        parameters=parameters,
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
        disk_bytes=4 * 3 * 2 * (parameters + tables),
    )


def scorer_flops(plan: Plan, family: str, num_bytes: int) -> float:
    """FLOPs of the forward pass over some bytes of a family's entropy model; a table has none."""
    name = plan.family(family).scorer
    if name is None:
        return 0.0
    recipe = load_recipe(plan.scorers[name].recipe, plan.scorers[name].overrides)
    if not isinstance(recipe.model, TransformerConfig):
        return 0.0
    length = SCORED_CONTEXT
    parts = forward_flops(recipe.model, length)
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
        "row_bytes": recipe.data.row_bytes,
        "row_patches": recipe.data.row_patches,
    }
    dataset = Dataset(folder, "train")
    what["data"] = dataset.manifest.fingerprint
    if recipe.data.tokenizer:
        what["tokenizer"] = load_tokenizer(Path(recipe.data.tokenizer)).fingerprint
    key = json.dumps(what, sort_keys=True)
    if key not in known:
        settled = settle(recipe, dataset).model_dump(mode="json")
        known[key] = {
            "patching": settled["patching"],
            "row_patches": settled["data"]["row_patches"],
        }
        with replacing(path) as temporary:
            write_json(temporary, known)
    found = known[key]
    data = recipe.data.model_copy(update={"row_patches": found["row_patches"]})
    # Parsed apart, so that what the recipe says itself can still be told from what it leaves open.
    whole = parse(
        Recipe, {**recipe.model_dump(mode="json"), "patching": found["patching"]}, str(path)
    )
    return recipe.model_copy(update={"patching": whole.patching, "data": data})


def _assumed_unit(plan: Plan, run: Run, recipe: Recipe) -> float | None:
    """Bytes per patch or token without data to measure; ``None`` for a model of bytes."""
    family, patching = plan.family(run.family), recipe.patching
    if family.unit_bytes is not None:
        return family.unit_bytes
    if patching is not None and (size := planned_patch_size(patching)) is not None:
        return size
    if patching is None and family.vocab_size is None:
        return None
    raise ConfigError(
        f"family {run.family!r} does not say how long its patches or tokens are: add "
        f"families.{run.family}.unit_bytes, or run without --dry-run first so that text is there"
    )


def _with_steps(plan: Plan, recipe: Recipe, steps: int) -> Recipe:
    often = max(steps // 8, 1)
    usual = {
        "log_every": max(steps // 200, 1),
        "validate_every": often,
        "checkpoint_every": often,
        "keep_checkpoints": 1,
    }
    # What a plan says itself stands.
    settings = {k: v for k, v in usual.items() if k not in recipe.train.model_fields_set}
    train_config = recipe.train.model_copy(update={"steps": steps, **settings})
    optimizer = recipe.optimizer
    if "warmup_steps" not in optimizer.model_fields_set:
        warmup = {"warmup_steps": round(plan.warmup_share * steps)}
        optimizer = optimizer.model_copy(update=warmup)
    return recipe.model_copy(update={"train": train_config, "optimizer": optimizer})
