"""Causal language models of ``transformers``, by the harness's own adapter.

A model is a folder, a GGUF file or a Hub repository, so a token model is asked what checkpoints of
this package are asked, by code that is not ours.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from bytelm.errors import ConfigError
from bytelm.storage import at_home

__all__ = ["hugging_face_arguments", "hugging_face_model", "short_names"]

OFFLINE = (
    "without a network, name a folder or a GGUF file, or download the model before and set "
    "HF_HUB_OFFLINE=1"
)


def hugging_face_model(model: str, device: str = "cpu") -> LM:
    """Return a causal language model of ``transformers``, in float32 on the CPU.

    Args:
        model: folder, GGUF file or Hub repository; or the arguments of the harness's model type
            ``hf``, such as ``pretrained=OWNER/NAME,dtype=bfloat16``.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA if it is available.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # As --precision auto: on the CPU in float32, elsewhere as stored.
    options: dict[str, Any] = {"batch_size": 1, "dtype": "float32" if device == "cpu" else "auto"}
    arguments = hugging_face_arguments(model)
    # It announces each of five attempts to reach the Hub, and the last error says the same.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return HFLM(**options | {"device": device} | arguments)
    except MemoryError:
        raise
    # Errors of transformers have many types, and messages of many lines.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
        is_local = Path(str(arguments.get("pretrained"))).exists()
        remedy = "" if is_local else f"; {OFFLINE}"
        raise ConfigError(f"cannot load {model}: {reason}{remedy}") from None


def hugging_face_arguments(model: str) -> dict[str, Any]:
    """Return the arguments of the harness's model type ``hf`` for a model.

    Args:
        model: folder, GGUF file or Hub repository, or the arguments themselves.

    Raises:
        ConfigError: a file is no GGUF file, a folder holds no model, or a path leads nowhere.
    """
    path = at_home(model)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"{model} is a file, but not a GGUF file: name its folder")
        return {"pretrained": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if (path / "config.json").is_file():
            return {"pretrained": str(path)}
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) == 1:
            return {"pretrained": str(path), "gguf_file": found[0]}
        problem = f"{len(found)} GGUF files: name one" if found else "neither config.json nor GGUF"
        raise ConfigError(f"{model} is no model of Hugging Face: the folder holds {problem}")
    if "=" in model:
        return simple_parse_args_string(model)
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ConfigError(
            f"there is no model at {model}: name a folder, a GGUF file, or a Hub repository "
            "(OWNER/NAME)"
        )
    return {"pretrained": model}


def short_names(models: Sequence[str]) -> list[str]:
    """Return the names of models in tables: file, folder or repository, or all of it if shared.

    Raises:
        ConfigError: a model is given twice, or is none.
    """
    if len(set(models)) < len(models):
        raise ConfigError("a model of --hf is given twice: compare different ones")
    arguments = map(hugging_face_arguments, models)
    last = [
        Path(str(one.get("gguf_file") or one.get("pretrained") or model)).name
        for model, one in zip(models, arguments, strict=True)
    ]
    return last if len(set(last)) == len(last) else list(models)
