"""Bits per byte: how well a model predicts text, in the one unit that needs no tokenizer.

::

    bpb = sum over bytes of -log2 p(byte | what comes before it)  /  number of bytes

The bytes are those of the text, whatever a model reads: a token's nats are those of all its bytes.
Predicting the end of a document is not counted. Text longer than the context is cut into pieces of
``context_bytes`` that begin every ``stride`` bytes; each byte is scored once, in the earliest piece
that holds it, so with a stride below the context every byte but the first few has at least
``context_bytes - stride`` bytes before it. Entropies, and so patches, come from the scorer reading
the document whole.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bytelm import codec
from bytelm.data.dataset import Dataset
from bytelm.data.loader import Pieces
from bytelm.data.packing import IGNORED, Batch, Row, Stretch, Units, make_batch
from bytelm.errors import ConfigError, DataError
from bytelm.model.build import LanguageModule
from bytelm.model.patched import PatchedModel
from bytelm.model.scorers import score_documents
from bytelm.model.tokenized import TokenModel
from bytelm.patching import build_patches

SLACK = 64
"""Bytes in which the end of a word is looked for."""
WHITE_SPACE = codec.encode(" \n\t\r", bos=False)
ROWS = 8
"""Rows evaluated at once."""
SCORED_TOGETHER = 65_536
"""Bytes of short documents that go through the scorer at once."""


@dataclass
class Likelihood:
    """Totals over some text."""

    nats: float = 0.0
    """Negative log-likelihood of the bytes."""
    num_bytes: int = 0
    num_patches: int = 0
    """Patches, or tokens, overlaps of pieces not counted twice; 0 with neither."""
    num_positions: int = 0
    """Positions that make up the patches: bytes, and a BOS for each document."""

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte; not a number for no text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @property
    def patch_size(self) -> float:
        """Mean bytes per patch, or token; not a number with neither."""
        return self.num_positions / self.num_patches if self.num_patches else math.nan


class Piece(NamedTuple):
    """A stretch to evaluate, of which the first ``num_seen`` positions were scored before."""

    label: str
    stretch: Stretch
    num_seen: int = 0


def batch_logits(model: LanguageModule, batch: Batch) -> Float[Tensor, "batch bytes vocab"]:
    """Logits of a packed batch, with the patches it carries."""
    if isinstance(model, PatchedModel):
        assert batch.next_boundary is not None
        patches = build_patches(batch.next_boundary, batch.documents, batch.num_patches)
        return model.blt(batch.ids, patches)
    return model(batch.ids, batch.documents)


def position_nats(
    logits: Float[Tensor, "batch bytes vocab"], batch: Batch
) -> Float[Tensor, "batch bytes"]:
    """Negative log-likelihood of each target, in nats; 0 on padding."""
    flat = functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.unflatten(0, batch.targets.shape)


def evaluate(
    model: LanguageModule,
    documents: Iterable[tuple[str, bytes]],
    *,
    context_bytes: int,
    stride: int | None = None,
) -> dict[str, Likelihood]:
    """Likelihood of documents, totalled by label.

    Args:
        model: in evaluation mode.
        documents: (label, bytes) pairs, read once.
        context_bytes: longest piece, as the model was trained with.
        stride: bytes between the beginnings of pieces; ``None`` for no overlap.

    Returns:
        Totals by label, in order of appearance.

    Raises:
        ConfigError: the stride is not between 1 and ``context_bytes``.
    """
    stride = context_bytes if stride is None else stride
    if not 1 <= stride <= context_bytes:
        raise ConfigError(f"the stride must be between 1 and {context_bytes}, not {stride}")
    pieces = _cut_documents(model, documents, context_bytes, stride)
    return evaluate_pieces(model, pieces, context_bytes=context_bytes)


def dataset_pieces(
    dataset: Dataset, *, max_bytes: int, context_bytes: int, seed: int = 0, skip_bytes: int = 0
) -> Iterator[Piece]:
    """Random pieces of prepared documents, labelled by source, the same ones every time.

    They are up to ``context_bytes`` long, begin and end where a word does if there is one within
    :data:`SLACK` of that (so that no token is cut in two), and cover a document without overlap.

    Args:
        dataset: with held-out documents.
        max_bytes: about how much.
        context_bytes: longest piece.
        seed: of the choice.
        skip_bytes: about how much of the choice to leave out first, for text that has not served
            before.

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
    pieces = Pieces(dataset.lengths, np.arange(len(dataset)), size)
    taken = -skip_bytes
    for index in range(len(pieces)):
        document, number = pieces.at(index, [seed])
        begin, end = (_word_end(dataset, document, (number + n) * size, slack) for n in (0, 1))
        if taken < 0 or begin == end:
            taken += end - begin
            continue
        entropies = dataset.entropies(document, begin, end) if dataset.has_entropies else None
        ids = dataset.ids(document, begin, end + 1)
        label = dataset.source_names[dataset.source_ids[document]]
        yield Piece(label, Stretch(document, begin, ids, entropies))
        taken += end - begin
        if taken >= max_bytes:
            return


