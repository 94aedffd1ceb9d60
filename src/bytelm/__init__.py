"""Byte-level language models built on the Byte Latent Transformer.

>>> import bytelm
>>> lm = bytelm.load("bytelm-quickstart/blt")
>>> lm.patch("def f(x): return x").patches
>>> lm.bits_per_byte("def f(x): return x")
>>> lm.generate("def ", max_bytes=100)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bytelm.errors import (
    BytelmError,
    CheckpointError,
    ConfigError,
    DataError,
    PatchingError,
    TrainingError,
)
from bytelm.version import __version__

if TYPE_CHECKING:
    from bytelm import interop
    from bytelm.generation import GREEDY, Sampling
    from bytelm.language_model import LanguageModel, PatchedText, load

# Loaded when first used, so that `bytelm --help` does not wait for torch.
_LAZY = {
    "GREEDY": "bytelm.generation",
    "LanguageModel": "bytelm.language_model",
    "PatchedText": "bytelm.language_model",
    "Sampling": "bytelm.generation",
    "load": "bytelm.language_model",
}


def __getattr__(name: str) -> object:
    if name == "interop":
        return import_module("bytelm.interop")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bytelm' has no attribute {name!r}")


__all__ = [
    "GREEDY",
    "BytelmError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LanguageModel",
    "PatchedText",
    "PatchingError",
    "Sampling",
    "TrainingError",
    "__version__",
    "interop",
    "load",
]
