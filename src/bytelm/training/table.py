"""Fitting an n-gram table: the scorer that is trained by counting."""

from pathlib import Path

from bytelm.checkpoint import CONFIG, load_model, read_config, save_model
from bytelm.config import ModelDescription, TableConfig, TableRecipe
from bytelm.data import Dataset, sample_dataset
from bytelm.errors import ConfigError
from bytelm.model.ngram import NgramScorer, fit_ngram_scorer


def fit_table(recipe: TableRecipe, folder: Path) -> NgramScorer:
    """Count the n-grams of (a sample of) prepared data and save the table as a checkpoint.

    Ends of documents are not counted. A table that is there already, of the same recipe and data,
    is returned.

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
    training = {
        "recipe": recipe.model_dump(mode="json", exclude={"data"}),
        "data": dataset.manifest.fingerprint,
    }
    if (folder / CONFIG).exists() and read_config(folder).training == training:
        scorer, _ = load_model(folder)
        assert isinstance(scorer, NgramScorer)
        return scorer
    sample = sample_dataset(dataset, recipe.model.max_bytes, recipe.seed)
    pieces = [ids.numpy() for documents in sample.values() for ids, _ in documents]
    scorer = fit_ngram_scorer(pieces, recipe.model)
    config = TableConfig(max_order=recipe.model.max_order, num_contexts=len(scorer.keys))
    save_model(folder, scorer, ModelDescription(model=config), training)
    return scorer
