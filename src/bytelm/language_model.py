"""A saved model, ready to use: patch text, measure bits per byte, generate."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm import codec
from bytelm.checkpoint import CheckpointConfig, Precision, load_model, save_model
from bytelm.codec import Text
from bytelm.config import PatchingConfig, kind_of, nearest
from bytelm.config.rules import RULE_OPTIONS, named_rule
from bytelm.errors import CheckpointError, ConfigError, DataError
from bytelm.inference import GREEDY, Generated, Sampling, stream, stream_many
from bytelm.likelihood import Labelled, Likelihood, evaluate, log_likelihoods, log_probs
from bytelm.lm import CausalLM
from bytelm.lm.kinds import CANNOT_PREDICT
from bytelm.patched_text import AnyRule, PatchedText, patch_text, text_entropies
from bytelm.patching import Scorer
from bytelm.progress import ignore
from bytelm.storage import at_home

__all__ = ["LanguageModel", "PatchedText", "load"]

DEFAULT_CONTEXT_BYTES = 8192
"""Context length, in bytes, of models that do not record the one they were trained with."""

DEFAULT_SLOTS = 16
"""Prompts that are decoded at once."""


class LanguageModel:
    """Model, as :func:`load` returns it.

    Text may be ``str`` (encoded as UTF-8) or any bytes (``bytes``, ``bytearray``, ``memoryview``).
    """

    def __init__(self, module: CausalLM, config: CheckpointConfig) -> None:
        self.module = module
        self.config = config

    def __repr__(self) -> str:
        trained = self.module.trained
        tensors = list(trained.state_dict().values())
        count = sum(p.numel() for p in trained.parameters()) or sum(t.numel() for t in tensors)
        parts = [f"{kind_of(type(self.config.model))} of {self.module.units.name}"]
        parts.append(f"{count:,} parameters")
        rule, scorer = self.config.patching, self.config.scorer
        if rule is not None:
            options = rule.model_dump(exclude={"kind", "patch_size"}, exclude_none=True)
            shown = "".join(f", {name} {value}" for name, value in options.items())
            parts.append(f"{rule.kind} patching{shown}")
        if scorer is not None:
            parts.append(f"{kind_of(type(scorer.model))} scorer")
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
        return f"LanguageModel({'; '.join([*parts, str(self.device), *sorted(dtypes)])})"

    @property
    def context_bytes(self) -> int:
        """Longest context the model was trained with, in bytes."""
        return self.config.context_bytes or DEFAULT_CONTEXT_BYTES

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.module.device

    def save(self, path: str | PathLike[str]) -> None:
        """Save as a checkpoint folder; ``~`` at the beginning of its path is the home folder.

        Raises:
            CheckpointError: the folder exists, or cannot be written.
        """
        save_model(at_home(path), self.module, self.config, self.config.training)

    def entropies(self, text: Text) -> NDArray[np.float32]:
        """Return the entropy of the prediction of each byte, and of the byte after the text.

        Returns:
            ``float32[len(text) + 1]``, in nats; ``entropies[i]`` is that of byte ``i``.

        Raises:
            ConfigError: the model has no scorer and cannot serve as one.
        """
        return text_entropies(self.module, codec.to_bytes(text))

    def patch(
        self,
        text: Text,
        rule: str | AnyRule | None = None,
        *,
        scorer: "Scorer | LanguageModel | str | PathLike[str] | None" = None,
        report: Callable[[int], None] = ignore,
        **options: Any,
    ) -> PatchedText:
        """Segment a text into patches.

        ::

            lm.patch(text)  # by the model's own rule
            lm.patch(text, threshold=1.3)  # by the same with another threshold
            lm.patch(text, "static", length=6)
            lm.patch(text, MyRule(), scorer=my_scorer)

        Args:
            text: any bytes.
            rule: rule to use instead of the model's own: the name of a kind, a configuration, or an
                object that decides (:class:`bytelm.patching.Rule`, ``StatefulRule`` or a
                ``Patcher``), registered or not.
            scorer: scorer to use instead of the model's own, or of the model itself if it can
                score: an object (:class:`bytelm.patching.Scorer`), a loaded model, or a checkpoint.
            report: called with the number of bytes scored so far.
            options: ``threshold`` and ``increase`` in nats, ``length`` and ``max_length`` in bytes,
                with a name or the model's own rule.

        Raises:
            ConfigError: there is no rule or no scorer; an option does not belong to the rule; or
                the rule is learned, or reads the encoder's states, and this model has none.
            PatchingError: the rule has no threshold.
        """
        if options or isinstance(rule, str):
            rule = self._named_rule(rule, options)
        if isinstance(scorer, str | PathLike):
            scorer = load(scorer, str(self.device))
        if isinstance(scorer, LanguageModel):
            scorer = scorer.module.get_scorer()
        return patch_text(self.module, self.config, codec.to_bytes(text), rule, scorer, report)

    def _named_rule(self, rule: str | AnyRule | None, options: dict[str, Any]) -> PatchingConfig:
        own = self.config.patching
        if rule is not None and not isinstance(rule, str):
            raise ConfigError(
                f"{', '.join(options)} belongs to a rule that is named: set it in the given rule"
            )
        if unknown := [name for name in options if name not in RULE_OPTIONS]:
            raise ConfigError(
                f"unknown option {unknown[0]!r}{nearest(unknown[0], RULE_OPTIONS)}: "
                f"{', '.join(RULE_OPTIONS)}"
            )
        return named_rule(rule or (own.kind if own else "entropy"), own, **options)

    def likelihood(
        self,
        texts: Iterable[Labelled],
        *,
        stride: int | None = None,
        report: Callable[[int], None] = ignore,
    ) -> dict[str, Likelihood]:
        """Return the likelihood of labelled texts, summed by label.

        Args:
            texts: (label, text) pairs, or (label, text, ranges) to measure only some bytes.
            stride: bytes between the beginnings of contexts; see
                :func:`bytelm.likelihood.evaluate`.
            report: called with the bytes measured so far.

        Raises:
            ConfigError: the model is an n-gram scorer, or the stride is out of range.
        """
        self._check_predicts()
        return evaluate(
            self.module, texts, context_bytes=self.context_bytes, stride=stride, report=report
        )

    def _check_predicts(self) -> None:
        if not self.module.can_predict:
            raise ConfigError(CANNOT_PREDICT)

    def bits_per_byte(self, text: Text | Iterable[Text], *, stride: int | None = None) -> float:
        """Return the bits per byte of one text, or of several together.

        Raises:
            ConfigError: as :meth:`likelihood`.
            DataError: there is not a single byte.
        """
        labelled = (("", data) for data in _each(text))
        found = self.likelihood(labelled, stride=stride).get("", Likelihood())
        if not found.num_bytes:
            raise DataError("an empty text has no bits per byte: give at least one byte")
        return found.bits_per_byte

    @overload
    def log_probs(
        self, text: Text, *, stride: int | None = None, eos: bool = False
    ) -> NDArray[np.float64]: ...
    @overload
    def log_probs(
        self, text: Iterable[Text], *, stride: int | None = None, eos: bool = False
    ) -> list[NDArray[np.float64]]: ...
    def log_probs(
        self,
        text: Text | Iterable[Text],
        *,
        stride: int | None = None,
        eos: bool = False,
    ) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Return ``ln p(byte | bytes before it)`` of every byte of one text, or of several.

        ``-log_probs(text).sum() / ln 2 / len(text)`` is :meth:`bits_per_byte`. Text longer than
        :attr:`context_bytes` is cut into contexts in the same way.

        Args:
            text: one text, or several, which are measured in batches.
            stride: bytes between the beginnings of contexts; ``None`` for no overlap.
            eos: append the value of the end of the document.

        Returns:
            ``float64[len(text) + eos]``, in nats; a list of them for several texts.

        Raises:
            ConfigError: as :meth:`likelihood`; or the model reads tokens, which have no probability
                of a byte: use :meth:`bits_per_byte` or :meth:`log_likelihood`.
        """
        self._check_predicts()
        found = log_probs(
            self.module, _as_list(text), context_bytes=self.context_bytes, stride=stride, eos=eos
        )
        return next(found) if isinstance(text, Text) else list(found)

    @overload
    def log_likelihood(
        self, context: Text, continuation: Text, *, stride: int | None = None
    ) -> float: ...
    @overload
    def log_likelihood(
        self,
        context: Text | Iterable[Text],
        continuation: Text | Iterable[Text],
        *,
        stride: int | None = None,
    ) -> float | list[float]: ...
    def log_likelihood(
        self,
        context: Text | Iterable[Text],
        continuation: Text | Iterable[Text],
        *,
        stride: int | None = None,
    ) -> float | list[float]:
        """Return ``ln p(continuation | context)``, in nats.

        The chain rule holds wherever a text is cut, within characters and patches too:
        ``log_likelihood(a, b + c) == log_likelihood(a, b) + log_likelihood(a + b, c)`` up to
        rounding. (Not for token models, which tokenise context and continuation separately.)

        Args:
            context: the document before the continuation; ``b""`` for its beginning. One for all
                continuations, or one for each.
            continuation: one text, or several, which are measured in batches.
            stride: bytes between the beginnings of contexts, in documents longer than
                :attr:`context_bytes`; ``None`` for half a context, so that every byte is predicted
                from at least the half before it.

        Returns:
            A number, or a list of them if there are several contexts or continuations.

        Raises:
            ConfigError: as :meth:`likelihood`; or the numbers of contexts and continuations differ.
        """
        self._check_predicts()
        contexts, continuations = _as_list(context), _as_list(continuation)
        is_one = isinstance(context, Text), isinstance(continuation, Text)
        if is_one[0]:
            contexts = contexts * len(continuations)
        elif is_one[1]:
            continuations = continuations * len(contexts)
        if len(contexts) != len(continuations):
            raise ConfigError(
                f"{len(contexts)} contexts were given for {len(continuations)} continuations: give "
                "one for each, or one for all"
            )
        found = log_likelihoods(
            self.module,
            zip(contexts, continuations, strict=True),
            context_bytes=self.context_bytes,
            stride=max(self.context_bytes // 2, 1) if stride is None else stride,
        )
        return found[0] if all(is_one) else found

    @overload
    def generate(
        self,
        prompt: Text = b"",
        *,
        max_bytes: int = 256,
        sampling: Sampling = GREEDY,
        stop: Text | Sequence[Text] = (),
    ) -> bytes: ...
    @overload
    def generate(
        self,
        prompt: Iterable[Text],
        *,
        max_bytes: int = 256,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Text | Sequence[Text] = (),
        num_slots: int = DEFAULT_SLOTS,
    ) -> list[bytes]: ...
    def generate(
        self,
        prompt: Text | Iterable[Text] = b"",
        *,
        max_bytes: int = 256,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Text | Sequence[Text] = (),
        num_slots: int = DEFAULT_SLOTS,
    ) -> bytes | list[bytes]:
        """Return the continuation of a prompt, or a list of those of several.

        The arguments are those of :meth:`stream` and, for several prompts, :meth:`stream_many`.

        Raises:
            ConfigError: an option is out of range.
        """
        is_one = isinstance(prompt, Text)
        prompts = _as_list(prompt)
        found = [b""] * len(prompts)
        parts = self.stream_many(
            prompts, max_bytes=max_bytes, sampling=sampling, stop=stop, num_slots=num_slots
        )
        for index, part in parts:
            found[index] += part.data
        return found[0] if is_one else found

    def stream(
        self,
        prompt: Text = b"",
        *,
        max_bytes: int = 256,
        sampling: Sampling = GREEDY,
        stop: Text | Sequence[Text] = (),
        speculate: bool = False,
    ) -> Iterator[Generated]:
        """Continue a prompt, yielding bytes as soon as they are certain.

        Args:
            prompt: any bytes; may be empty.
            max_bytes: maximum number of bytes to generate.
            sampling: how each byte is sampled.
            stop: one or several texts that end generation; they are not part of the result.
            speculate: let the decoder of a BLT draft bytes, as many as are measured to pay
                (:mod:`bytelm.inference.speculation`); the bytes stay the same.

        Raises:
            ConfigError: an option is out of range.
        """
        self._check_predicts()
        return stream(
            self.module,
            codec.to_bytes(prompt),
            max_bytes=max_bytes,
            sampling=sampling,
            stop=_as_list(stop),
            speculate=speculate,
        )

    def stream_many(
        self,
        prompts: Iterable[Text],
        *,
        max_bytes: int = 256,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: Text | Sequence[Text] = (),
        num_slots: int = DEFAULT_SLOTS,
    ) -> Iterator[tuple[int, Generated]]:
        """Continue several prompts in batches, yielding (index of the prompt, part).

        Every prompt ends by itself, at the end of its document, a stop string or ``max_bytes``, and
        has its own random generator: its bytes are those of :meth:`stream`, as long as rounding,
        which depends on the size of a batch, does not change a choice.

        Args:
            prompts: any bytes, of any lengths.
            max_bytes: maximum number of bytes to generate for each prompt.
            sampling: how each byte is sampled; one for all prompts, or one for each, for instance
                with other seeds to sample one prompt several times.
            stop: as in :meth:`stream`.
            num_slots: largest number of prompts decoded at once; memory grows with it.

        Raises:
            ConfigError: an option is out of range, or the number of samplings is not that of the
                prompts.
        """
        self._check_predicts()
        return stream_many(
            self.module,
            _as_list(prompts),
            max_bytes=max_bytes,
            sampling=sampling,
            stop=_as_list(stop),
            num_slots=num_slots,
        )

    def stream_text(
        self,
        prompt: Text = b"",
        *,
        max_bytes: int = 256,
        sampling: Sampling = GREEDY,
        stop: Text | Sequence[Text] = (),
        speculate: bool = False,
    ) -> Iterator[str]:
        """Continue a prompt as :meth:`stream` does, yielding text.

        No character is split, and invalid bytes become U+FFFD.

        Raises:
            ConfigError: an option is out of range.
        """
        decoder = codec.Utf8Stream()
        options = {"max_bytes": max_bytes, "sampling": sampling, "stop": stop}
        for part in self.stream(prompt, **options, speculate=speculate):
            text = decoder.feed(part.data)
            if text:
                yield text
        rest = decoder.close()
        if rest:
            yield rest


def _as_list(text: Text | Iterable[Text]) -> list[bytes]:
    """Return the bytes of one text, or of several, as a list."""
    return list(_each(text))


def _each(text: Text | Iterable[Text]) -> Iterator[bytes]:
    if isinstance(text, Text):
        yield codec.to_bytes(text)  # pyright: ignore[reportArgumentType] (not a memoryview of texts)
    else:
        yield from map(codec.to_bytes, text)


def load(
    path: str | PathLike[str], device: str = "auto", precision: Precision = "auto"
) -> LanguageModel:
    """Load a checkpoint, or the newest one of a training run.

    Args:
        path: folder of a checkpoint or a run; ``~`` at the beginning is the home folder.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA if it is available.
        precision: precision of the weights: ``float32``, ``bfloat16``, ``stored``, or ``auto`` for
            fp32 on the CPU and as stored elsewhere. The scorer of a BLT is fp32 unless ``stored``
            is chosen.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or the device cannot hold it.
        ConfigError: the precision is unknown.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        module, config = load_model(Path(path), torch.device(device), precision)
    except RuntimeError as error:
        raise CheckpointError(
            f"cannot load {path} on {device}: {error}; choose another device"
        ) from error
    return LanguageModel(module, config)
