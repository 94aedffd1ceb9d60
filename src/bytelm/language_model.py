"""A saved model, ready to use: patch text, measure bits per byte, generate."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm import codec
from bytelm.checkpoint import CheckpointConfig, Precision, load_model, save_model
from bytelm.config import PatchingConfig, kind_of
from bytelm.errors import CheckpointError, ConfigError
from bytelm.evaluation import Likelihood, evaluate
from bytelm.inference import GREEDY, Generated, Sampling, stream
from bytelm.lm import CausalLM
from bytelm.lm.kinds import CANNOT_PREDICT
from bytelm.patching import build_patcher
from bytelm.scoring import score_documents

DEFAULT_CONTEXT_BYTES = 8192
"""Longest piece scored at once by models that do not say what they were trained on."""


@dataclass(frozen=True)
class PatchedText:
    """A text and its patches."""

    data: bytes
    boundaries: tuple[int, ...]
    """Positions in ``data`` that start a patch. 0 always does: BOS before it is a patch alone."""
    entropies: NDArray[np.float32] | None
    """``entropies[i]`` is that of the prediction of byte ``i``, in nats; one more than there are
    bytes, the last being that of the byte after the text."""
    rule: PatchingConfig

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each patch begins and ends; none where there is no text."""
        return list(pairwise([*self.boundaries, len(self.data)]))

    @property
    def patches(self) -> list[bytes]:
        """The bytes of each patch."""
        return [self.data[begin:end] for begin, end in self.spans]

    @property
    def patch_size(self) -> float:
        """Mean bytes per patch of the text; the patch that BOS is alone is left out."""
        return len(self.data) / max(len(self.boundaries), 1)


class LanguageModel:
    """A saved model, as :func:`load` returns it.

    Text may be ``str`` (taken as UTF-8) or any ``bytes``.
    """

    def __init__(self, module: CausalLM, config: CheckpointConfig) -> None:
        self.module = module
        self.config = config

    @property
    def context_bytes(self) -> int:
        """Longest stretch of text the model was trained on."""
        return self.config.context_bytes or DEFAULT_CONTEXT_BYTES

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    def save(self, path: str | PathLike[str]) -> None:
        """Save as a checkpoint folder.

        Raises:
            CheckpointError: the folder exists, or cannot be written.
        """
        save_model(Path(path), self.module, self.config, self.config.training)

    def entropies(self, text: str | bytes) -> NDArray[np.float32]:
        """Return the entropy of the prediction of each byte, and of the byte after the text.

        In nats, one more than there are bytes.

        Raises:
            ConfigError: the model neither has a scorer nor is one.
        """
        ids = torch.from_numpy(codec.encode(text)).to(self.device)
        return score_documents(self.module.get_scorer(), [ids])[0].cpu().numpy()

    def patch(self, text: str | bytes, rule: PatchingConfig | None = None) -> PatchedText:
        """Cut a text into patches.

        Args:
            text: any bytes.
            rule: another rule than the model's own; entropies come from its scorer, or from the
                model itself if it is one.

        Raises:
            ConfigError: the model has no rule of its own, or no entropies for the one given.
            PatchingError: the rule has no threshold.
        """
        rule = rule or self.config.patching
        if rule is None:
            raise ConfigError(
                f"a {kind_of(type(self.config.model))} model has no patching rule of its own: "
                "name one"
            )
        patcher = build_patcher(rule)
        data = codec.to_bytes(text)
        entropies = None
        with nullcontext() if patcher.needs_entropies else suppress(ConfigError):
            entropies = self.entropies(data)
        scores = torch.from_numpy(entropies)[None] if entropies is not None else None
        ids = torch.from_numpy(codec.encode(data))[None]
        next_boundary = patcher.next_boundary(ids, scores)[0, : len(data)]
        boundaries = tuple(next_boundary.nonzero().flatten().tolist())
        return PatchedText(data, boundaries, entropies, rule)

    def likelihood(
        self, texts: Iterable[tuple[str, bytes]], *, stride: int | None = None
    ) -> dict[str, Likelihood]:
        """Likelihood of labelled texts, totalled by label.

        Args:
            texts: (label, text) pairs.
            stride: see :func:`bytelm.evaluation.evaluate`.

        Raises:
            ConfigError: the model is a table of entropies, or the stride is out of range.
        """
        if not self.module.can_predict:
            raise ConfigError(CANNOT_PREDICT)
        return evaluate(self.module, texts, context_bytes=self.context_bytes, stride=stride)

    def bits_per_byte(
        self, text: str | bytes | Iterable[str | bytes], *, stride: int | None = None
    ) -> float:
        """Bits per byte of one text, or of several together.

        Raises:
            ConfigError: as :meth:`likelihood`.
        """
        texts = [text] if isinstance(text, str | bytes) else text
        labelled = (("", codec.to_bytes(t)) for t in texts)
        return self.likelihood(labelled, stride=stride).get("", Likelihood()).bits_per_byte

    def generate(
        self,
        prompt: str | bytes = b"",
        *,
        max_bytes: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | bytes | Sequence[str | bytes] = (),
    ) -> bytes:
        """Continue a prompt; the bytes after it.

        Raises:
            ConfigError: an option is out of range.
        """
        parts = self.stream(prompt, max_bytes=max_bytes, sampling=sampling, stop=stop)
        return b"".join(part.data for part in parts)

    def stream(
        self,
        prompt: str | bytes = b"",
        *,
        max_bytes: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | bytes | Sequence[str | bytes] = (),
    ) -> Iterator[Generated]:
        """Continue a prompt, yielding bytes as soon as they are certain.

        Args:
            prompt: any bytes, or none.
            max_bytes: most bytes to generate.
            sampling: how each byte is chosen.
            stop: one or several texts that end generation and are left out.

        Raises:
            ConfigError: an option is out of range.
        """
        stops = [stop] if isinstance(stop, str | bytes) else stop
        return stream(
            self.module,
            codec.to_bytes(prompt),
            max_bytes=max_bytes,
            sampling=sampling,
            stop=[codec.to_bytes(s) for s in stops],
        )

    def stream_text(
        self,
        prompt: str | bytes = b"",
        *,
        max_bytes: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | bytes | Sequence[str | bytes] = (),
    ) -> Iterator[str]:
        """Like :meth:`stream`, as text: no character is split, invalid bytes become U+FFFD."""
        decoder = codec.Utf8Stream()
        for part in self.stream(prompt, max_bytes=max_bytes, sampling=sampling, stop=stop):
            text = decoder.feed(part.data)
            if text:
                yield text
        rest = decoder.close()
        if rest:
            yield rest


def load(
    path: str | PathLike[str], device: str = "auto", precision: Precision = "auto"
) -> LanguageModel:
    """Load a checkpoint, or the newest one of a training run.

    Args:
        path: folder of a checkpoint or a run.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is one.
        precision: of the weights: ``float32``, ``bfloat16``, ``stored``, or ``auto`` for fp32 on
            the CPU and as stored elsewhere. The scorer of a BLT is fp32 but with ``stored``.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: there is no such precision.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        module, config = load_model(Path(path), torch.device(device), precision)
    except RuntimeError as error:
        raise CheckpointError(f"cannot load {path} on {device}: {error}") from error
    return LanguageModel(module, config)