def _word_end(dataset: Dataset, document: int, at: int, slack: int) -> int:
    """The last position up to ``at`` whose byte is a word's last, or ``at`` if none is near."""
    last = int(dataset.lengths[document]) + 1
    if at == 0 or at >= last:
        return min(at, last)
    begin = max(at - slack, 1)
    is_white = np.isin(dataset.ids(document, begin, at + 2), WHITE_SPACE)
    ends = np.flatnonzero(~is_white[:-1] & is_white[1:])
    return begin + int(ends[-1]) if len(ends) else at


@torch.no_grad()
def evaluate_pieces(
    model: LanguageModule, pieces: Iterable[Piece], *, context_bytes: int
) -> dict[str, Likelihood]:
    """Likelihood of pieces, none longer than the context, totalled by label."""
    device = next(model.parameters()).device
    totals: dict[str, Likelihood] = {}
    for rows in _pack(pieces, model, context_bytes):
        on_host = make_batch([row for row, _ in rows])
        batch = on_host.to(device)
        nats = position_nats(batch_logits(model, batch), batch).double().cpu()
        for (row, contents), row_nats in zip(rows, nats.numpy(), strict=True):
            begin = 0
            for units, piece in zip(row.units, contents, strict=True):
                end = begin + len(units.targets)
                # Exact for tokens too: none stands for positions on both sides of the seam.
                seen = int(np.searchsorted(units.num_positions.cumsum(), piece.num_seen, "right"))
                num_bytes = units.target_bytes[seen:]
                total = totals.setdefault(piece.label, Likelihood())
                total.nats += float(row_nats[begin + seen : end][num_bytes > 0].sum())
                total.num_bytes += int(num_bytes.sum())
                total.num_patches += _num_patches(row, units, seen)
                total.num_positions += piece.stretch.num_positions - piece.num_seen
                begin = end
    return totals


def _num_patches(row: Row, units: Units, seen: int) -> int:
    """Patches, or tokens, among the units not seen before; a patch counts where it begins."""
    if row.tokenizer is not None:
        return len(units.targets) - seen
    if units.next_boundary is None:
        return 0
    return int(units.next_boundary[max(seen - 1, 0) : -1].sum()) + (seen == 0)


def total(likelihoods: Iterable[Likelihood]) -> Likelihood:
    """Sum of likelihoods."""
    result = Likelihood()
    for one in likelihoods:
        result.nats += one.nats
        result.num_bytes += one.num_bytes
        result.num_patches += one.num_patches
        result.num_positions += one.num_positions
    return result


def _cut_documents(
    model: LanguageModule,
    documents: Iterable[tuple[str, bytes]],
    context_bytes: int,
    stride: int,
) -> Iterator[Piece]:
    for group in _groups(documents):
        sequences = [codec.encode(data, eos=True) for _, data in group]
        scores = _score(model, [ids[:-1] for ids in sequences])
        for (label, _), ids, entropies in zip(group, sequences, scores, strict=True):
            num_positions, seen = len(ids) - 1, 0
            for begin in range(0, num_positions, stride):
                end = min(begin + context_bytes, num_positions)
                part = None if entropies is None else entropies[begin:end]
                yield Piece(label, Stretch(0, begin, ids[begin : end + 1], part), seen - begin)
                seen = end
                if end == num_positions:
                    break


def _groups(documents: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Documents in groups worth scoring together."""
    group: list[tuple[str, bytes]] = []
    num_positions = 0
    for document in documents:
        group.append(document)
        num_positions += len(document[1]) + 1
        if num_positions >= SCORED_TOGETHER:
            yield group
            group, num_positions = [], 0
    if group:
        yield group


def _score(
    model: LanguageModule, documents: Sequence[NDArray[np.int64]]
) -> list[NDArray[np.float32] | None]:
    if not (isinstance(model, PatchedModel) and model.patcher.needs_entropies):
        return [None] * len(documents)
    assert model.scorer is not None
    device = next(model.parameters()).device
    ids = [torch.from_numpy(document).to(device) for document in documents]
    return [entropies.cpu().numpy() for entropies in score_documents(model.scorer, ids)]


def _pack(
    pieces: Iterable[Piece], model: LanguageModule, context_bytes: int
) -> Iterator[list[tuple[Row, list[Piece]]]]:
    """Whole pieces in rows, rows in groups no longer than they need; a piece is never cut."""
    patcher = model.patcher if isinstance(model, PatchedModel) else None
    tokenizer = model.tokenizer if isinstance(model, TokenModel) else None
    rows: list[tuple[Row, list[Piece]]] = []
    for piece in pieces:
        if not rows or rows[-1][0].num_bytes + piece.stretch.num_positions > context_bytes:
            if len(rows) == ROWS:
                yield _trimmed(rows)
                rows = []
            rows.append((Row(context_bytes, None, patcher, tokenizer), []))
        rows[-1][0].add(piece.stretch, piece.num_seen)
        rows[-1][1].append(piece)
    if rows:
        yield _trimmed(rows)


def _trimmed(rows: list[tuple[Row, list[Piece]]]) -> list[tuple[Row, list[Piece]]]:
    longest = max(row.num_bytes for row, _ in rows)
    for row, _ in rows:
        row.max_bytes = longest
    return rows
