"""Robustness to noise in text: bits per byte of clean text after noised text, and of noised text.

Documents are cut into pieces of a context and a continuation. The context is noised and the
continuation is not, so what is predicted is the same for every noise and its bits per byte compare,
for models of bytes and of tokens. The piece noised as a whole is measured as well.

Changes from clean text are paired: both are measured on the same pieces, and intervals are over
documents drawn with replacement.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.bootstrap import Estimate, Floats, interval, resample
from bytelm.evaluation.noise import Noise
from bytelm.language_model import LanguageModel
from bytelm.progress import ignore

__all__ = ["NoiseScore", "Piece", "Robustness", "cut_pieces", "measure_robustness"]

CONTEXT_BYTES, CONTINUATION_BYTES = 512, 128
LEAST_BYTES = 8
"""Fewest bytes of each: the ends of a context may move by three to where a character ends."""
SCORED_TOGETHER = 256
"""Pieces between two reports of progress."""


class Piece(NamedTuple):
    """Part of a document: what is given and what is predicted."""

    document: int
    context: bytes
    continuation: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return len(self.context) + len(self.continuation)


class NoiseScore(NamedTuple):
    """Scores under one noise, each with its interval."""

    noise: str
    length: float
    """Bytes of the noised pieces per byte of the clean ones."""
    bits_per_byte: Estimate
    """Bits per byte of the clean continuations after noised contexts."""
    change: Estimate
    """The same, minus that after clean contexts."""
    whole: Estimate
    """Bits per byte of pieces noised as a whole."""
    whole_per_clean_byte: Estimate
    """Bits of pieces noised as a whole, per byte of the clean pieces."""
    whole_change: Estimate
    """The same, minus that of clean pieces."""


class Robustness(NamedTuple):
    """Scores of one model on some text under several noises."""

    scores: tuple[NoiseScore, ...]
    """The first is that of clean text."""
    seed: int
    num_documents: int
    num_pieces: int
    num_bytes: int
    """Bytes of the continuations."""
    interval_over: str
    """Drawn with replacement for the intervals: documents; or pieces, if there is one document."""


def cut_pieces(
    documents: Iterable[bytes],
    context_bytes: int = CONTEXT_BYTES,
    continuation_bytes: int = CONTINUATION_BYTES,
) -> Iterator[Piece]:
    """Cut documents into pieces without overlap, between characters where the text is UTF-8.

    The last piece of a document may have a shorter context; a rest without context is left out.

    Args:
        documents: any bytes.
        context_bytes: bytes of a context.
        continuation_bytes: bytes of a continuation.

    Raises:
        ConfigError: a number of bytes is below :data:`LEAST_BYTES`.
    """
    if min(context_bytes, continuation_bytes) < LEAST_BYTES:
        raise ConfigError(
            f"a context of {context_bytes} and a continuation of {continuation_bytes} bytes: both "
            f"need at least {LEAST_BYTES}"
        )
    for number, data in enumerate(documents):
        begin = 0
        while True:
            end = _between_characters(data, begin + context_bytes + continuation_bytes)
            cut = _between_characters(data, end - continuation_bytes)
            if cut <= begin:
                break
            yield Piece(number, data[begin:cut], data[cut:end])
            begin = end


def _between_characters(data: bytes, at: int) -> int:
    """Return the place at or just before ``at`` where no character of UTF-8 is cut."""
    if at >= len(data):
        return len(data)
    for back in range(min(4, at + 1)):
        if data[at - back] & 0xC0 != 0x80:
            return at - back
    return at


def measure_robustness(
    lm: LanguageModel,
    documents: Iterable[bytes],
    noises: Sequence[Noise],
    *,
    seed: int = 0,
    context_bytes: int = CONTEXT_BYTES,
    continuation_bytes: int = CONTINUATION_BYTES,
    report: Callable[[int], None] = ignore,
) -> Robustness:
    """Measure how much noise makes text harder to predict.

    With pieces ``(c, x)`` and a noise ``f``, the bits per byte are
    ``-sum log2 p(x | f(c)) / sum len(x)``, and those of whole pieces
    ``-sum log2 p(f(c + x)) / sum len(f(c + x))``.

    Args:
        lm: any language model.
        documents: any bytes.
        noises: noises to measure besides clean text.
        seed: seed of the noises and of the intervals.
        context_bytes: bytes of context; see :func:`cut_pieces`.
        continuation_bytes: bytes to predict.
        report: called with the number of texts that are measured: ``2 * (1 + noises)`` for each
            piece.

    Raises:
        ConfigError: as :meth:`bytelm.LanguageModel.log_likelihood` and :func:`cut_pieces`.
        DataError: all documents are too short.
    """
    pieces = list(cut_pieces(documents, context_bytes, continuation_bytes))
    if not pieces:
        raise DataError(
            f"no document is longer than {continuation_bytes} bytes, so that a context precedes "
            "what is predicted: give longer text"
        )
    scorer = _Scorer(lm, report)
    measured = [_measure(scorer, pieces, noise, seed) for noise in (Noise(), *noises)]
    numbers = [piece.document for piece in pieces]
    several = numbers[0] != numbers[-1]
    items = np.unique(numbers if several else range(len(pieces)), return_inverse=True)[1]
    # By item: the sum over its pieces.
    summed = [
        _Measured(*(np.bincount(items, one).astype(float) for one in columns))
        for columns in measured
    ]
    weights = resample(int(items[-1]) + 1, generator=seed).astype(float)
    names = map(str, (Noise(), *noises))
    return Robustness(
        scores=tuple(
            _score(name, one, summed[0], weights) for name, one in zip(names, summed, strict=True)
        ),
        seed=seed,
        num_documents=len(set(numbers)),
        num_pieces=len(pieces),
        num_bytes=sum(len(piece.continuation) for piece in pieces),
        interval_over="documents" if several else "pieces",
    )


class _Measured(NamedTuple):
    """Bits and bytes under one noise, by piece or by item that is resampled."""

    bits: Floats
    num_bytes: Floats
    whole_bits: Floats
    whole_bytes: Floats


def _measure(scorer: "_Scorer", pieces: Sequence[Piece], noise: Noise, seed: int) -> _Measured:
    wholes = [noise(piece.context + piece.continuation, seed) for piece in pieces]
    return _Measured(
        bits=scorer([(noise(piece.context, seed), piece.continuation) for piece in pieces]),
        num_bytes=np.array([len(piece.continuation) for piece in pieces], float),
        whole_bits=scorer([(b"", whole) for whole in wholes]),
        whole_bytes=np.array([len(whole) for whole in wholes], float),
    )


class _Scorer:
    """Bits of continuations; those that were measured before are not measured again."""

    def __init__(self, lm: LanguageModel, report: Callable[[int], None]) -> None:
        self._lm, self._report, self._done = lm, report, 0
        self._known: dict[tuple[bytes, bytes], float] = {}

    def __call__(self, pairs: Sequence[tuple[bytes, bytes]]) -> Floats:
        for begin in range(0, len(pairs), SCORED_TOGETHER):
            part = pairs[begin : begin + SCORED_TOGETHER]
            new = [pair for pair in dict.fromkeys(part) if pair not in self._known]
            contexts, rests = [pair[0] for pair in new], [pair[1] for pair in new]
            found = self._lm.log_likelihood(contexts, rests)
            assert isinstance(found, list)
            self._known.update(zip(new, found, strict=True))
            self._done += len(part)
            self._report(self._done)
        return np.array([-self._known[pair] / math.log(2) for pair in pairs])


def _score(name: str, noised: _Measured, clean: _Measured, weights: Floats) -> NoiseScore:
    def estimate(ratio: Callable[[Floats], Floats]) -> Estimate:
        """Return a quantity of the sums over items, with its interval."""
        return Estimate(float(ratio(np.ones((1, weights.shape[1])))[0]), *interval(ratio(weights)))

    def per_byte(w: Floats) -> Floats:
        return (w @ noised.bits) / (w @ noised.num_bytes)

    def change(w: Floats) -> Floats:
        return per_byte(w) - (w @ clean.bits) / (w @ clean.num_bytes)

    def whole(w: Floats) -> Floats:
        return (w @ noised.whole_bits) / (w @ noised.whole_bytes)

    def per_clean_byte(w: Floats) -> Floats:
        return (w @ noised.whole_bits) / (w @ clean.whole_bytes)

    def whole_change(w: Floats) -> Floats:
        return per_clean_byte(w) - (w @ clean.whole_bits) / (w @ clean.whole_bytes)

    return NoiseScore(
        name,
        float(noised.whole_bytes.sum() / clean.whole_bytes.sum()),
        *map(estimate, (per_byte, change, whole, per_clean_byte, whole_change)),
    )
