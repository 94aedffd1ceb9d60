"""Bits per byte of text, comparable between models of bytes, patches and tokens.

Text longer than the context is cut into spans of ``context_bytes`` that begin every ``stride``
bytes. Each byte is measured once, in the earliest span that holds it, so with a stride below the
context every byte except the first few has at least ``context_bytes - stride`` bytes before it.
Of a document of which only some bytes are trained on, these are measured.
Entropies, and thus patches, are those of the whole document.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, repeat
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.lm import CausalLM
from bytelm.progress import ignore
from bytelm.scoring import group_by_size, score_documents
from bytelm.training.objective import LabelledSpan, Likelihood, measure_spans, span_nats, total
from bytelm.units import Ranges, Span, TokenUnits, trained_targets

__all__ = [
    "Labelled",
    "Likelihood",
    "evaluate",
    "log_likelihoods",
    "log_probs",
    "target_log_probs",
    "total",
]

Labelled = tuple[str, bytes] | tuple[str, bytes, Ranges | None]
"""A label, the bytes of a document, and the ranges of them to measure; ``None`` for all."""
SCORED_TOGETHER = 65_536
"""Bytes of short documents that are scored at once."""


def evaluate(
    lm: CausalLM,
    documents: Iterable[Labelled],
    *,
    context_bytes: int,
    stride: int | None = None,
    report: Callable[[int], None] = ignore,
) -> dict[str, Likelihood]:
    """Return the likelihood of documents, summed by label.

    Args:
        lm: language model in evaluation mode.
        documents: (label, bytes) or (label, bytes, ranges to measure), read once.
        context_bytes: longest span; usually the context that the model was trained with.
        stride: bytes between the beginnings of spans; ``None`` for no overlap.
        report: called with the bytes measured so far.

    Returns:
        Totals by label, in order of appearance.

    Raises:
        ConfigError: the stride is not between 1 and ``context_bytes``.
        NumericalError: an entropy or a likelihood is not finite.
    """
    spans = _cut_documents(lm, documents, context_bytes, stride)
    return measure_spans(lm, spans, context_bytes=context_bytes, report=report)


def log_probs(
    lm: CausalLM,
    documents: Iterable[bytes],
    *,
    context_bytes: int,
    stride: int | None = None,
    eos: bool = False,
) -> Iterator[NDArray[np.float64]]:
    """Yield ``ln p(byte | bytes before it)`` of every byte of each document.

    With such an array ``x``, ``-x.sum() / ln 2 / len(x)`` is the document's bits per byte. A value
    depends on no later byte, so the values of a prefix are the prefix of the values.

    Args:
        lm: model of bytes or patches, in evaluation mode.
        documents: any bytes.
        context_bytes: as in :func:`evaluate`.
        stride: as in :func:`evaluate`.
        eos: append the value of the end of the document.

    Raises:
        ConfigError: the stride is out of range, or the model reads tokens, which have no
            probability of a byte.
    """
    if isinstance(lm.units, TokenUnits):
        raise ConfigError(
            "a token model has probabilities of tokens, not of bytes: use bits_per_byte or "
            "log_likelihood, which sum those of whole texts"
        )
    found = target_log_probs(lm, documents, context_bytes=context_bytes, stride=stride)
    for values, _ in found:
        yield values if eos else values[:-1]


def target_log_probs(
    lm: CausalLM,
    documents: Iterable[bytes],
    *,
    context_bytes: int,
    stride: int | None = None,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Yield ``ln p(target | what is before it)`` of every byte or token of each document.

    Args:
        lm: language model in evaluation mode.
        documents: any bytes.
        context_bytes: as in :func:`evaluate`.
        stride: as in :func:`evaluate`.

    Yields:
        The log-probabilities, in nats, and the number of bytes of each target: 1 for bytes, the
        bytes of each token, and 0 for the end of the document, which is the last.

    Raises:
        ConfigError: the stride is out of range.
    """
    labelled = ((str(index), data) for index, data in enumerate(documents))
    spans = _cut_documents(lm, labelled, context_bytes, stride)
    measured = span_nats(lm, spans, context_bytes=context_bytes)
    for _, group in groupby(measured, key=lambda part: part.one.label):
        parts = list(group)
        nats = np.concatenate([part.nats for part in parts])
        yield -nats, np.concatenate([part.target_bytes for part in parts])


