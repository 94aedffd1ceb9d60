"""Fit n-gram scorers by counting."""

from pathlib import Path

from bytelm.checkpoint import CONFIG, load_model, read_config, save_model
from bytelm.config import FittedNgramConfig, ModelDescription, NgramRecipe
from bytelm.data import Dataset, sample_dataset
from bytelm.errors import ConfigError
from bytelm.lm import ScorerLM
from bytelm.scoring import NgramScorer, fit_ngram_scorer


def fit_ngrams(recipe: NgramRecipe, folder: Path) -> NgramScorer:
    """Fit an n-gram scorer on prepared data, or a sample of it, and save it as a checkpoint.

    Ends of documents are not counted. If the folder holds a scorer of the same recipe and data,
    that one is returned.

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
        scorer = load_model(folder)[0].get_scorer()
        assert isinstance(scorer, NgramScorer)
        return scorer
    sample = sample_dataset(dataset, recipe.model.max_bytes, recipe.seed)
    sequences = [ids.numpy() for documents in sample.values() for ids, _ in documents]
    scorer = fit_ngram_scorer(sequences, recipe.model)
    config = FittedNgramConfig(max_order=recipe.model.max_order, num_contexts=len(scorer.keys))
    save_model(folder, ScorerLM(scorer), ModelDescription(model=config), training)
    return scorer
