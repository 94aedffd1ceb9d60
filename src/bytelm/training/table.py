"""Fitting an n-gram table: the scorer that is trained by counting."""

from pathlib import Path

from bytelm.checkpoint import save_model
from bytelm.config import ModelDescription, TableConfig, TableRecipe
from bytelm.data import Dataset, sample_dataset
from bytelm.errors import ConfigError
from bytelm.model.ngram import NgramScorer, fit_ngram_scorer


def fit_table(recipe: TableRecipe, folder: Path) -> NgramScorer:
    """Count the n-grams of (a sample of) prepared data and save the table as a checkpoint.

    Raises:
        ConfigError: the recipe names no data.
        DataError: the data is missing or damaged.
        CheckpointError: the folder exists or cannot be written.
    """
    if recipe.data.path is None:
        raise ConfigError(
            "data.path is missing: add data.path=FOLDER, made by `bytelm data prepare`"
        )
    dataset = Dataset(Path(recipe.data.path), "train", verify=recipe.data.verify)
    sample = sample_dataset(dataset, recipe.model.max_bytes, recipe.seed)
    pieces = [ids.numpy() for documents in sample.values() for ids, _ in documents]
    scorer = fit_ngram_scorer(pieces, recipe.model)
    config = TableConfig(max_order=recipe.model.max_order, num_contexts=len(scorer.keys))
    training = {"recipe": recipe.model_dump(mode="json")}
    save_model(folder, scorer, ModelDescription(model=config), training)
    return scorer
