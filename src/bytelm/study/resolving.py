"""Resolve the recipes of runs: thresholds, units in a row, and steps."""

from dataclasses import dataclass
from pathlib import Path

from bytelm.accounting import forward_flops, parameter_counts
from bytelm.config import NgramRecipe, PatchingConfig, Recipe, load_recipe
from bytelm.data import Dataset
from bytelm.data.dataset import MANIFEST
from bytelm.errors import ConfigError
from bytelm.study.loading import run_recipe
from bytelm.study.plan import Plan, Run
from bytelm.study.text import text_folder, tokenizer_path
from bytelm.training import resolve as resolve_recipe
from bytelm.training import step_flops, with_room
from bytelm.units import PatchUnits, TokenUnits

TOLERANCE = 0.01
"""Largest relative deviation of a run's FLOPs from its budget."""
SCORED_CONTEXT = 8192
"""Length in bytes of the documents for which the cost of an entropy model is computed; it depends
on the length, since a document is scored as a whole."""


@dataclass(frozen=True)
class Resolved:
    """A run whose recipe is complete."""

    run: Run
    recipe: Recipe
    step_flops: float
    """Training FLOPs of a step, padding included; see :mod:`bytelm.accounting`."""
    scorer_step_flops: float
    """FLOPs of scoring the rows of a step with the entropy model."""
    counts_scorer: bool
    """Whether the budget includes the FLOPs of scoring."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.recipe.train.steps

    @property
    def flops(self) -> float:
        """Training FLOPs, with those of scoring if the budget includes them."""
        scorer = self.scorer_step_flops if self.counts_scorer else 0.0
        return self.steps * (self.step_flops + scorer)

    @property
    def row_bytes(self) -> float:
        """Bytes of text that all rows of the run have room for."""
        data = self.recipe.data
        return float(self.steps * data.rows_per_step * data.row_bytes)

    def parameters(self) -> tuple[int, int]:
        """Return the numbers of parameters outside and inside embeddings."""
        return parameter_counts(self.recipe.model)


class Resolver:
    """Completes the recipes of a plan's runs, and measures the text once for each question.

    With the study's text (and tokenizer) in its folder, thresholds and the mean length of patches
    and tokens are measured; without it, for a dry run, the plan gives that length.

    Args:
        plan: the plan of the study.
        out: folder of the study.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out
        self._resolved: dict[str, Resolved] = {}
        self._measured: dict[tuple[object, ...], tuple[PatchingConfig | None, int | None]] = {}

    def resolve(self, run: Run) -> Resolved:
        """Return a run with its complete recipe.

        Raises:
            ConfigError: no number of steps meets the budget, or the plan does not say how long
                patches or tokens are.
            DataError, PatchingError: as :func:`bytelm.training.train`.
        """
        if run.name not in self._resolved:
            self._resolved[run.name] = self._resolve(run)
        return self._resolved[run.name]

    def _resolve(self, run: Run) -> Resolved:
        recipe = self._with_data(run, run_recipe(self.plan, run))
        one = step_flops(recipe)
        step_bytes = recipe.data.rows_per_step * recipe.data.row_bytes
        scorer = scorer_flops(self.plan, run.family, step_bytes)
        if run.flops is None:
            assert run.bytes is not None
            steps = max(round(run.bytes / step_bytes), 1)
        else:
            steps = _steps(run, run.flops, one + (scorer if self.plan.include_scorer else 0.0))
        recipe = with_steps(self.plan, recipe, steps)
        return Resolved(run, recipe, one, scorer, self.plan.include_scorer)

    def _with_data(self, run: Run, recipe: Recipe) -> Recipe:
        """Fill in the data of a recipe, its threshold, and its room for patches or tokens."""
        vocab_size = self.plan.families[run.family].vocab_size
        folder = text_folder(self.plan, run.family, self.out)
        data = recipe.data.model_copy(update={"verify": False})
        is_there = (folder / MANIFEST).exists()
        if vocab_size is not None:
            tokenizer = tokenizer_path(self.out, vocab_size)
            data = data.model_copy(update={"tokenizer": str(tokenizer)})
            is_there = is_there and tokenizer.exists()
        if is_there:
            data = data.model_copy(update={"path": str(folder)})
            return self._measure(recipe.model_copy(update={"data": data}), folder)
        unit = _assumed_unit(self.plan, run, recipe)
        if unit and data.row_patches is None:
            units = PatchUnits if vocab_size is None else TokenUnits
            data = with_room(data, unit, units.margin)
        return recipe.model_copy(update={"data": data})

    def _measure(self, recipe: Recipe, folder: Path) -> Recipe:
        """Resolve a recipe, unless one with the same rows of the same text was resolved before."""
        data = recipe.data
        question = (recipe.patching, folder, data.row_bytes, data.row_patches, data.tokenizer)
        if question not in self._measured:
            found = resolve_recipe(recipe, Dataset(folder, "train"))
            self._measured[question] = found.patching, found.data.row_patches
        patching, row_patches = self._measured[question]
        data = data.model_copy(update={"row_patches": row_patches})
        return recipe.model_copy(update={"patching": patching, "data": data})


