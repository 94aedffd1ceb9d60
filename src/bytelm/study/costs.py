"""Costs of runs, as a dry run shows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bytelm.accounting import forward_flops
from bytelm.config import Recipe
from bytelm.data import Dataset
from bytelm.data.dataset import MANIFEST
from bytelm.progress import Progress
from bytelm.study.plan import Plan, Run
from bytelm.study.resolving import Resolved, Resolver


@dataclass(frozen=True)
class Cost:
    """Cost of a run, as a dry run shows it."""

    name: str
    parameters: int
    """Parameters outside embeddings."""
    embedding_parameters: int
    """Parameters in embeddings of bytes, tokens and n-grams."""
    inference_flops: float
    """Forward FLOPs per byte, without the entropy model's."""
    steps: int
    train_bytes: float
    epochs: float | None
    flops: float
    deviation: float | None
    """Relative deviation from a budget in FLOPs."""
    scorer_flops: float
    """FLOPs of scoring all the text that is read, as if its entropies were not stored."""
    seconds: float
    disk_bytes: int


def run_costs(
    plan: Plan, runs: Sequence[Run], out: Path, speed: float, progress: Progress | None = None
) -> list[Cost]:
    """Return the costs of some runs of a plan.

    Args:
        plan: the plan of the study.
        runs: the runs.
        out: folder of the study, with or without text.
        speed: FLOPs per second of a worker.
        progress: receives the progress.

    Raises:
        ConfigError, DataError, PatchingError: as :meth:`Resolver.resolve`.
    """
    resolver = Resolver(plan, out)
    text = None
    if (out / "text" / MANIFEST).exists():
        text = int(Dataset(out / "text", "train").lengths.sum())
    resolved = resolver.resolve_all(runs, progress or Progress())
    return [_cost(one, text, speed) for one in resolved]


def inference_flops(recipe: Recipe, unit_bytes: float | None) -> float:
    """Return the forward FLOPs per byte over a row without padding.

    Args:
        recipe: a complete recipe.
        unit_bytes: mean bytes per patch or token; ``None`` for byte models.
    """
    row = recipe.data.row_bytes
    units = round(row / unit_bytes) if unit_bytes else 0
    length = row if recipe.data.tokenizer is None else units
    parts = forward_flops(recipe.model, length, units)
    return sum(part.total for part in parts.values()) / row


def _cost(resolved: Resolved, text_bytes: int | None, speed: float) -> Cost:
    run, data = resolved.run, resolved.recipe.data
    parameters, embedding_parameters = resolved.parameters()
    unit = data.room_margin * data.row_bytes / data.row_patches if data.row_patches else None
    return Cost(
        name=run.name,
        parameters=parameters,
        embedding_parameters=embedding_parameters,
        inference_flops=inference_flops(resolved.recipe, unit),
        steps=resolved.steps,
        train_bytes=resolved.row_bytes,
        epochs=None if text_bytes is None else resolved.row_bytes / text_bytes,
        flops=resolved.flops,
        deviation=None if run.flops is None else resolved.flops / run.flops - 1,
        scorer_flops=resolved.steps * resolved.scorer_step_flops,
        seconds=resolved.flops / speed,
        # Weights and two moments in fp32, twice while a checkpoint replaces another.
        disk_bytes=4 * 3 * 2 * (parameters + embedding_parameters),
    )
