"""Answers of models of the harness, kept on disk by its own ``CachingLM`` and read again.

A file holds the answers of one model. Its name is a hash of the weights and the configuration, so
another checkpoint, precision or threshold has another file. Within it an answer is found by the
whole text of the request, so noised requests and other prompts have answers of their own.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from torch import nn

from bytelm.errors import ConfigError
from bytelm.evaluation.harness.adapter import HarnessLM
from bytelm.storage import disk_errors
from bytelm.version import __version__

__all__ = ["CachedLM", "WrappedLM", "fingerprint", "unwrapped"]


class WrappedLM(LM):
    """A model of the harness around another one, which has whatever this one lacks."""

    def __init__(self, lm: LM) -> None:
        super().__init__()
        self.lm = lm
        self._rank, self._world_size = lm.rank, lm.world_size

    def __getattr__(self, name: str) -> Any:
        # What the harness asks of some models only, such as their description.
        if name == "lm":
            raise AttributeError(name)
        return getattr(self.lm, name)

    @property
    def tokenizer_name(self) -> str:
        """Name of the wrapped model's tokenizer."""
        return self.lm.tokenizer_name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt of a conversation, as the wrapped model writes it."""
        return self.lm.apply_chat_template(chat_history, add_generation_prompt)


def unwrapped(lm: LM) -> LM:
    """Return the model itself, without what is around it."""
    while isinstance(lm, WrappedLM):
        lm = lm.lm
    return lm


class CachedLM(WrappedLM):
    """A model of the harness whose answers are kept on disk.

    Answers are written as they come, so those of a run that was interrupted are read by the next
    one. Sampled text is generated every time.

    Args:
        lm: the model, of this package or of ``transformers``.
        folder: folder of the answers.
        described: what else the answers depend on, such as the options of the model.

    Raises:
        ConfigError: the folder cannot be written, or the file of the answers is damaged.
    """

    def __init__(self, lm: LM, folder: Path, described: str = "") -> None:
        super().__init__(lm)
        path = folder / f"{fingerprint(lm, described)}.db"
        with disk_errors(folder, ConfigError, "{remedy}"):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with sqlite3.connect(path) as database:
                database.execute("PRAGMA user_version = 1")
            database.close()
        except sqlite3.Error as error:
            raise ConfigError(f"cannot keep answers in {path}: {error}; remove the file") from None
        self._answers = CachingLM(lm, str(path))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        return self._answers.loglikelihood(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each document."""
        return self._answers.loglikelihood_rolling(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the continuation of each prompt."""
        return self._answers.generate_until(requests)


def fingerprint(lm: LM, described: str = "") -> str:
    """Return a hash of all that the answers of a model depend on, but the requests.

    Args:
        lm: model of this package or of ``transformers``.
        described: what else they depend on.
    """
    digest = hashlib.sha256()
    for part in (__version__, torch.__version__, described, *_description(lm)):
        digest.update(f"{len(part)} {part}".encode())
    for name, tensor in sorted(_module(lm).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _description(lm: LM) -> Iterator[str]:
    """Yield the configuration of a model, its tokenizer and its device."""
    if isinstance(lm, HarnessLM):
        own = lm.lm
        yield own.config.model_dump_json(exclude={"training"})
        yield str(lm.bytes_per_token)
        yield str(own.device.type)
        yield own.module.tokenizer.fingerprint if own.module.tokenizer is not None else ""
    else:
        # A model of transformers; others have no weights here.
        found: Any = lm
        yield found.model.config.to_json_string()
        yield f"{found.device.type} {found.max_length} {found.add_bos_token}"
        backend = getattr(found.tokenizer, "backend_tokenizer", None)
        yield backend.to_str() if backend else str(sorted(found.tokenizer.get_vocab().items()))


def _module(lm: LM) -> nn.Module:
    found: Any = lm
    return lm.lm.module if isinstance(lm, HarnessLM) else found.model
