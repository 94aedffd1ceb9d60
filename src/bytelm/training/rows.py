"""Rows of a run: how they are loaded, and their room for patches or tokens."""

import math

from bytelm.config import DataConfig, Recipe
from bytelm.data import OPEN_SPANS, Batch, Dataset, Loader
from bytelm.units import Units

SAMPLE_ROWS, SAMPLE_BYTES = 256, 1_000_000
"""Most rows that a sample has, and bytes of them."""
MEASUREMENTS = 2
"""Times that the room of rows is measured, each time with that measured before."""
FIRST_ROWS = 2 * OPEN_SPANS
"""First rows of a balanced stream, which hold longer stretches of documents than later ones."""


def load_rows(
    recipe: Recipe, dataset: Dataset, units: Units, *, rank: int = 0, world_size: int = 1
) -> Loader:
    """Return the loader of a rank's share of a resolved recipe's rows, at its first step."""
    data = recipe.data
    return Loader(
        dataset,
        units=units,
        row_bytes=data.row_bytes,
        row_units=data.row_patches,
        rows_per_step=data.rows_per_step,
        packing=data.packing or "in-order",
        mixture=data.mixture,
        seed=recipe.train.seed,
        rank=rank,
        world_size=world_size,
    )


def sample_batches(recipe: Recipe, dataset: Dataset, units: Units) -> list[Batch]:
    """Return rows like those of a run, one in each batch, to measure what they hold.

    They are of one stream, which reaches the usual mixture of whole and cut spans soonest.
    """
    data = recipe.data.model_copy(update={"rows_per_step": 1})
    loader = load_rows(recipe.model_copy(update={"data": data}), dataset, units)
    for _ in range(FIRST_ROWS):
        loader.next_batch()
    rows = [loader.next_batch()]
    wanted = min(SAMPLE_ROWS, SAMPLE_BYTES // data.row_bytes)
    # Little text is read twice at most.
    while len(rows) < wanted and loader.epochs < 2:
        rows.append(loader.next_batch())
    return rows


def with_measured_room(recipe: Recipe, dataset: Dataset, units: Units) -> DataConfig:
    """Return a configuration whose rows have as many units as their bytes need when packed.

    That is more than the mean over documents, since each part of a document that is cut begins a
    patch, and differs with the shares of a mixture.
    """
    data = recipe.data
    for _ in range(MEASUREMENTS):
        batches = sample_batches(recipe.model_copy(update={"data": data}), dataset, units)
        num_bytes = sum(int(batch.byte_counts.sum()) for batch in batches)
        num_units = sum(int(b.unit_counts.sum()) for b in batches if b.unit_counts is not None)
        data = with_room(data, num_bytes / num_units)
    return data


def with_room(data: DataConfig, unit_bytes: float) -> DataConfig:
    """Return a configuration whose rows have room for units of a mean size.

    Args:
        data: the configuration.
        unit_bytes: mean bytes per patch or token.
    """
    # No row holds more units than bytes.
    wanted = min(math.ceil(data.room_margin * data.row_bytes / unit_bytes), data.row_bytes)
    return data.model_copy(update={"row_patches": wanted})
