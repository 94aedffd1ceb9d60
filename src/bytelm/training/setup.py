"""From a recipe and prepared data to what is trained: thresholds, budgets, devices, weights."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from bytelm import cpu
from bytelm.checkpoint import load_scorer
from bytelm.config import CalibratedPatching, DataConfig, ModelDescription, Recipe, TrainConfig
from bytelm.data import Dataset, all_documents, calibrate_sample, sample_dataset
from bytelm.data.dataset import SCORER
from bytelm.errors import ConfigError, DataError, PatchingError
from bytelm.lm import CausalLM, build_lm
from bytelm.patching import build_patcher
from bytelm.tokens import Tokenizer, load_tokenizer
from bytelm.training.parallel import parallelize
from bytelm.units import ByteUnits, PatchUnits, TokenUnits, Units


class Setup(NamedTuple):
    """All that a run needs, resolved."""

    recipe: Recipe
    """The recipe with its threshold and budget filled in."""
    description: ModelDescription
    dataset: Dataset
    lm: CausalLM
    """The language model, initialised, on its device."""


def set_up(recipe: Recipe, device: torch.device) -> Setup:
    """Resolve a recipe and initialise its model.

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
    tokenizer = _load_tokenizer(recipe)
    recipe = _resolve(recipe, dataset, tokenizer)
    scorer = scorer_config = None
    if recipe.patching is not None and build_patcher(recipe.patching).needs_entropies:
        _check_entropies(dataset, recipe.patching.kind)
        record = dataset.manifest.scorer
        assert record is not None
        scorer, scorer_config = load_scorer(
            dataset.folder / SCORER, reset_at_newline=record.reset_at_newline, device=device
        )
    description = ModelDescription(
        model=recipe.model,
        patching=recipe.patching,
        scorer=scorer_config,
        tokens=tokenizer is not None,
        context_bytes=recipe.data.row_bytes,
    )
    lm = build_lm(description, scorer=scorer, tokenizer=tokenizer)
    init_weights = getattr(lm.trained, "init_weights", None)
    if init_weights is not None:
        init_weights(torch.Generator().manual_seed(recipe.train.seed))
    cpu.fuse(lm.trained.to(device))
    parallelize(lm.trained, recipe.train)
    return Setup(recipe, description, dataset, lm)


def resolve(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Fill in what a recipe leaves to its data: the threshold, and the units in a row.

    Raises:
        ConfigError: the tokenizer does not fit the model.
        DataError: the data, or the tokenizer, is damaged or unfit.
        PatchingError: the wanted patch size cannot be reached.
    """
    return _resolve(recipe, dataset, _load_tokenizer(recipe))


def _resolve(recipe: Recipe, dataset: Dataset, tokenizer: Tokenizer | None) -> Recipe:
    patching, data = recipe.patching, recipe.data
    if isinstance(patching, CalibratedPatching):
        _check_entropies(dataset, patching.kind)
    if isinstance(patching, CalibratedPatching) and patching.needs_calibration:
        if patching.patch_size is None:
            raise PatchingError(
                f"the {patching.kind} rule needs a threshold or a patch_size to find one for"
            )
        patching = calibrate_sample(patching, sample_dataset(dataset), patching.patch_size)
    units: Units = ByteUnits()
    if tokenizer is not None:
        units = TokenUnits(tokenizer)
    elif patching is not None:
        units = PatchUnits(build_patcher(patching))
    if units.has_budget and data.row_patches is None:
        sample = sample_dataset(dataset, units.sample_bytes)
        mean_bytes = units.mean_bytes(all_documents(sample))
        data = with_room(data, mean_bytes, units.margin)
    return recipe.model_copy(update={"patching": patching, "data": data})


def choose_device(config: TrainConfig) -> torch.device:
    """Return the device that a recipe asks for.

    Raises:
        ConfigError: it is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but no CUDA device is available: use auto or cpu")
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def with_room(data: DataConfig, unit_bytes: float, margin: float) -> DataConfig:
    """Return a configuration whose rows have room for units of a mean size.

    Args:
        data: the configuration.
        unit_bytes: mean bytes per patch or token.
        margin: room over what the bytes of a row need on average. Rows of tokens close on their
            tokens and need none: they are equal in bytes on average.
    """
    # No row holds more units than bytes.
    wanted = min(math.ceil(margin * data.row_bytes / unit_bytes), data.row_bytes)
    return data.model_copy(update={"row_patches": wanted})


def _load_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """Return the tokenizer of a recipe, whose model must be of its size."""
    if recipe.data.tokenizer is None:
        return None
    path = Path(recipe.data.tokenizer)
    tokenizer = load_tokenizer(path)
    vocab_size = getattr(recipe.model, "vocab_size", None)
    if vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, but {path} has {tokenizer.vocab_size} tokens: "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _check_entropies(dataset: Dataset, kind: str) -> None:
    if not dataset.has_entropies:
        raise DataError(
            f"{dataset.folder} has no entropies, which the {kind} rule needs: prepare it with "
            "--scorer, or choose another rule"
        )
