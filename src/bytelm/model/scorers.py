"""Scorers: anything that yields the entropy of the next byte, in nats, at every byte.

A scorer scores packed rows (:meth:`Scorer.entropies`) or one document as it arrives
(:meth:`Scorer.stream`), with the same result: scoring a document of any length takes linear time,
and memory that does not grow with it.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm import codec
from bytelm.model.stream import TransformerStream
from bytelm.model.transformer import Transformer

STREAM_CHUNK = 8192
"""Bytes scored at once where a document is streamed through a scorer."""


@runtime_checkable
class ScorerStream(Protocol):
    """A scorer at work on one document."""

    def feed(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, " bytes"]:
        """Entropies at the document's next bytes."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Anything that yields next-byte entropies."""

    def entropies(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes"]:
        """Entropy, in nats, of the prediction of the id after each, for packed rows."""
        ...

    def stream(self) -> ScorerStream:
        """Score one document as it arrives."""
        ...


def entropy(logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """Entropy ``-sum p ln p`` of the distribution ``softmax(logits)``, in nats, in fp32."""
    log_probabilities = logits.float().log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def score_document(
    scorer: Scorer, ids: Int[Tensor, " bytes"], chunk: int = STREAM_CHUNK
) -> Iterator[Float[Tensor, " bytes"]]:
    """Entropies of one document of any length, ``chunk`` bytes at a time."""
    stream = scorer.stream()
    for piece in ids.split(chunk):
        yield stream.feed(piece)


@torch.inference_mode()
def score_documents(
    scorer: Scorer, documents: Sequence[Int[Tensor, " _"]], row_bytes: int = STREAM_CHUNK
) -> list[Float[Tensor, " _"]]:
    """Entropies of many documents: short ones share packed rows, long ones are streamed."""
    results: dict[int, Tensor] = {}
    row: list[int] = []
    row_length = 0

    def score_row() -> None:
        lengths = torch.tensor([len(documents[i]) for i in row])
        ids = torch.cat([documents[i] for i in row])
        numbers = torch.arange(len(row)).repeat_interleave(lengths).to(ids.device)
        entropies = scorer.entropies(ids[None], numbers[None])[0]
        results.update(zip(row, entropies.split(lengths.tolist()), strict=True))
        row.clear()

    for index, ids in enumerate(documents):
        if len(ids) > row_bytes:
            results[index] = torch.cat(list(score_document(scorer, ids)))
            continue
        if row and row_length + len(ids) > row_bytes:
            score_row()
            row_length = 0
        row.append(index)
        row_length += len(ids)
    if row:
        score_row()
    return [results[i] for i in range(len(documents))]


class TransformerScorer(nn.Module):
    """Entropies of a plain transformer's predictions (paper section 4.2).

    With ``reset_at_newline`` a newline byte begins a new context, as the paper does for large runs
    (section 4.4): the model sees it in place of BOS, so repeated lines do not lose their entropy.
    """

    def __init__(self, transformer: Transformer, *, reset_at_newline: bool = False) -> None:
        super().__init__()
        self.transformer = transformer
        self.reset_at_newline = reset_at_newline

    def entropies(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes"]:
        """Entropies of packed rows."""
        if self.reset_at_newline:
            documents = split_at_newlines(ids, documents)
        return entropy(self.transformer(ids, documents))

    def stream(self) -> "TransformerScorerStream":
        """Score one document as it arrives."""
        return TransformerScorerStream(self)


class TransformerScorerStream:
    """A :class:`TransformerScorer` at work on one document: ring buffers of its window."""

    def __init__(self, scorer: TransformerScorer) -> None:
        self._scorer = scorer
        self._stream = TransformerStream(scorer.transformer)

    @torch.inference_mode()
    def feed(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, " bytes"]:
        """Entropies at the document's next bytes."""
        if not self._scorer.reset_at_newline:
            return self._continue(ids)
        newlines = (ids == codec.NEWLINE).nonzero().flatten().tolist()
        if not newlines:
            return self._continue(ids)
        # Whole lines need no cache; only the line in progress and the last one touch it.
        first, last = newlines[0], newlines[-1]
        pieces = [self._continue(ids[:first])] if first else []
        if first < last:
            pieces.append(self._scorer.entropies(ids[None, first:last])[0])
        self._stream.clear()
        pieces.append(self._continue(ids[last:]))
        return torch.cat(pieces)

    def _continue(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, " bytes"]:
        return entropy(self._stream.feed(ids))


def split_at_newlines(
    ids: Int[Tensor, "batch bytes"], documents: Int[Tensor, "batch bytes"] | None
) -> Int[Tensor, "batch bytes"]:
    """Document numbers in which every newline begins a new document as well."""
    starts = ids == codec.NEWLINE
    starts[:, :1] = True
    if documents is not None:
        starts[:, 1:] |= documents[:, 1:] != documents[:, :-1]
    return starts.cumsum(1)
