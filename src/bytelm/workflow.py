"""From text to a trained model in Python: ``prepare``, ``train`` and ``build``.

They do what ``bytelm data prepare`` and ``bytelm train`` do, print nothing, and return their
results; :func:`build` returns a model that has not been trained, for a training loop of one's own.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from typing import Any

import torch

from bytelm import cpu
from bytelm.checkpoint import CheckpointConfig, load_scorer
from bytelm.config import (
    EntropyPatching,
    ModelDescription,
    NgramRecipe,
    Recipe,
    load_recipe,
    nearest,
)
from bytelm.data import (
    Manifest,
    PreparationState,
    PrepareOptions,
    ReadOptions,
    read_manifest,
)
from bytelm.data import (
    prepare as prepare_data,
)
from bytelm.data.calibration import calibrate_folder
from bytelm.errors import ConfigError, PatchingError
from bytelm.language_model import LanguageModel
from bytelm.lm import build_lm
from bytelm.patching import build_patcher
from bytelm.progress import Callback
from bytelm.storage import at_home
from bytelm.training import TrainingResult, fit_ngrams
from bytelm.training import train as train_recipe
from bytelm.training.initial import load_initial
from bytelm.training.parts import freeze
from bytelm.training.setup import set_up
from bytelm.training.trainer import choose_device

AnyPath = str | PathLike[str]
AnyRecipe = AnyPath | Mapping[str, Any] | Recipe | NgramRecipe
"""Name of a shipped recipe, path to a YAML file, mapping with its contents, or a loaded recipe."""
Overrides = Iterable[str] | Mapping[str, Any]
"""``key.path=value`` strings as on the command line, or a mapping of key paths to values."""

_READ, _PREPARE = ({f.name for f in fields(of)} for of in (ReadOptions, PrepareOptions))


def prepare(
    inputs: AnyPath | Iterable[AnyPath],
    out: AnyPath,
    *,
    scorer: AnyPath | None = None,
    patch_size: float = 4.5,
    validation: AnyPath | Iterable[AnyPath] = (),
    validation_share: float | None = None,
    workers: int | None = None,
    progress: Callable[[PreparationState], None] = lambda state: None,
    **options: Any,
) -> Manifest:
    """Prepare text as Arrow shards in a folder, with entropies if a scorer is given.

    Data that is already prepared with the same settings is kept, and a preparation that was stopped
    resumes. With a scorer, a threshold for ``patch_size`` is found and recorded; if there is none,
    a warning says why.

    Args:
        inputs: files, folders, globs, prepared data, saved Hugging Face datasets, or data
            sets of the Hub (``hub:OWNER/NAME``); ``NAME=INPUT`` names a source.
        out: folder to create.
        scorer: checkpoint of the scorer that computes the entropies.
        patch_size: mean bytes per patch to find a threshold for.
        validation: inputs to hold out whole.
        validation_share: share of the other documents to hold out; ``None`` for 0.01, or 0 with
            ``validation``.
        workers: number of processes; ``None`` for one per core with a scorer, otherwise one. In a
            script, more than one need ``if __name__ == "__main__":``.
        progress: called now and then with the progress.
        options: fields of :class:`bytelm.data.ReadOptions` (``format``, ``field``, ``include``,
            ...) and of :class:`bytelm.data.PrepareOptions`.

    Returns:
        The manifest: what was read, and the calibration.

    Raises:
        ConfigError: an option is unknown.
        DataError: an input cannot be read, or ``out`` holds something else.
        CheckpointError: the scorer cannot be loaded.
    """
    taken = {"read", "scorer", "validation", "validation_share", "workers"}
    known = sorted(_READ | _PREPARE - taken)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{nearest(name, known)}: {', '.join(known)}")
    folder = at_home(out)
    settings = PrepareOptions(
        read=ReadOptions(**{name: x for name, x in options.items() if name in _READ}),
        scorer=None if scorer is None else at_home(scorer),
        validation=tuple(_paths(validation)),
        validation_share=validation_share,
        workers=workers,
        **{name: x for name, x in options.items() if name not in _READ},
    )
    manifest = prepare_data(_paths(inputs), folder, settings, progress)
    if scorer is None:
        return manifest
    try:
        calibrate_folder(folder, EntropyPatching(), patch_size)
    except PatchingError as error:
        warnings.warn(f"{folder} is prepared, but not calibrated: {error}", stacklevel=2)
    return read_manifest(folder)


def train(
    recipe: AnyRecipe,
    out: AnyPath,
    *,
    overrides: Overrides = (),
    callbacks: Sequence[Callback] = (),
    time_limit: float | None = None,
) -> TrainingResult:
    """Train a recipe in a folder, or resume the run there; ``bytelm.load(out)`` loads the model.

    More ``train.steps`` extend the run there, if its schedule is wsd or constant.

    ::

        bytelm.train("blt-1m", "run", overrides={"data.path": "scored", "train.steps": 500})

    Args:
        recipe: name of a shipped recipe, path to a YAML file, mapping with its contents, or a
            loaded recipe.
        out: folder of the run, created if it does not exist.
        overrides: values to set in the recipe: a mapping of key paths, or ``key.path=value``
            strings.
        callbacks: receivers of the run's events; not called for n-gram scorers.
        time_limit: seconds after which to stop with a checkpoint.

    Returns:
        What was trained. An n-gram scorer is counted in one step, of no FLOPs.

    Raises:
        ConfigError: the recipe is incomplete, or differs from that of the run in the folder.
        BytelmError: as :func:`bytelm.training.train`.
    """
    loaded, folder = _load(recipe, overrides), at_home(out)
    if isinstance(loaded, NgramRecipe):
        fit_ngrams(loaded, folder)
        return TrainingResult(step=1, finished=True, validation={}, flops=0.0, bytes_seen=0)
    return train_recipe(loaded, folder, callbacks=callbacks, time_limit=time_limit)


def build(
    recipe: AnyRecipe, *, overrides: Overrides = (), scorer: AnyPath | None = None
) -> LanguageModel:
    """Return a model with initial weights, to train in a loop of one's own.

    If the recipe names its data, the model is the one that :func:`train` would begin with: its
    threshold, scorer and tokenizer come from there. Without data, a patching rule with a threshold
    must have one, and ``scorer`` is needed if the rule needs entropies.

    Args:
        recipe: as for :func:`train`; of a mapping only ``model`` and ``patching`` are needed.
        overrides: as for :func:`train`.
        scorer: checkpoint of the scorer, if the recipe names no data.

    Raises:
        ConfigError: the recipe is incomplete, or is one of an n-gram scorer.
        PatchingError: the rule has no threshold.
        BytelmError: the data or the scorer cannot be read.
    """
    if isinstance(recipe, Mapping):
        recipe = {"train": {"steps": 1}, **recipe}
    loaded = _load(recipe, overrides)
    if isinstance(loaded, NgramRecipe):
        raise ConfigError("an n-gram scorer is counted, not trained: use bytelm.train")
    device = choose_device(loaded.train)
    if loaded.data.path is not None:
        if scorer is not None:
            raise ConfigError("data.path brings its own scorer: leave out one of the two")
        setup = set_up(loaded, device)
        setup.lm.to(device)
        return LanguageModel(setup.lm, CheckpointConfig(**dict(setup.description)))
    return _build_alone(loaded, scorer, device)


def _build_alone(loaded: Recipe, scorer: AnyPath | None, device: torch.device) -> LanguageModel:
    """Return the model of a recipe that names no data."""
    module, config = None, None
    if scorer is not None:
        path = at_home(scorer)
        module, config = load_scorer(path, reset_at_newline=False, device=device)
    description = ModelDescription(
        model=loaded.model,
        patching=loaded.patching,
        scorer=config,
        context_bytes=loaded.data.row_bytes,
    )
    rule = None if loaded.patching is None else build_patcher(loaded.patching)
    if rule is not None and rule.needs_entropies and module is None:
        raise ConfigError(
            "the patching rule needs entropies: name a scorer, or data that was prepared with one"
        )
    lm = build_lm(description, scorer=module)
    init_weights = getattr(lm.trained, "init_weights", None)
    if init_weights is not None:
        init_weights(torch.Generator().manual_seed(loaded.train.seed))
    if loaded.init is not None:
        load_initial(loaded.init, lm, description)
    freeze(lm.trained, loaded.optimizer.freeze)
    cpu.fuse(lm.trained.to(device))
    return LanguageModel(lm, CheckpointConfig(**dict(description)))


def _load(recipe: AnyRecipe, overrides: Overrides) -> Recipe | NgramRecipe:
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(x, default=fspath)}" for key, x in overrides.items()]
    if isinstance(recipe, Recipe | NgramRecipe):
        overrides = list(overrides)
        return load_recipe(recipe.model_dump(mode="json"), overrides) if overrides else recipe
    return load_recipe(recipe if isinstance(recipe, Mapping) else fspath(recipe), overrides)


def _paths(paths: AnyPath | Iterable[AnyPath]) -> list[str]:
    if isinstance(paths, str | PathLike):
        return [fspath(paths)]
    return [fspath(path) for path in paths]
