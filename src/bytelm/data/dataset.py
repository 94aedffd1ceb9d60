"""Prepared data: a folder of Arrow files that any tool can read.

::

    manifest.json            settings, sources, shards with their sizes and SHA-256, calibration
    train-00000.arrow ...    one row per document: document (bytes), source, trained, entropies
    validation-00000.arrow ...
    scorer/                  the checkpoint that made the entropies, if there are any

``entropies[i]`` is the entropy, in nats, of the prediction of the document's byte ``i``: first the
one made at BOS, last the one made at the last byte, so there is one more than there are bytes.
``trained`` has the ranges of a document's bytes that are trained on; a shard whose documents are
all trained on whole has no such column.
Boundaries are not stored: they follow from the entropies and a threshold that may change.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_serializer

from bytelm import codec
from bytelm.config import Node, parse
from bytelm.errors import BytelmError, DataError
from bytelm.storage import check_file, disk_errors, read_json, to_json, write_json
from bytelm.units import Ranges, trained_targets

MANIFEST = "manifest.json"
JOURNAL = "preparing.jsonl"
"""Settings and finished shards of a preparation that has not ended."""
SCORER = "scorer"
FORMAT = 1
RESUME = "{remedy} and run the same command again: it resumes where it stopped"
"""Advice after a disk error; see :func:`bytelm.storage.disk_errors`."""

Split = Literal["train", "validation"]


class SourceTotal(Node):
    """Documents and bytes of one source."""

    documents: int
    text_bytes: int
    trained_bytes: int | None = None
    """Bytes that are trained on; ``None`` for all."""

    def __add__(self, other: "SourceTotal") -> "SourceTotal":
        """Return the totals of both."""
        trained = None
        if self.trained_bytes is not None or other.trained_bytes is not None:
            trained = sum(
                one.text_bytes if one.trained_bytes is None else one.trained_bytes
                for one in (self, other)
            )
        return SourceTotal(
            documents=self.documents + other.documents,
            text_bytes=self.text_bytes + other.text_bytes,
            trained_bytes=trained,
        )

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: Callable[[Node], dict[str, int]]) -> dict[str, int]:
        """Leave ``trained_bytes`` out if it says nothing, as earlier versions did."""
        values = serialize(self)
        if self.trained_bytes is None:
            del values["trained_bytes"]
        return values


class ShardRecord(Node):
    """Record of one Arrow file."""

    file: str
    split: Split
    documents: int
    text_bytes: int
    file_bytes: int
    sha256: str
    sources: dict[str, SourceTotal]


class ScorerRecord(Node):
    """Record of the scorer that computed the entropies."""

    fingerprint: str
    reset_at_newline: bool


class SourceReport(Node):
    """Statistics of the patches in a sample of one source."""

    sampled_bytes: int
    patches: int
    patch_size: float
    """Mean bytes per patch."""
    longest: int
    """Longest patch, in bytes."""


class Calibration(Node):
    """Calibrated patching rule, and statistics of its patches."""

    rule: dict[str, object]
    patch_size: float
    """Mean bytes per patch over the whole sample."""
    sources: dict[str, SourceReport]


class SourceStatistics(Node):
    """Statistics of all documents of one source, in both splits."""

    documents: int = 0
    text_bytes: int = 0
    duplicate_documents: int = 0
    """Documents that were left out because they are copies; see ``--deduplicate``."""
    duplicate_bytes: int = 0
    total_entropy: float = 0.0
    """Sum of all entropies, in nats."""
    histogram: list[int] = Field(default_factory=list)
    """Entropies from 0, 0.1, 0.2, ... nats to the next; empty if there are none."""

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of a prediction, in nats."""
        return self.total_entropy / max(sum(self.histogram), 1)

    def __add__(self, other: "SourceStatistics") -> "SourceStatistics":
        """Return the statistics of both."""
        added = {
            name: getattr(self, name) + getattr(other, name)
            for name in type(self).model_fields
            if name != "histogram"
        }
        pairs = zip_longest(self.histogram, other.histogram, fillvalue=0)
        return SourceStatistics(**added, histogram=[a + b for a, b in pairs])


class LeftOut(Node):
    """Counts of what preparation skipped."""

    duplicate_documents: int = 0
    empty_documents: int = 0
    invalid_records: int = 0
    binary_files: int = 0
    skipped_files: int = 0


class InputRecord(Node):
    """Record of one input: what was read from it, or why it was not read."""

    name: str
    source: str
    kind: str
    """Format in which it was read; ``binary`` or ``skipped`` if it was not."""
    split: Split | None = None
    """Split of all its documents, if it was held out whole."""
    documents: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    invalid_records: int = 0
    note: str = ""
    """Reason why it was not read, or a remark on how it was."""


