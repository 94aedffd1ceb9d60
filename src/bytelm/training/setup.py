"""Resolve a recipe with its data, and build the model to train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bytelm import cpu
from bytelm.checkpoint import load_scorer, read_config
from bytelm.codec import VOCAB_SIZE
from bytelm.config import (
    CalibratedPatching,
    ModelDescription,
    Recipe,
    ScorerConfig,
    TrainConfig,
)
from bytelm.data import Dataset, all_documents, calibrate_sample, sample_dataset
from bytelm.data.dataset import SCORER, ScorerRecord
from bytelm.errors import ConfigError, DataError, PatchingError
from bytelm.lm import CausalLM, build_lm
from bytelm.patching import build_patcher
from bytelm.tokens import Tokenizer, load_tokenizer
from bytelm.training.distributed import World
from bytelm.training.initial import load_initial
from bytelm.training.parallel import can_initialise_shards, compiles
from bytelm.training.parts import freeze
from bytelm.training.rows import with_measured_room, with_room
from bytelm.units import Units


class Setup(NamedTuple):
    """Resolved recipe, data and model of a run."""

    recipe: Recipe
    """The recipe with its threshold and budget of units filled in."""
    description: ModelDescription
    dataset: Dataset
    lm: CausalLM
    """The language model: its trained part initialised on the CPU, or on the meta device if ranks
    can initialise it once it is sharded (:func:`bytelm.training.parallel.initialise`); its scorer
    on the device."""
    origin: dict[str, Any] | None = None
    """Record of the checkpoint whose weights it begins with, if any."""


def set_up(
    recipe: Recipe,
    device: torch.device,
    *,
    has_weights: bool = False,
    world: World | None = None,
) -> Setup:
    """Resolve a recipe and build its model, which is initialised unless ranks will shard it.

    Args:
        recipe: the recipe.
        device: device of the scorer.
        has_weights: whether weights of the run itself will be loaded, so that those of ``init`` are
            not needed.
        world: the ranks, of which the first resolves and checks for all; ``None`` for one.

    Raises:
        ConfigError: the recipe is incomplete, or the tokenizer, the checkpoint to begin with or a
            part to freeze does not fit the model.
        CheckpointError: the checkpoint to begin with is missing or damaged.
        DataError: the data is missing, damaged or unsuitable, or was scored by another scorer than
            the one of the checkpoint to begin with.
        PatchingError: the wanted patch size cannot be reached.
    """
    if recipe.data.path is None:
        raise ConfigError(
            "data.path is missing: add data.path=FOLDER, made by `bytelm data prepare`"
        )
    world = world or World()
    tokenizer = _load_tokenizer(recipe)
    verify = recipe.data.verify and world.is_main
    dataset = Dataset(Path(recipe.data.path), "train", verify=verify)
    recipe = _decided(world, _with_threshold, recipe, dataset)
    scorer = scorer_config = None
    record = _scorer_record(recipe, dataset)
    if record is not None:
        scorer, scorer_config = load_scorer(
            dataset.folder / SCORER, reset_at_newline=record.reset_at_newline, device=device
        )
    description = _describe(recipe, scorer_config, tokenizer)
    seed = recipe.train.seed
    loads = recipe.init is not None and not has_weights
    lm = origin = None
    if world.size > 1 and not loads:
        with _seeded(seed), torch.device("meta"):
            lm = build_lm(description, scorer=scorer, tokenizer=tokenizer)
    if lm is None or not can_initialise_shards(lm.trained):
        with _seeded(seed):
            lm = build_lm(description, scorer=scorer, tokenizer=tokenizer)
            init_weights = getattr(lm.trained, "init_weights", None)
            if init_weights is not None:
                init_weights(torch.Generator().manual_seed(seed))
            if recipe.init is not None and loads:
                origin = load_initial(recipe.init, lm, description)
    recipe = _decided(world, _with_units, recipe, dataset, lm.units)
    freeze(lm.trained, recipe.optimizer.freeze)
    if not compiles(recipe.train, device):
        # Compiled passes never run fused ones, and would be compiled again for each that they find.
        cpu.fuse(lm.trained)
    return Setup(recipe, description, dataset, lm, origin)


def _decided(world: World, resolve: Callable[..., Recipe], *arguments: Any) -> Recipe:
    return world.decide(lambda: resolve(*arguments))


def resolve(recipe: Recipe, dataset: Dataset) -> tuple[Recipe, Units]:
    """Return a recipe with the values that depend on its data: threshold, and how rows are filled.

    Returns:
        The recipe, and the units of its model.

    Raises:
        ConfigError: the tokenizer does not fit the model.
        DataError: the data or the tokenizer is damaged or unsuitable.
        PatchingError: the wanted patch size cannot be reached.
    """
    tokenizer = _load_tokenizer(recipe)
    recipe = _with_threshold(recipe, dataset)
    config = None
    record = _scorer_record(recipe, dataset)
    if record is not None:
        scorer = read_config(dataset.folder / SCORER).model
        config = ScorerConfig(model=scorer, reset_at_newline=record.reset_at_newline)
    # Only its units are needed, so the model gets no memory.
    with _seeded(recipe.train.seed), torch.device("meta"):
        lm = build_lm(_describe(recipe, config, tokenizer), tokenizer=tokenizer)
    return _with_units(recipe, dataset, lm.units), lm.units


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global generator for modules that initialise themselves when they are built.

    Afterwards the generator continues as if it had not been used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _scorer_record(recipe: Recipe, dataset: Dataset) -> ScorerRecord | None:
    """Return the record of the data's scorer, or ``None`` if the rule needs no entropies."""
    if recipe.patching is None:
        return None
    with _seeded(recipe.train.seed):
        needs_entropies = build_patcher(recipe.patching).needs_entropies
    if not needs_entropies:
        return None
    _check_entropies(dataset, recipe.patching.kind)
    record = dataset.manifest.scorer
    assert record is not None
    return record