def log_likelihoods(
    lm: CausalLM,
    pairs: Iterable[tuple[bytes, bytes]],
    *,
    context_bytes: int,
    stride: int | None = None,
) -> list[float]:
    """Return ``ln p(continuation | context)`` of each (context, continuation).

    Args:
        lm: language model in evaluation mode.
        pairs: any bytes; a character or a patch may begin in the context and end in the
            continuation. Tokens do not: a token model tokenises the two separately.
        context_bytes: as in :func:`evaluate`.
        stride: as in :func:`evaluate`.

    Raises:
        ConfigError: the stride is out of range.
    """
    pairs = list(pairs)
    spans = _continuation_spans(lm, pairs, context_bytes, stride)
    found = measure_spans(lm, spans, context_bytes=context_bytes)
    return [-found[str(index)].nats for index in range(len(pairs))]


class Continuation(NamedTuple):
    """Likelihood of a continuation."""

    log_likelihood: float
    """``ln p(continuation | context)``, in nats."""
    is_greedy: bool
    """Whether greedy sampling would generate it."""


def score_continuations(
    lm: CausalLM,
    pairs: Sequence[tuple[bytes, bytes]],
    *,
    context_bytes: int,
    stride: int | None = None,
) -> Iterator[Continuation]:
    """Yield the likelihood of each continuation, and whether it is the greedy one.

    The arguments are those of :func:`log_likelihoods`. A token model's continuation is greedy if
    its own tokens are.

    Raises:
        ConfigError: the stride is out of range.
    """
    spans = _continuation_spans(lm, pairs, context_bytes, stride)
    measured = span_nats(lm, spans, context_bytes=context_bytes, greedy=True)
    for _, parts in groupby(measured, key=lambda part: part.one.label):
        nats, is_greedy = 0.0, True
        for part in parts:
            nats += part.likelihood.nats
            assert part.is_greedy is not None
            is_greedy &= bool(part.is_greedy[part.target_bytes > 0].all())
        yield Continuation(-nats, is_greedy)


def _continuation_spans(
    lm: CausalLM,
    pairs: Sequence[tuple[bytes, bytes]],
    context_bytes: int,
    stride: int | None,
) -> Iterator[LabelledSpan]:
    labelled = ((str(index), context + rest) for index, (context, rest) in enumerate(pairs))
    known = [len(context) for context, _ in pairs]
    return _cut_documents(lm, labelled, context_bytes, stride, known)


def _cut_documents(
    lm: CausalLM,
    documents: Iterable[Labelled],
    context_bytes: int,
    stride: int | None,
    known: Sequence[int] = (),
) -> Iterator[LabelledSpan]:
    """Cut documents into spans; of the first ``known`` bytes of each, nothing is measured."""
    stride = context_bytes if stride is None else stride
    if not 1 <= stride <= context_bytes:
        raise ConfigError(f"the stride must be between 1 and {context_bytes}, not {stride}")
    return _spans(lm, documents, context_bytes, stride, iter(known) if known else repeat(0))


def _spans(
    lm: CausalLM,
    documents: Iterable[Labelled],
    context_bytes: int,
    stride: int,
    known: Iterator[int],
) -> Iterator[LabelledSpan]:
    for group in group_by_size(documents, lambda one: len(one[1]) + 1, SCORED_TOGETHER):
        sequences = [codec.encode(data, eos=True) for _, data, *_ in group]
        scores = _score(lm, group, [ids[:-1] for ids in sequences])
        for (label, _, *ranges), ids, entropies in zip(group, sequences, scores, strict=True):
            num_positions, seen = len(ids) - 1, next(known)
            trained = ranges[0] if ranges else None
            targets = None if trained is None else trained_targets(ids, 0, trained)
            for begin in range(0, num_positions, stride):
                end = min(begin + context_bytes, num_positions)
                if seen < end:
                    part = None if entropies is None else entropies[begin:end]
                    chosen = None if targets is None else targets[begin:end]
                    span = Span(0, begin, ids[begin : end + 1], part, chosen)
                    yield LabelledSpan(label, span, seen - begin)
                    seen = end
                if end == num_positions:
                    break


def _score(
    lm: CausalLM, texts: Sequence[Labelled], documents: Sequence[NDArray[np.int64]]
) -> Sequence[NDArray[np.float32] | None]:
    if not lm.units.needs_entropies:
        return [None] * len(documents)

    def name(index: int) -> str:
        label, data, *_ = texts[index]
        return f"the text {label!r} that begins with {data[:32]!r}"

    ids = [torch.from_numpy(document).to(lm.device) for document in documents]
    entropies = score_documents(lm.get_scorer(), ids, name=name)
    return [one.float().cpu().numpy() for one in entropies]