class Manifest(Node):
    """Contents of a folder of prepared data."""

    format: int = FORMAT
    bytelm: str
    settings: dict[str, object]
    shards: list[ShardRecord]
    inputs: list[InputRecord] = Field(default_factory=list)
    """Every file, folder and stream, in reading order; empty in data of earlier versions."""
    left_out: LeftOut = LeftOut()
    statistics: dict[str, SourceStatistics] = Field(default_factory=dict)
    """Statistics by source; empty in data of earlier versions."""
    scorer: ScorerRecord | None = None
    calibration: Calibration | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the documents and entropies, independent of the calibration."""
        digests = "\n".join(shard.sha256 for shard in self.shards)
        return hashlib.sha256(digests.encode()).hexdigest()

    def sources(self, split: Split | None = None) -> dict[str, SourceTotal]:
        """Return the size of each source, by name, in one split or both."""
        totals: dict[str, SourceTotal] = {}
        for shard in self.shards:
            if split in (None, shard.split):
                for name, total in shard.sources.items():
                    totals[name] = totals[name] + total if name in totals else total
        return dict(sorted(totals.items()))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of prepared data.

    Raises:
        DataError: the folder has no manifest, or it is damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} is not prepared data: {_no_manifest(folder)}")

    data = read_json(path, DataError, "prepare the data again")
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f"{path} has a format this version of bytelm cannot read: prepare it again")
    try:
        return parse(Manifest, data, str(path))
    except BytelmError as error:
        raise DataError(f"{error}; prepare the data again") from None


def _no_manifest(folder: Path) -> str:
    """Return what a path is that has no manifest, and how to make prepared data of it or there."""
    if folder.is_file():
        return f"it is a file; prepare its text with `bytelm data prepare {folder} --out DATA`"
    if not folder.is_dir():
        what = "there is no such folder"
    elif (folder / JOURNAL).exists():
        return "its preparation has not ended; run the command that began it again"
    else:
        what = f"it has no {MANIFEST}"
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            return f"{what}; prepare its text with `bytelm data prepare {folder} --out DATA`"
    return f"{what}; make it with `bytelm data prepare TEXT... --out {folder}`"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest atomically.

    Raises:
        DataError: the file cannot be written.
    """
    path = folder / MANIFEST
    with disk_errors(path, DataError, RESUME):
        write_json(path, manifest.model_dump(mode="json"), indent=1)


def check_shard(folder: Path, shard: ShardRecord, *, contents: bool) -> None:
    """Compare a shard with its record.

    Args:
        folder: folder of the data.
        shard: the record.
        contents: also compare the hash of the file; otherwise only its size is compared.

    Raises:
        DataError: the file is missing, cut short or altered.
    """
    remedy = "restore it from a copy, or prepare the data again"
    sha256 = shard.sha256 if contents else None
    check_file(folder / shard.file, shard.file_bytes, sha256, DataError, remedy)


class ShardViews(NamedTuple):
    """Views into a memory-mapped shard: document ``i`` is ``text[begins[i]:begins[i + 1]]``."""

    text: NDArray[np.uint8]
    begins: NDArray[np.int64]
    entropies: NDArray[np.float32] | None
    entropy_begins: NDArray[np.int64] | None
    trained: NDArray[np.int64] | None
    """(begin, end) of all ranges that are trained on; ``None`` for whole documents."""
    trained_begins: NDArray[np.int64] | None