def _describe(
    recipe: Recipe, scorer: ScorerConfig | None, tokenizer: Tokenizer | None
) -> ModelDescription:
    return ModelDescription(
        model=recipe.model,
        patching=recipe.patching,
        scorer=scorer,
        tokens=tokenizer is not None,
        context_bytes=recipe.data.row_bytes,
    )


def _with_threshold(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Return a recipe whose patching rule is calibrated."""
    patching = recipe.patching
    if isinstance(patching, CalibratedPatching):
        _check_entropies(dataset, patching.kind)
    if isinstance(patching, CalibratedPatching) and patching.needs_calibration:
        if patching.patch_size is None:
            raise PatchingError(
                f"the {patching.kind} rule has no threshold: set "
                f"patching.{patching.threshold_name}, or patching.patch_size to calibrate it"
            )
        patching = calibrate_sample(patching, sample_dataset(dataset), patching.patch_size)
    return recipe.model_copy(update={"patching": patching})


def _with_units(recipe: Recipe, dataset: Dataset, units: Units) -> Recipe:
    """Return a recipe with how rows are filled and their number of units, if they have a budget."""
    data = recipe.data
    if not units.has_budget:
        return recipe
    if data.packing is None and data.tokenizer is None:
        data = data.model_copy(update={"packing": "balanced"})
    if data.row_patches is None:
        sample = sample_dataset(dataset, units.sample_bytes)
        data = with_room(data, units.mean_bytes(all_documents(sample)))
        if data.packing == "balanced":
            data = with_measured_room(recipe.model_copy(update={"data": data}), dataset, units)
    return recipe.model_copy(update={"data": data})


def choose_device(config: TrainConfig) -> torch.device:
    """Return the device that a recipe asks for.

    Raises:
        ConfigError: the device is not available.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but no CUDA device is available: use auto or cpu")
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _load_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """Return the tokenizer of a recipe, after checking that the model has its vocabulary size."""
    vocab_size = getattr(recipe.model, "vocab_size", None)
    if recipe.data.tokenizer is None:
        if vocab_size is not None and vocab_size > VOCAB_SIZE:
            raise ConfigError(
                f"model.vocab_size is {vocab_size}, more than the {VOCAB_SIZE} ids of bytes: add "
                f"data.tokenizer=FILE, made by `bytelm data tokenizer DATA --vocab-size "
                f"{vocab_size} --out FILE`, or set model.vocab_size={VOCAB_SIZE} for a model of "
                "bytes"
            )
        return None
    path = Path(recipe.data.tokenizer)
    tokenizer = load_tokenizer(path)
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
            "--scorer, or choose a rule that needs none, such as 'patching={kind: space}'"
        )
