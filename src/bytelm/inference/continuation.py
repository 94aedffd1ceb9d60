"""Continuations: what is sampled after a prompt, and which of its bytes are certain."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.inference.sampling import Sampler, Sampling, allowed_logits

Finish = Literal["length", "end", "stop"]


class Prediction(NamedTuple):
    """What a model says about the id after a document."""

    logits: Float[Tensor, " vocab"]
    entropy: float | None = None
    """The scorer's entropy of that id, in nats; ``None`` if the patching rule needs none."""
    begins_patch: bool | None = None
    """Whether that id begins a patch; ``None`` for models without patches."""


@dataclass(frozen=True)
class Choice:
    """A sampled id, and what it was sampled from."""

    data: bytes
    """Bytes of the id; empty for the end of the document."""
    log_prob: float
    """Its log-probability in nats, before temperature and filters."""
    top: tuple[tuple[bytes, float], ...]
    """Bytes and log-probabilities of the most probable ids, from the highest."""
    entropy: float | None
    """As :attr:`Prediction.entropy`."""
    begins_patch: bool | None
    """As :attr:`Prediction.begins_patch`."""


@dataclass(frozen=True)
class Generated:
    """Part of a generated text."""

    data: bytes
    finish: Finish | None
    """``None`` except in the last part, which has the reason why generation ended: ``length``
    (``max_bytes`` were generated), ``end`` (the model ended the document), or ``stop`` (a stop
    string appeared; it is not part of the output)."""
    choices: tuple[Choice, ...] = ()
    """What was sampled since the last part, if choices are wanted: also ids whose bytes are held
    back here, or belong to a stop string."""


def check_options(max_bytes: int, stop: Sequence[bytes]) -> None:
    """Check the options of a continuation.

    Raises:
        ConfigError: ``max_bytes`` is negative or a stop string is empty.
    """
    if max_bytes < 0:
        raise ConfigError(f"max_bytes must be at least 0, not {max_bytes}")
    if not all(stop):
        raise ConfigError("a stop string must not be empty")


class Continuation:
    """Continuation of one prompt.

    Args:
        max_bytes: maximum number of bytes to generate.
        sampling: how each id is sampled.
        stop: byte strings that end generation.
        decode: returns the bytes of an id.
        num_top: report choices, each with this many of the most probable ids; ``None`` for none.
    """

    def __init__(
        self,
        max_bytes: int,
        sampling: Sampling,
        stop: Sequence[bytes],
        decode: Callable[[int], bytes],
        num_top: int | None = None,
    ) -> None:
        self._sampler, self._stop, self._decode = Sampler(sampling), stop, decode
        self._num_top, self._choices = num_top, []
        self._held, self._left = b"", max_bytes
        self.chosen: list[int] = []
        """All ids sampled so far; the last one may not be fed yet."""
        self.has_ended = False

    @property
    def num_left(self) -> int:
        """Bytes that may still be generated."""
        return self._left

    def begin(self) -> Iterator[Generated]:
        """Yield the only part of a continuation of no bytes."""
        if self._left == 0:
            yield self._end(self._held, "length")

    def sample(self, logits: Float[Tensor, " vocab"], ahead: int = 0) -> int:
        """Return the id that is, or would be, sampled next, or ``ahead`` positions later."""
        return self._sampler.choose(logits, len(self.chosen) + ahead)

    def choose(self, prediction: Prediction) -> Iterator[Generated]:
        """Sample the next id, and yield the bytes that it makes certain, if any."""
        chosen = self.sample(prediction.logits)
        self.chosen.append(chosen)
        if self._num_top is not None:
            self._choices.append(self._describe(chosen, prediction, self._num_top))
        if chosen == codec.EOS:
            yield self._end(self._held, "end")
            return
        new = self._decode(chosen)[: self._left]
        # Special ids yield no bytes; count them anyway so that generation terminates.
        self._left -= max(len(new), 1)
        self._held += new
        certain = len(self._held)
        if self._stop:
            match = _first_match(self._held, self._stop)
            if match is not None:
                yield self._end(self._held[:match], "stop")
                return
            certain -= _longest_partial_match(self._held, self._stop)
        if certain:
            yield self._part(self._held[:certain], None)
            self._held = self._held[certain:]
        if self._left <= 0:
            yield self._end(self._held, "length")

    def _describe(self, chosen: int, prediction: Prediction, num_top: int) -> Choice:
        logits = allowed_logits(prediction.logits)
        shifted = logits - logits.max()
        log_probs = shifted - np.log(np.exp(shifted).sum())
        highest = np.argsort(-log_probs, kind="stable")[:num_top].tolist()
        return Choice(
            self._bytes_of(chosen),
            float(log_probs[chosen]),
            tuple((self._bytes_of(one), float(log_probs[one])) for one in highest),
            prediction.entropy,
            prediction.begins_patch,
        )

    def _bytes_of(self, chosen: int) -> bytes:
        return b"" if chosen == codec.EOS else self._decode(chosen)

    def _end(self, data: bytes, finish: Finish) -> Generated:
        self.has_ended = True
        return self._part(data, finish)

    def _part(self, data: bytes, finish: Finish | None) -> Generated:
        choices, self._choices = tuple(self._choices), []
        return Generated(data, finish, choices)


def _first_match(data: bytes, stop: Sequence[bytes]) -> int | None:
    """Return where the first stop string in ``data`` begins, or ``None``."""
    found = [at for at in (data.find(s) for s in stop) if at >= 0]
    return min(found, default=None)


def _longest_partial_match(data: bytes, stop: Sequence[bytes]) -> int:
    """Return the length of the longest suffix of ``data`` that is a prefix of a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for size in range(min(longest, len(data)), 0, -1):
        if any(s.startswith(data[-size:]) for s in stop):
            return size
    return 0