class Dataset:
    """Memory-mapped random access to the documents of one split.

    Args:
        folder: folder made by ``bytelm data prepare``.
        split: split to read.
        verify: compare the hash of every file, instead of only its size.

    Raises:
        DataError: the folder is not prepared data, or a file is damaged.
    """

    def __init__(self, folder: Path, split: Split, *, verify: bool = False) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.has_entropies = self.manifest.scorer is not None
        records = [s for s in self.manifest.shards if s.split == split]
        self.source_names = list(self.manifest.sources())
        """Names of all sources, sorted; the same for both splits."""
        self._shards: list[ShardViews] = []
        lengths, sources = [], []
        for record in records:
            check_shard(folder, record, contents=verify)
            table = open_table(folder / record.file)
            _check_scorer(table, self.manifest, folder / record.file)
            shard = views(table, self.has_entropies)
            self._shards.append(shard)
            lengths.append(np.diff(shard.begins))
            order = {name: i for i, name in enumerate(self.source_names)}
            sources.append(np.array([order[s] for s in table["source"].to_pylist()], np.int32))
        self._has_ranges = any(shard.trained is not None for shard in self._shards)
        empty = np.zeros(0, np.int64)
        self.lengths: NDArray[np.int64] = np.concatenate([empty, *lengths])
        """Bytes of each document."""
        self.source_ids: NDArray[np.int32] = np.concatenate([empty.astype(np.int32), *sources])
        """Index into :attr:`source_names` of each document."""
        counts = [len(shard.begins) - 1 for shard in self._shards]
        self._first = [0, *accumulate(counts)]

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> bytes:
        """Return the bytes of a document."""
        shard, row = self._locate(index)
        return shard.text[shard.begins[row] : shard.begins[row + 1]].tobytes()

    def ids(self, index: int, begin: int, end: int) -> NDArray[np.int64]:
        """Return ids ``begin`` to ``end`` of a document's sequence BOS, bytes, EOS.

        Returns:
            ``int64[end - begin]``.
        """
        shard, row = self._locate(index)
        length = int(self.lengths[index])
        first = int(shard.begins[row])
        text = shard.text[first + max(begin - 1, 0) : first + min(end - 1, length)]
        ids = np.empty(end - begin, np.int64)
        at = int(begin == 0)
        ids[:at] = codec.BOS
        np.add(text, codec.OFFSET, out=ids[at : at + len(text)], dtype=np.int64)
        ids[at + len(text) :] = codec.EOS
        return ids

    def entropies(self, index: int, begin: int, end: int) -> NDArray[np.float32]:
        """Return the entropies at positions ``begin`` to ``end``, as a copy; position 0 is BOS.

        Returns:
            ``float32[end - begin]``, in nats.
        """
        shard, row = self._locate(index)
        assert shard.entropies is not None
        assert shard.entropy_begins is not None
        first = int(shard.entropy_begins[row])
        return shard.entropies[first + begin : first + end].copy()

    def trained(self, index: int) -> Ranges | None:
        """Return the ranges of a document's bytes that are trained on; ``None`` for all."""
        if not self._has_ranges:
            return None
        shard, row = self._locate(index)
        if shard.trained is None or shard.trained_begins is None:
            return None
        first, end = shard.trained_begins[row : row + 2]
        ranges = tuple((int(a), int(b)) for a, b in shard.trained[first:end])
        return None if ranges == ((0, int(self.lengths[index])),) else ranges

    def targets(self, index: int, begin: int, ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the targets of ``ids``, which begin at position ``begin`` of a document.

        Returns:
            ``int64[len(ids) - 1]``; ``None`` if all ids after the first are trained on.
        """
        ranges = self.trained(index)
        return None if ranges is None else trained_targets(ids, begin, ranges)

    def _locate(self, index: int) -> tuple[ShardViews, int]:
        at = bisect_right(self._first, index) - 1
        return self._shards[at], int(index) - self._first[at]


def _check_scorer(table: pa.Table, manifest: Manifest, path: Path) -> None:
    """Check that the entropies of a shard are by the scorer of the manifest.

    Raises:
        DataError: it has none, or they are by another scorer.
    """
    if manifest.scorer is None:
        return
    if ENTROPIES.name not in table.column_names:
        raise DataError(
            f"{path} has no entropies, and other shards have: prepare all text with one --scorer"
        )
    found = (table.schema.metadata or {}).get(SCORED_BY)
    # Shards of earlier versions do not say who scored them.
    if found is not None and found != scored_by(manifest.scorer):
        raise DataError(
            f"{path} was scored by {found.decode()}, and the data by "
            f"{scored_by(manifest.scorer).decode()}: thresholds hold for one scorer; prepare all "
            "text with one --scorer"
        )


def scored_by(scorer: ScorerRecord) -> bytes:
    """Return the name of a scorer, as shards record it in the metadata of their schema."""
    return to_json(scorer.model_dump(mode="json")).encode()


def shard_documents(path: Path) -> Iterator[bytes]:
    """Yield the documents of a shard.

    Raises:
        DataError: the file is damaged.
    """
    shard = views(open_table(path), has_entropies=False)
    for begin, end in pairwise(shard.begins):
        yield shard.text[begin:end].tobytes()


def open_table(path: Path) -> pa.Table:
    """Return a shard, memory-mapped.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged: {error}; prepare the data again") from None


def views(table: pa.Table, has_entropies: bool) -> ShardViews:
    """Return NumPy views of a shard, which is a single record batch."""
    _, offsets, data = table["document"].chunk(0).buffers()
    text = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
    begins = np.frombuffer(offsets, np.int64)[: table.num_rows + 1]
    entropies = entropy_begins = trained = trained_begins = None
    if has_entropies:
        _, offsets, _, values = table["entropies"].chunk(0).buffers()
        entropy_begins = np.frombuffer(offsets, np.int64)[: table.num_rows + 1]
        entropies = np.frombuffer(values, np.float32)
    if "trained" in table.column_names:
        ranges = table["trained"].chunk(0)
        trained_begins = ranges.offsets.to_numpy()
        ends = [ranges.values.field(name).to_numpy() for name in ("begin", "end")]
        trained = np.stack(ends, axis=1)
    return ShardViews(text, begins, entropies, entropy_begins, trained, trained_begins)


SCORED_BY = b"scored_by"
"""Key of the metadata that names the scorer of a shard."""
SCHEMA = pa.schema([("document", pa.large_binary()), ("source", pa.string())])
TRAINED = pa.field(
    "trained", pa.large_list(pa.struct([("begin", pa.int64()), ("end", pa.int64())]))
)
ENTROPIES = pa.field("entropies", pa.large_list(pa.float32()))
