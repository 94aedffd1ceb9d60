"""From a recipe and prepared data to what is trained: thresholds, budgets, devices, weights."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from bytelm.checkpoint import load_scorer
from bytelm.config import (
    BLTConfig,
    CalibratedConfig,
    DataConfig,
    ModelDescription,
    Recipe,
    ScorerConfig,
    TrainConfig,
    TransformerConfig,
)
from bytelm.data import (
    Dataset,
    calibrate_sample,
    mean_patch_size,
    mean_token_bytes,
    sample_dataset,
)
from bytelm.data.dataset import SCORER
from bytelm.errors import ConfigError, DataError, PatchingError
from bytelm.model.blt import BLT
from bytelm.model.build import LanguageModule, ScorerModule
from bytelm.model.patched import PatchedModel
from bytelm.model.tokenized import TokenModel
from bytelm.model.transformer import Transformer
from bytelm.patching import build_patcher
from bytelm.tokens import Tokenizer, load_tokenizer

PATCH_MARGIN = 1.1
"""Patches a row has room for, over what its bytes need on average."""
TOKEN_SAMPLE_BYTES = 1_000_000
"""Text whose tokens are counted to know their mean length."""


class Setup(NamedTuple):
    """All that a run needs, settled."""

    recipe: Recipe
    """The recipe with its threshold and patch budget filled in."""
    description: ModelDescription
    dataset: Dataset
    module: LanguageModule
    """The complete model, initialised, on its device."""
    trained: BLT | Transformer
    """The part of it that learns."""
    tokenizer: Tokenizer | None
    """Of a model of tokens."""


def set_up(recipe: Recipe, device: torch.device) -> Setup:
    """Settle a recipe.

    Raises:
        ConfigError: the recipe lacks something.
        DataError: the data is missing, damaged or unfit.
        PatchingError: the wanted patch size cannot be reached.
    """
    if recipe.data.path is None:
        raise ConfigError(
            "data.path is missing: add data.path=FOLDER, made by `bytelm data prepare`"
        )
    dataset = Dataset(Path(recipe.data.path), "train", verify=recipe.data.verify)
    recipe = settle(recipe, dataset)
    scorer, scorer_config, tokenizer = None, None, None
    if recipe.data.tokenizer is not None:
        tokenizer = _tokenizer(recipe, Path(recipe.data.tokenizer))
    if isinstance(recipe.model, BLTConfig):
        scorer, scorer_config = _scorer(recipe, dataset, device)
    assert isinstance(recipe.model, BLTConfig | TransformerConfig)
    description = ModelDescription(
        model=recipe.model,
        patching=recipe.patching,
        scorer=scorer_config,
        tokens=tokenizer is not None,
        context_bytes=recipe.data.row_bytes,
    )
    module, trained = _initialise(recipe, scorer, tokenizer, device)
    return Setup(recipe, description, dataset, module, trained, tokenizer)


def settle(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Fill in what a recipe leaves to its data: the threshold, and the room for patches or tokens.

    Raises:
        ConfigError: the tokenizer does not fit the model.
        DataError: the data, or the tokenizer, is damaged or unfit.
        PatchingError: the wanted patch size cannot be reached.
    """
    if isinstance(recipe.model, BLTConfig):
        return _settle_patches(recipe, dataset)
    if recipe.data.tokenizer is None or recipe.data.row_patches is not None:
        return recipe
    tokenizer = _tokenizer(recipe, Path(recipe.data.tokenizer))
    mean = mean_token_bytes(tokenizer, sample_dataset(dataset, TOKEN_SAMPLE_BYTES))
    return recipe.model_copy(update={"data": with_room(recipe.data, mean, margin=1.0)})


def choose_device(config: TrainConfig) -> torch.device:
    """The device a recipe asks for.

    Raises:
        ConfigError: it is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but no CUDA device is available: use auto or cpu")
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _settle_patches(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Find the threshold and the patch budget that the recipe leaves open."""
    patching, data = recipe.patching, recipe.data
    assert patching is not None
    is_open = isinstance(patching, CalibratedConfig) and patching.needs_calibration
    sample = sample_dataset(dataset) if is_open or data.row_patches is None else {}
    if isinstance(patching, CalibratedConfig):
        if not dataset.has_entropies:
            raise DataError(
                f"{dataset.folder} has no entropies, which the {patching.kind} rule needs: prepare "
                "it with --scorer, or choose another rule"
            )
        if patching.needs_calibration:
            if patching.patch_size is None:
                raise PatchingError(
                    f"the {patching.kind} rule needs a threshold or a patch_size to find one for"
                )
            patching = calibrate_sample(patching, sample, patching.patch_size)
    if data.row_patches is None:
        data = with_room(data, mean_patch_size(patching, sample))
    return recipe.model_copy(update={"patching": patching, "data": data})


def with_room(data: DataConfig, mean_size: float, margin: float = PATCH_MARGIN) -> DataConfig:
    """Room for patches (or tokens) of a mean size.

    Rows of tokens close on their tokens and need no margin: they are equal in bytes on average.
    """
    # No row holds more of them than bytes.
    wanted = min(math.ceil(margin * data.row_bytes / mean_size), data.row_bytes)
    return data.model_copy(update={"row_patches": wanted})


def _tokenizer(recipe: Recipe, path: Path) -> Tokenizer:
    """The tokenizer of a recipe whose model is of its size."""
    tokenizer = load_tokenizer(path)
    assert isinstance(recipe.model, TransformerConfig)
    if recipe.model.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {recipe.model.vocab_size}, but {path} has "
            f"{tokenizer.vocab_size} tokens: set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _scorer(
    recipe: Recipe, dataset: Dataset, device: torch.device
) -> tuple[ScorerModule | None, ScorerConfig | None]:
    """The scorer of the data, where the rule needs one."""
    assert recipe.patching is not None
    if not build_patcher(recipe.patching).needs_entropies:
        return None, None
    record = dataset.manifest.scorer
    assert record is not None
    return load_scorer(
        dataset.folder / SCORER, reset_at_newline=record.reset_at_newline, device=device
    )


def _initialise(
    recipe: Recipe,
    scorer: ScorerModule | None,
    tokenizer: Tokenizer | None,
    device: torch.device,
) -> tuple[LanguageModule, BLT | Transformer]:
    generator = torch.Generator().manual_seed(recipe.train.seed)
    if isinstance(recipe.model, BLTConfig):
        assert recipe.patching is not None
        blt = BLT(recipe.model)
        blt.init_weights(generator)
        return PatchedModel(blt.to(device), build_patcher(recipe.patching), scorer), blt
    assert isinstance(recipe.model, TransformerConfig)
    transformer = Transformer(recipe.model)
    transformer.init_weights(generator)
    transformer.to(device)
    return (TokenModel(transformer, tokenizer) if tokenizer else transformer), transformer
