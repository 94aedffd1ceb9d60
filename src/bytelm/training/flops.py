"""FLOPs of optimiser steps: of the rows that are loaded, and what to expect of them.

Rows hold several documents, which do not attend to each other, so the FLOPs of a step depend on
where documents begin; padding is computed, and counted. See :mod:`bytelm.accounting`.
"""

import torch

from bytelm.accounting import TRAINING_FACTOR, packed_flops, training_flops
from bytelm.config import Recipe
from bytelm.data import Batch
from bytelm.patching import build_patches


def batch_flops(recipe: Recipe, batch: Batch) -> int:
    """Return the training FLOPs of the rows of a batch.

    Patches that are only known when the model has run, those of a learned rule, are counted as
    ``data.row_patches`` of one document in each row; as none if that is not given.
    """
    if batch.next_boundary is not None:
        patches = build_patches(batch.next_boundary, batch.documents, batch.budget)
        patch_documents = patches.patch_documents
    else:
        patch_documents = torch.zeros(len(batch.ids), recipe.data.row_patches or 0)
    parts = packed_flops(recipe.model, batch.documents.numpy(), patch_documents.numpy())
    return TRAINING_FACTOR * sum(part.total for part in parts.values())


def mean_step_flops(recipe: Recipe, rows: list[Batch]) -> float:
    """Return the training FLOPs to expect of a step.

    Args:
        recipe: recipe of a run.
        rows: rows like those of the run, one in each batch.
    """
    mean = sum(batch_flops(recipe, row) for row in rows) / len(rows)
    return mean * recipe.data.rows_per_step


def full_step_flops(recipe: Recipe) -> float:
    """Return the FLOPs of a step of a resolved recipe if each row were one document.

    That is the most that a step may take. It is what runs of earlier versions were charged.
    """
    row = training_flops(recipe.model, recipe.row_length, recipe.data.row_patches or 0)
    return float(row * recipe.data.rows_per_step)
