"""FLOPs of optimiser steps: of the rows that are loaded, and what to expect of them.

Rows hold several documents, which do not attend to each other, so the FLOPs of a step depend on
where documents begin; padding is computed, and counted. See :mod:`bytelm.accounting`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.accounting import GPUS, TRAINING_FACTOR, packed_flops, run_lengths, training_flops
from bytelm.config import Recipe, TrainConfig
from bytelm.data import Batch, Dataset
from bytelm.patching import build_patches
from bytelm.training.rows import load_rows, sample_batches
from bytelm.units import Units

SAMPLE_SPANS = 100_000
"""Spans in a sample of which only the lengths are looked at."""


class Stretches(NamedTuple):
    """Lengths of the stretches of one document in some rows; padding counts as one."""

    ids: NDArray[np.integer]
    """In bytes, or in tokens."""
    patches: NDArray[np.integer]
    num_rows: int

    @classmethod
    def of(cls, recipe: Recipe, batches: Sequence[Batch]) -> "Stretches":
        """Return those of the rows of some batches.

        Patches that are only known when the model has run, those of a learned rule, are counted as
        ``data.row_patches`` of one document in each row; as none if that is not given.
        """
        ids, patches = [], []
        for batch in batches:
            ids.append(run_lengths(batch.documents.numpy()))
            if batch.next_boundary is None:
                documents = torch.zeros(len(batch.ids), recipe.data.row_patches or 0)
            else:
                found = build_patches(batch.next_boundary, batch.documents, batch.budget)
                documents = found.patch_documents
            patches.append(run_lengths(documents.numpy()))
        num_rows = sum(len(batch.ids) for batch in batches)
        return cls(np.concatenate(ids), np.concatenate(patches), num_rows)

    def flops(self, recipe: Recipe) -> float:
        """Return the training FLOPs of the rows."""
        parts = packed_flops(recipe.model, self.ids, self.patches)
        return float(TRAINING_FACTOR * sum(part.total for part in parts.values()))


def peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device, as the recipe says or as known; ``None`` if unknown."""
    if config.peak_flops is not None or device.type != "cuda":
        return config.peak_flops
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.peak_flops for part, gpu in GPUS.items() if part in name), None)


def sample_stretches(recipe: Recipe, dataset: Dataset, units: Units) -> Stretches:
    """Return the stretches in rows like those of a run with a resolved recipe.

    In rows of bytes alone, stretches follow from the lengths of documents, so many are taken. Such
    rows are alike for long: as long as spans are as long as rows, each row begins where the one
    before it did.
    """
    if units.has_budget or recipe.data.row_patches is not None:
        return Stretches.of(recipe, sample_batches(recipe, dataset, units))
    row = recipe.data.row_bytes
    ends = np.cumsum(load_rows(recipe, dataset, units).draw_lengths(SAMPLE_SPANS))
    begins_of_rows = np.arange(0, int(ends[-1]) + 1, row)
    whole = ends[ends < begins_of_rows[-1]]
    stretches = np.diff(np.unique(np.concatenate([begins_of_rows, whole])))
    return Stretches(stretches, np.empty(0, np.int64), len(begins_of_rows) - 1)


def mean_step_flops(recipe: Recipe, sample: Stretches) -> float:
    """Return the training FLOPs to expect of a step, from a sample of rows."""
    return sample.flops(recipe) / sample.num_rows * recipe.data.rows_per_step


def full_step_flops(recipe: Recipe) -> float:
    """Return the FLOPs of a step of a resolved recipe if each row were one document.

    That is the most that a step may take. It is what runs of earlier versions were charged.
    """
    row = training_flops(recipe.model, recipe.row_length, recipe.data.row_patches or 0)
    return float(row * recipe.data.rows_per_step)
