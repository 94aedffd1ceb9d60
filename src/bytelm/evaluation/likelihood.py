"""Bits per byte of text, comparable between models of bytes, patches and tokens.

Text longer than the context is cut into spans of ``context_bytes`` that begin every ``stride``
bytes. Each byte is measured once, in the earliest span that holds it, so with a stride below the
context every byte except the first few has at least ``context_bytes - stride`` bytes before it.
Of a document of which only some bytes are trained on, these are measured.
Entropies, and thus patches, are those of the whole document.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.lm import CausalLM
from bytelm.scoring import group_by_size, score_documents
from bytelm.training.objective import LabelledSpan, Likelihood, measure_spans
from bytelm.units import Ranges, Span, trained_targets

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
) -> dict[str, Likelihood]:
    """Return the likelihood of documents, summed by label.

    Args:
        lm: language model in evaluation mode.
        documents: (label, bytes) or (label, bytes, ranges to measure), read once.
        context_bytes: longest span; usually the context that the model was trained with.
        stride: bytes between the beginnings of spans; ``None`` for no overlap.

    Returns:
        Totals by label, in order of appearance.

    Raises:
        ConfigError: the stride is not between 1 and ``context_bytes``.
        NumericalError: an entropy or a likelihood is not finite.
    """
    stride = context_bytes if stride is None else stride
    if not 1 <= stride <= context_bytes:
        raise ConfigError(f"the stride must be between 1 and {context_bytes}, not {stride}")
    spans = _cut_documents(lm, documents, context_bytes, stride)
    return measure_spans(lm, spans, context_bytes=context_bytes)


def _cut_documents(
    lm: CausalLM, documents: Iterable[Labelled], context_bytes: int, stride: int
) -> Iterator[LabelledSpan]:
    for group in group_by_size(documents, lambda one: len(one[1]) + 1, SCORED_TOGETHER):
        sequences = [codec.encode(data, eos=True) for _, data, *_ in group]
        scores = _score(lm, group, [ids[:-1] for ids in sequences])
        for (label, _, *ranges), ids, entropies in zip(group, sequences, scores, strict=True):
            num_positions, seen = len(ids) - 1, 0
            trained = ranges[0] if ranges else None
            targets = None if trained is None else trained_targets(ids, 0, trained)
            for begin in range(0, num_positions, stride):
                end = min(begin + context_bytes, num_positions)
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
