"""Score documents and write them as shards, Arrow files."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from bytelm import codec
from bytelm.checkpoint import fingerprint, load_scorer
from bytelm.data.dataset import (
    ENTROPIES,
    SCHEMA,
    SCORED_BY,
    TRAINED,
    ScorerRecord,
    ShardRecord,
    SourceStatistics,
    SourceTotal,
    Split,
    scored_by,
)
from bytelm.data.journal import BlockRecord
from bytelm.data.records import Document
from bytelm.data.statistics import add_up, shard_statistics
from bytelm.patching import Scorer
from bytelm.scoring import check_entropies, group_by_size, score_documents
from bytelm.scoring.documents import CHUNK
from bytelm.storage import atomic_file, file_hash

SCORED_TOGETHER = 65_536
"""Positions of short documents that are scored at once."""


@dataclass(frozen=True)
class Shard:
    """Documents of one file."""

    name: str
    split: Split
    documents: list[Document]


def shards_of(
    number: int, documents: Sequence[Document], splits: Sequence[Split | None]
) -> list[Shard]:
    """Return the shards of a block, at most one of each split.

    Args:
        number: number of the block.
        documents: its documents.
        splits: split of each; ``None`` for a copy, which is left out.
    """
    names: tuple[Split, ...] = ("train", "validation")
    shards = []
    for split in names:
        chosen = [one for one, its in zip(documents, splits, strict=True) if its == split]
        if chosen:
            shards.append(Shard(f"{split}-{number:05d}.arrow", split, chosen))
    return shards


class Writer:
    """Writer of shards, which scores their documents.

    Args:
        out: folder of the shards.
        scorer: checkpoint of the scorer, if entropies are wanted.
        reset_at_newline: whether a newline begins a new context for the scorer.
        device: device that scores.

    Raises:
        CheckpointError: the scorer cannot be loaded.
    """

    def __init__(
        self, out: Path, scorer: Path | None, reset_at_newline: bool, device: str = "cpu"
    ) -> None:
        self._out, self._device = out, device
        self._scorer: Scorer | None = None
        self._metadata: dict[bytes, bytes] = {}
        if scorer is not None:
            self._scorer, _ = load_scorer(scorer, reset_at_newline=reset_at_newline, device=device)
            record = ScorerRecord(
                fingerprint=fingerprint(scorer), reset_at_newline=reset_at_newline
            )
            self._metadata = {SCORED_BY: scored_by(record)}

    def write_block(
        self,
        number: int,
        documents: Sequence[Document],
        splits: Sequence[Split | None],
        entropies: Iterator[NDArray[np.float32]] | None = None,
    ) -> BlockRecord:
        """Write the shards of a block; see :func:`shards_of`.

        Args:
            number: number of the block.
            documents: its documents.
            splits: split of each; ``None`` for a copy, which is left out.
            entropies: those of :meth:`groups`, in order; ``None`` to compute them.

        Raises:
            OSError: a file cannot be written.
            NumericalError: an entropy is not finite.
        """
        shards = shards_of(number, documents, splits)
        if entropies is None:
            entropies = (part for group in self.groups(shards) for part in self.score(group))
        records = [self.write(shard, entropies) for shard in shards]
        parts = [shard_statistics(self._out / record.file) for record in records]
        for document, split in zip(documents, splits, strict=True):
            if split is None:
                size = len(document.data)
                copy = SourceStatistics(duplicate_documents=1, duplicate_bytes=size)
                parts.append({document.source: copy})
        return BlockRecord(block=number, shards=records, statistics=add_up(parts))

    def groups(self, shards: Iterable[Shard]) -> list[list[Document]]:
        """Return the documents of shards in groups that are scored independently of each other.

        They do not depend on who scores them, since the company of a document may change the last
        bits of its entropies. There are none without a scorer.
        """
        if self._scorer is None:
            return []
        return [
            group
            for shard in shards
            for group in group_by_size(shard.documents, _num_entropies, SCORED_TOGETHER)
        ]

    def score(self, group: list[Document]) -> Iterator[NDArray[np.float32]]:
        """Yield the entropies of a group in order, one document or a part of one at a time.

        Raises:
            NumericalError: an entropy is not finite.
        """
        assert self._scorer is not None
        return _entropies(self._scorer, group, self._device)

    def write(self, shard: Shard, entropies: Iterator[NDArray[np.float32]]) -> ShardRecord:
        """Write one shard atomically, and return its record.

        Args:
            shard: the shard.
            entropies: those of its documents come next; nothing is taken without a scorer.

        Raises:
            OSError: the file cannot be written.
            NumericalError: an entropy is not finite.
        """
        columns = [
            _column([d.data for d in shard.documents], pa.large_binary(), np.int64),
            _column([d.source.encode() for d in shard.documents], pa.string(), np.int32),
        ]
        schema = SCHEMA
        if any(d.trained is not None for d in shard.documents):
            schema = schema.append(TRAINED)
            ranges = [[{"begin": a, "end": b} for a, b in d.ranges] for d in shard.documents]
            columns.append(pa.array(ranges, TRAINED.type))
        if self._scorer is not None:
            schema = schema.append(ENTROPIES).with_metadata(self._metadata)
            columns.append(_entropy_column(shard.documents, entropies))
        path = self._out / shard.name
        with (
            atomic_file(path) as temporary,
            temporary.open("wb") as file,
            pa.ipc.new_file(file, schema) as writer,
        ):
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return ShardRecord(
            file=shard.name,
            split=shard.split,
            documents=len(shard.documents),
            text_bytes=sum(len(d.data) for d in shard.documents),
            file_bytes=path.stat().st_size,
            sha256=file_hash(path),
            sources=_totals(shard.documents),
        )


def _column(values: list[bytes], kind: pa.DataType, offset: type[np.integer]) -> pa.Array:
    """Return a column of bytes or strings.

    ``pa.array`` of a list imports pandas where it is installed, which takes longer than the rest of
    a short preparation.
    """
    text = b"".join(values)
    assert len(text) <= np.iinfo(offset).max, "a shard is far smaller"
    offsets = np.zeros(len(values) + 1, offset)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.Array.from_buffers(kind, len(values), buffers)


def _totals(documents: list[Document]) -> dict[str, SourceTotal]:
    """Return the size of each source, by name, sorted."""
    by_source: dict[str, list[Document]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document)
    totals = {}
    for name, group in sorted(by_source.items()):
        trained = None
        if any(d.trained is not None for d in group):
            trained = sum(end - begin for d in group for begin, end in d.ranges)
        text_bytes = sum(len(d.data) for d in group)
        totals[name] = SourceTotal(
            documents=len(group), text_bytes=text_bytes, trained_bytes=trained
        )
    return totals


def _num_entropies(document: Document) -> int:
    return len(document.data) + 1


def _entropy_column(
    documents: list[Document], entropies: Iterator[NDArray[np.float32]]
) -> pa.Array:
    """Return the entropies of all documents, using little memory apart from the result's."""
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([_num_entropies(document) for document in documents], out=offsets[1:])
    values = np.empty(offsets[-1], np.float32)
    at = 0
    while at < len(values):
        part = next(entropies)
        values[at : at + len(part)] = part
        at += len(part)
    # As in _column, without pandas.
    flat = pa.Array.from_buffers(pa.float32(), len(values), [None, pa.py_buffer(values)])
    buffers = [None, pa.py_buffer(offsets)]
    return pa.Array.from_buffers(ENTROPIES.type, len(documents), buffers, children=[flat])


def _entropies(
    scorer: Scorer, documents: list[Document], device: str
) -> Iterator[NDArray[np.float32]]:
    """Yield the entropies of documents in order, of a single document in parts to save memory."""

    def name(index: int) -> str:
        one = documents[index]
        return f"the document of source {one.source!r} that begins with {one.data[:32]!r}"

    if len(documents) > 1:
        ids = [torch.from_numpy(codec.encode(one.data)).to(device) for one in documents]
        yield from (one.float().cpu().numpy() for one in score_documents(scorer, ids, name=name))
        return
    state, data = scorer.new_state(), documents[0].data
    for begin in range(0, max(len(data), 1), CHUNK):
        ids = codec.encode(data[begin : begin + CHUNK], bos=begin == 0)
        entropies = state.prefill(0, torch.from_numpy(ids).to(device)).float()
        # The first id is BOS, whose entropy is that of byte 0.
        check_entropies(entropies, name(0), begin + (begin > 0))
        yield entropies.cpu().numpy()
