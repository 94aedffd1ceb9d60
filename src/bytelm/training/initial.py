"""Load the weights of a checkpoint that a run begins with, after checking that they fit."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytelm.checkpoint import CheckpointConfig, fingerprint, load_tensors, read_config
from bytelm.config import (
    MODELS,
    CalibratedPatching,
    InitConfig,
    ModelDescription,
    differences,
    kind_of,
)
from bytelm.config.starting import origin_folder
from bytelm.errors import CheckpointError, ConfigError, DataError
from bytelm.layout import MODEL, SCORER, TOKENIZER, check_checkpoint
from bytelm.lm import CausalLM, build_lm
from bytelm.tokens import load_tokenizer
from bytelm.training.parts import select


def load_initial(init: InitConfig, lm: CausalLM, description: ModelDescription) -> dict[str, Any]:
    """Load all weights of a checkpoint into a model, or those of some parts.

    Args:
        init: the checkpoint, and the parts to take.
        lm: the model, with weights that the others keep.
        description: description of the model.

    Returns:
        A record of the checkpoint: its folder, the fingerprint of its configuration and weights,
        its step, and the parts that were taken.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: its model, parts or tokenizer differ from those of the recipe.
        DataError: the data was scored by another scorer than the checkpoint's, whose threshold the
            recipe keeps.
    """
    folder = origin_folder(init)
    check_checkpoint(folder)
    known = read_config(folder)
    _check_kind(known, description, folder)
    if init.parts is None:
        _check_model(known, description, folder)
        _check_scorer(known, description, lm, folder)
    _check_tokenizer(lm, folder)
    tensors = load_tensors(folder / MODEL, lm.trained)
    if init.parts is not None:
        tensors = _selected(tensors, init.parts, lm, known, folder)
    _fill(lm.trained, tensors, folder, is_whole=init.parts is None)
    return {
        "from": str(folder),
        "fingerprint": fingerprint(folder),
        "step": (known.training or {}).get("step"),
        "parts": init.parts,
    }


def _check_kind(known: CheckpointConfig, description: ModelDescription, folder: Path) -> None:
    theirs, ours = kind_of(type(known.model)), kind_of(type(description.model))
    if type(known.model) not in MODELS.nodes.values() or theirs != ours:
        raise ConfigError(
            f"init.from: {folder} holds a {theirs} model, the recipe a {ours}: name a checkpoint "
            f"of a {ours}, or another recipe"
        )


def _check_model(known: CheckpointConfig, description: ModelDescription, folder: Path) -> None:
    changed = differences(
        known.model.model_dump(mode="json"), description.model.model_dump(mode="json"), "model."
    )
    if changed:
        raise ConfigError(
            f"init.from: {folder} holds another model than the recipe ({'; '.join(changed)}): "
            "leave these settings out, to take them from the checkpoint, or name the parts to take "
            "in init.parts"
        )


def _check_tokenizer(lm: CausalLM, folder: Path) -> None:
    path = folder / TOKENIZER
    own = load_tokenizer(path).fingerprint if path.exists() else None
    ours = lm.tokenizer.fingerprint if lm.tokenizer is not None else None
    if own != ours:
        remedy = f"set data.tokenizer={path}" if own else "leave data.tokenizer out"
        raise ConfigError(f"init.from: {folder} reads other tokens than the recipe: {remedy}")


def _check_scorer(
    known: CheckpointConfig, description: ModelDescription, lm: CausalLM, folder: Path
) -> None:
    """Check that a threshold kept from the checkpoint is applied to entropies of its scorer."""
    old, new = known.patching, description.patching
    if not isinstance(old, CalibratedPatching) or type(old) is not type(new):
        return
    name = old.threshold_name
    if getattr(old, name) != getattr(new, name) or known.scorer is None:
        return
    if known.scorer == description.scorer and _has_weights(lm.saved["scorer"], folder / SCORER):
        return
    raise DataError(
        f"the data was scored by another scorer than that of {folder}, to which its "
        f"patching.{name}={getattr(old, name):g} belongs: prepare the data with --scorer {folder}, "
        f"or calibrate the rule for the new scorer with patching.{name}=null and "
        "patching.patch_size"
    )


def _has_weights(module: nn.Module, path: Path) -> bool:
    """Whether a module has the weights in a file."""
    theirs, ours = load_tensors(path, module), module.state_dict()
    return theirs.keys() == ours.keys() and all(
        torch.equal(theirs[name].to(ours[name]), ours[name]) for name in ours
    )


def _selected(
    tensors: dict[str, Tensor],
    parts: list[str],
    lm: CausalLM,
    known: CheckpointConfig,
    folder: Path,
) -> dict[str, Tensor]:
    """Return the tensors of some parts, which the model and the checkpoint must have alike."""
    with torch.device("meta"):
        theirs = build_lm(known, tokenizer=lm.tokenizer).trained
    wanted = {name for model in (lm.trained, theirs) for name in select(model, parts, "init.parts")}
    if "vocabulary" in parts:
        # Its trie says which pieces the vectors are of.
        wanted |= {name for name in tensors if name.startswith("vocabulary.")}
    ours = lm.trained.state_dict()
    for name in sorted(wanted):
        shapes = [list(one[name].shape) if name in one else None for one in (tensors, ours)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"init.parts: {name} has shape {shapes[0]} in {folder}, and {shapes[1]} in the "
                "model of the recipe: give the parts the same size, or take others"
            )
    return {name: tensors[name] for name in wanted}


def _fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path, *, is_whole: bool) -> None:
    """Copy tensors into a module, in its precision."""
    expected = module.state_dict()
    wrong = {name for name in tensors if name not in expected}
    wrong |= {n for n in tensors.keys() & expected if tensors[n].shape != expected[n].shape}
    wrong |= expected.keys() - tensors.keys() if is_whole else set()
    if wrong:
        raise CheckpointError(
            f"init.from: the weights in {folder} do not fit the recipe's model and patching rule: "
            f"{', '.join(sorted(wrong)[:3])}"
        )
    module.load_state_dict(tensors, strict=False)