def with_steps(plan: Plan, recipe: Recipe, steps: int) -> Recipe:
    """Return a recipe with its number of steps, and with what follows from it.

    That is the warm-up, and how often the run reports, validates and saves; a setting that the
    plan makes itself stays.
    """
    often = max(steps // 8, 1)
    usual = {
        "log_every": max(steps // 200, 1),
        "validate_every": often,
        "checkpoint_every": often,
        "keep_checkpoints": 1,
    }
    settings = {k: v for k, v in usual.items() if k not in recipe.train.model_fields_set}
    train_config = recipe.train.model_copy(update={"steps": steps, **settings})
    optimizer = recipe.optimizer
    if "warmup_steps" not in optimizer.model_fields_set:
        warmup = {"warmup_steps": round(plan.warmup_share * steps)}
        optimizer = optimizer.model_copy(update=warmup)
    return recipe.model_copy(update={"train": train_config, "optimizer": optimizer})


def scorer_flops(plan: Plan, family: str, num_bytes: int) -> float:
    """Return the FLOPs of scoring some bytes with a family's entropy model; 0 for n-grams."""
    name = plan.families[family].scorer
    if name is None:
        return 0.0
    recipe = load_recipe(plan.scorers[name].recipe, plan.scorers[name].overrides)
    if isinstance(recipe, NgramRecipe):
        return 0.0
    parts = forward_flops(recipe.model, SCORED_CONTEXT)
    return sum(part.total for part in parts.values()) / SCORED_CONTEXT * num_bytes


def _steps(run: Run, budget: float, step: float) -> int:
    """Return the number of steps that meets a budget, given the FLOPs of a step."""
    steps = round(budget / step)
    if not steps or abs(steps * step / budget - 1) > TOLERANCE:
        raise ConfigError(
            f"run {run.name!r}: {budget:.3g} FLOPs are {budget / step:.2f} steps of {step:.3g}, so "
            f"no number of steps comes within {TOLERANCE:.0%}: raise the budget, or make rows or "
            "data.rows_per_step smaller"
        )
    return steps


def _assumed_unit(plan: Plan, run: Run, recipe: Recipe) -> float | None:
    """Return the mean bytes per patch or token that a plan gives; ``None`` for models of bytes."""
    family, patching = plan.families[run.family], recipe.patching
    if family.unit_bytes is not None:
        return family.unit_bytes
    if patching is not None and (size := patching.planned_size) is not None:
        return size
    if patching is None and family.vocab_size is None:
        return None
    raise ConfigError(
        f"family {run.family!r} does not say how long its patches or tokens are: add "
        f"families.{run.family}.unit_bytes, or run without --dry-run first so that text is there"
    )
