"""Held-out spans of prepared data for validation."""

from collections.abc import Iterator

import numpy as np

from bytelm import codec
from bytelm.data import Dataset, SpanOrder
from bytelm.errors import DataError
from bytelm.training.objective import LabelledSpan
from bytelm.units import Span

SLACK = 64
"""Bytes that are searched for the end of a word."""
WHITE_SPACE = codec.encode(" \n\t\r", bos=False)


def held_out_spans(
    dataset: Dataset, *, max_bytes: int, context_bytes: int, seed: int = 0, skip_bytes: int = 0
) -> Iterator[LabelledSpan]:
    """Yield reproducible random spans of prepared documents, labelled by source.

    They are up to ``context_bytes`` long and cover a document without overlap. They begin and end
    at the end of a word if there is one within :data:`SLACK` bytes, so that no token is cut in two.

    Args:
        dataset: held-out documents.
        max_bytes: approximate number of bytes.
        context_bytes: longest span.
        seed: seed of the sample.
        skip_bytes: approximate number of bytes of the sample to skip first, to get text that has
            not been used before.

    Raises:
        DataError: the split holds no documents.
    """
    if not len(dataset):
        raise DataError(
            f"{dataset.folder} holds no held-out documents: prepare it with a "
            "larger --validation-share"
        )
    slack = min(SLACK, context_bytes // 8)
    size = context_bytes - slack
    order = SpanOrder(dataset.lengths, np.arange(len(dataset)), size)
    taken = -skip_bytes
    for index in range(len(order)):
        document, number = order.at(index, [seed])
        begin, end = (_word_end(dataset, document, (number + n) * size, slack) for n in (0, 1))
        if taken < 0 or begin == end:
            taken += end - begin
            continue
        entropies = dataset.entropies(document, begin, end) if dataset.has_entropies else None
        ids = dataset.ids(document, begin, end + 1)
        label = dataset.source_names[dataset.source_ids[document]]
        targets = dataset.targets(document, begin, ids)
        yield LabelledSpan(label, Span(document, begin, ids, entropies, targets))
        taken += end - begin
        if taken >= max_bytes:
            return


def _word_end(dataset: Dataset, document: int, at: int, slack: int) -> int:
    """Return the last position up to ``at`` that ends a word, or ``at`` if none is near."""
    last = int(dataset.lengths[document]) + 1
    if at == 0 or at >= last:
        return min(at, last)
    begin = max(at - slack, 1)
    is_white = np.isin(dataset.ids(document, begin, at + 2), WHITE_SPACE)
    ends = np.flatnonzero(~is_white[:-1] & is_white[1:])
    return begin + int(ends[-1]) if len(ends) else at
