"""Byte-level language models built on the Byte Latent Transformer.

>>> import bytelm
>>> lm = bytelm.load("bytelm-quickstart/blt")
>>> lm.patch("def f(x): return x").patches
>>> lm.bits_per_byte("def f(x): return x")
>>> lm.generate("def ", max_bytes=100)
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from bytelm.errors import (
    BytelmError,
    CheckpointError,
    ConfigError,
    DataError,
    NumericalError,
    PatchingError,
    TrainingError,
)
from bytelm.version import __version__

if TYPE_CHECKING:
    from bytelm import interop
    from bytelm.chat import chat_prompt
    from bytelm.inference import GREEDY, Sampling
    from bytelm.language_model import LanguageModel, PatchedText, load
    from bytelm.lm import register_model
    from bytelm.patching import register_rule
    from bytelm.scoring import register_scorer
    from bytelm.workflow import build, prepare, train

# Threads that wait for each other spin by default, which other processes slow up to tenfold.
# OpenMP reads this when torch is imported; later it would only reach processes started from here.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Loaded when first used, so that `bytelm --help` does not wait for torch.
_LAZY = {
    "GREEDY": "bytelm.inference",
    "LanguageModel": "bytelm.language_model",
    "PatchedText": "bytelm.language_model",
    "Sampling": "bytelm.inference",
    "build": "bytelm.workflow",
    "chat_prompt": "bytelm.chat",
    "load": "bytelm.language_model",
    "prepare": "bytelm.workflow",
    "register_model": "bytelm.lm",
    "register_rule": "bytelm.patching",
    "register_scorer": "bytelm.scoring",
    "train": "bytelm.workflow",
}


def __getattr__(name: str) -> object:
    if name == "interop":
        return import_module("bytelm.interop")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bytelm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "GREEDY",
    "BytelmError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LanguageModel",
    "NumericalError",
    "PatchedText",
    "PatchingError",
    "Sampling",
    "TrainingError",
    "__version__",
    "build",
    "chat_prompt",
    "interop",
    "load",
    "prepare",
    "register_model",
    "register_rule",
    "register_scorer",
    "train",
]
