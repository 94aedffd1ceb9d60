"""Resolve the recipes of runs: thresholds, units in a row, and steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.accounting import forward_flops, parameter_counts
from bytelm.config import NgramRecipe, PatchingConfig, Recipe, load_recipe
from bytelm.data import Dataset
from bytelm.data.dataset import MANIFEST
from bytelm.errors import ConfigError
from bytelm.progress import Progress
from bytelm.study.loading import run_recipe, with_steps
from bytelm.study.plan import Plan, Run
from bytelm.study.results import recipe_changes, run_folder
from bytelm.study.text import text_folder, tokenizer_path
from bytelm.training import (
    Stretches,
    charges_full_rows,
    full_step_flops,
    mean_step_flops,
    recorded_recipe,
    sample_stretches,
    with_room,
)
from bytelm.training import resolve as resolve_recipe

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
    """Training FLOPs to expect of a step, padding included; see :mod:`bytelm.accounting`."""
    scorer_step_flops: float
    """FLOPs of scoring the rows of a step with the entropy model."""
    counts_scorer: bool
    """Whether the budget includes the FLOPs of scoring."""
    charges_full_rows: bool = False
    """Whether attention is counted as if each row were one document, as earlier versions did and as
    a dry run without text has to."""

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


class _Measured(NamedTuple):
    """What was measured on the text."""

    patching: PatchingConfig | None
    rows: dict[str, Any]
    """Settings of how rows are filled."""
    sample: Stretches


class Resolver:
    """Completes the recipes of a plan's runs, and measures the text once for each question.

    With the study's text (and tokenizer) in its folder, thresholds, the mean length of patches and
    tokens, and the documents in rows are measured; without it, for a dry run, the plan gives that
    length, and rows are taken to be one document. A run that has begun keeps its recipe, and how
    its FLOPs are counted.

    Args:
        plan: the plan of the study.
        out: folder of the study.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out = plan, out
        self._resolved: dict[str, Resolved] = {}
        self._measured: dict[tuple[object, ...], _Measured] = {}

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

    def resolve_all(self, runs: Sequence[Run], progress: Progress) -> list[Resolved]:
        """Return several runs with their complete recipes.

        Raises:
            ConfigError, DataError, PatchingError: as :meth:`resolve`.
        """
        found = []
        with progress.counting("sizing", len(runs)) as report:
            for run in runs:
                report(len(found), run.name)
                found.append(self.resolve(run))
        return found

    def _resolve(self, run: Run) -> Resolved:
        if (begun := self._begun(run)) is not None:
            return begun
        recipe, rows = self._with_data(run, run_recipe(self.plan, run))
        one = full_step_flops(recipe) if rows is None else mean_step_flops(recipe, rows)
        step_bytes = recipe.data.rows_per_step * recipe.data.row_bytes
        scorer = scorer_flops(self.plan, run.family, step_bytes)
        if run.flops is None:
            assert run.bytes is not None
            steps = max(round(run.bytes / step_bytes), 1)
        else:
            steps = _steps(run, run.flops, one + (scorer if self.plan.include_scorer else 0.0))
        recipe = with_steps(self.plan, recipe, steps)
        return Resolved(run, recipe, one, scorer, self.plan.include_scorer, rows is None)

    def _begun(self, run: Run) -> Resolved | None:
        """Return a run that has checkpoints of the plan's recipe as it began, or ``None``."""
        folder = run_folder(self.out, run)
        recipe = recorded_recipe(folder)
        if recipe is None or recipe_changes(self.plan, run, recipe):
            return None
        data = recipe.data
        # Earlier versions did not record how rows are filled.
        filled = data.model_copy(update={"packing": data.packing or "in-order"})
        known, rows = self._with_data(run, recipe.model_copy(update={"data": filled}))
        places = known.data.model_dump(include={"path", "tokenizer", "verify"})
        recipe = recipe.model_copy(update={"data": data.model_copy(update=places)})
        is_full = rows is None or charges_full_rows(folder)
        one = full_step_flops(recipe)
        if rows is not None and not is_full:
            one = mean_step_flops(known, rows)
        step_bytes = recipe.data.rows_per_step * recipe.data.row_bytes
        scorer = scorer_flops(self.plan, run.family, step_bytes)
        return Resolved(run, recipe, one, scorer, self.plan.include_scorer, is_full)

    def _with_data(self, run: Run, recipe: Recipe) -> tuple[Recipe, Stretches | None]:
        """Fill in the data of a recipe, its threshold, and its room for patches or tokens.

        Returns:
            The recipe, and a sample of its rows if the text is there.
        """
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
            data = with_room(data, unit)
        return recipe.model_copy(update={"data": data}), None

    def _measure(self, recipe: Recipe, folder: Path) -> tuple[Recipe, Stretches]:
        """Resolve a recipe, unless one with the same rows of the same text was resolved before."""
        mixture = tuple((recipe.data.mixture or {}).items())
        rows = recipe.data.model_dump(include={"row_bytes", "row_patches", "packing", "tokenizer"})
        question = (recipe.patching, folder, mixture, *rows.values())
        if question not in self._measured:
            dataset = Dataset(folder, "train")
            found, units = resolve_recipe(recipe, dataset)
            sample = sample_stretches(found, dataset, units)
            decided = found.data.model_dump(include={"row_patches", "packing"})
            self._measured[question] = _Measured(found.patching, decided, sample)
        known = self._measured[question]
        data = recipe.data.model_copy(update=known.rows)
        return recipe.model_copy(update={"patching": known.patching, "data": data}), known.sample


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
