"""Complete a recipe from the checkpoint that it trains on from.

What such a recipe leaves out of its model, its patching rule, its tokenizer and the size of its
rows is taken from the checkpoint; what it gives is kept, and compared when the weights are loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bytelm.config.kinds import import_kinds
from bytelm.config.model import MODELS, SCORERS
from bytelm.config.names import modernise
from bytelm.config.patching import RULES
from bytelm.config.recipe import InitConfig
from bytelm.errors import CheckpointError, ConfigError
from bytelm.layout import CONFIG, TOKENIZER, find_checkpoint
from bytelm.storage import FILES, at_home, read_json


def origin_folder(init: InitConfig) -> Path:
    """Return the folder of the checkpoint that a run begins with.

    Raises:
        CheckpointError: there is no checkpoint of ours; the message says how to make one.
    """
    return _folder(init.checkpoint)


def complete(data: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe, completed from the checkpoint that ``init.from`` names.

    If the checkpoint cannot be read, a recipe with a model is returned as it is: a run that has
    checkpoints of its own does not need it, and others will say so.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, and the recipe has no model.
        ConfigError: the checkpoint holds a scorer, which is not trained.
    """
    init = data.get("init")
    name = init.get("from") if isinstance(init, Mapping) else None
    if not isinstance(name, str):
        return data
    try:
        folder = _folder(name)
        known = _description(folder)
    except CheckpointError:
        if "model" in data:
            return data
        raise
    _check_trainable(known.get("model"), name)
    tuned = {"model": known.get("model"), "data": {}}
    if known.get("patching") is not None:
        tuned["patching"] = _rule(known["patching"], data.get("patching"))
    if known.get("context_bytes") is not None:
        tuned["data"]["row_bytes"] = known["context_bytes"]
    if known.get("tokens"):
        tuned["data"]["tokenizer"] = str(folder / TOKENIZER)
    return {**data, **{key: _filled(data.get(key), own) for key, own in tuned.items()}}


def _filled(given: Any, own: Any) -> Any:
    """Return a given value, in which what it leaves out is filled in from a checkpoint's own."""
    if given is None:
        return own
    if not isinstance(given, Mapping) or not isinstance(own, Mapping):
        return given
    if given.get("kind", own.get("kind")) != own.get("kind"):
        return given
    return {**own, **{key: _filled(value, own.get(key)) if value is not None else None
                      for key, value in given.items()}}  # fmt: skip


def _rule(own: Mapping[str, Any], given: Any) -> Mapping[str, Any]:
    """Return a checkpoint's rule, without a threshold that the recipe's patch size replaces."""
    size = given.get("patch_size") if isinstance(given, Mapping) else None
    if size is None or size == own.get("patch_size"):
        return own
    calibrated = getattr(RULES.nodes.get(str(own.get("kind"))), "threshold_name", None)
    return {key: value for key, value in own.items() if key != calibrated}


def _check_trainable(model: Any, name: str) -> None:
    kind = model.get("kind") if isinstance(model, Mapping) else None
    if kind not in MODELS.nodes and kind not in SCORERS.nodes:
        # Reported as an unknown kind if it is none of other packages either.
        import_kinds()
    if kind in SCORERS.nodes and kind not in MODELS.nodes:
        raise ConfigError(
            f"init.from: {name} holds a {kind} scorer, which is counted, not trained: fit another "
            "with `bytelm train entropy-ngram`, or name a model"
        )


def _folder(name: str) -> Path:
    path = at_home(name)
    if not (path.parent if path.name == "best" else path).is_dir():
        hub = "; for a repository of the Hugging Face Hub, import it first" * (name.count("/") == 1)
        raise CheckpointError(
            f"init.from: no checkpoint at {name}: there is no such folder{hub} (`bytelm import "
            "--help`); init=null begins with random weights"
        )
    folder = find_checkpoint(path)
    if not (folder / FILES).is_file():
        raise CheckpointError(f"init.from: {folder} is not a checkpoint of bytelm{_advice(folder)}")
    return folder


def _advice(folder: Path) -> str:
    """Return what to do with weights in the format of another project."""
    try:
        foreign = json.loads((folder / CONFIG).read_text("utf-8"))
        is_hf = isinstance(foreign, dict) and "model_type" in foreign
    except (OSError, ValueError):
        is_hf = False
    if is_hf:
        command = f"hf {folder}"
    elif any((folder / name).exists() for name in (CONFIG, "params.json")):
        command = f"official --blt {folder} --entropy ENTROPY"
    else:
        return ": name a folder of a checkpoint or of a training run"
    return f": import it with `bytelm import {command} --out OUT`, and set init.from=OUT"


def _description(folder: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint's configuration, with the present names of keys."""
    data = read_json(folder / CONFIG)
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged: use another checkpoint")
    return modernise(data)
