"""Read documents from inputs: text, JSON, tables, prepared data and datasets.

A document is a byte string and the name of its source. Bytes are kept exactly: text is not decoded,
so invalid UTF-8 is accepted. (Only text in UTF-16 and UTF-32 is converted.)
"""

import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bytelm.data.dataset import Dataset, InputRecord, Split
from bytelm.data.hub import hub_records
from bytelm.data.inputs import Input, ReadOptions
from bytelm.data.jsonfiles import Found, json_records, line_records
from bytelm.data.opening import DAMAGED, Content, examine
from bytelm.data.records import Document, Fields, InvalidRecord, valid_name
from bytelm.data.tables import dataset_records, parquet_records
from bytelm.errors import DataError

_CHUNK = 2**16


@dataclass
class _Counts:
    """Counts and remarks of one input while it is read."""

    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    invalid: int = 0
    notes: list[str] = field(default_factory=list)


class Reader:
    """Reader of inputs, which records what it read and skipped."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self.records: list[InputRecord] = []
        """Record of each input that has been read to its end, or skipped."""
        self._fields = Fields(options.field, options.source_field)
        self._counts = _Counts()
        self._taken = 0
        self._file: io.BufferedIOBase | None = None

    @property
    def position(self) -> int:
        """Amount of the current input that has been read, in units of :attr:`Input.num_bytes`."""
        if self._file is None or self._file.closed:
            return self._taken
        return self._file.tell() if self._file.seekable() else 0

    def read(self, source: Input) -> Iterator[Document]:
        """Yield the documents of one input, except empty ones; none if it is not to be read.

        With ``skip_invalid``, what cannot be read is counted, or noted in the record.

        Raises:
            DataError: the file or a record cannot be read; the message names the place.
        """
        self._taken = 0
        counts = self._counts = _Counts(notes=[source.note] if source.note else [])
        is_damaged = False
        try:
            for document in self._read(source):
                if source.split:
                    document = document._replace(split=source.split)
                if not document.data:
                    counts.empty += 1
                for part in cut(document, self.options.cut_bytes):
                    counts.documents += 1
                    counts.text_bytes += len(part.data)
                    yield part
                most = self.options.max_bytes
                if most is not None and counts.text_bytes >= most:
                    counts.notes.append(f"only the first {counts.text_bytes:,} bytes are read")
                    break
        except DAMAGED as error:
            reason = " ".join(str(error).split()) or "it ends too early"
            if not self.options.skip_invalid:
                raise DataError(
                    f"cannot read {source.name}: {reason}; mend or remove the file, or add "
                    "--skip-invalid to pass over what cannot be read of it"
                ) from error
            counts.notes.append(f"not read to its end: {reason}")
            is_damaged = True
        finally:
            if self._file is not None and self._file is not sys.stdin.buffer:
                self._file.close()
            self._file = None
        if source.is_read and not counts.documents and not is_damaged:
            counts.notes.append("empty")
        self.records.append(
            InputRecord(
                name=valid_name(source.name),
                source=source.source,
                kind=source.kind,
                split=source.split,
                documents=counts.documents,
                text_bytes=counts.text_bytes,
                empty_documents=counts.empty,
                invalid_records=counts.invalid,
                note="; ".join(counts.notes),
            )
        )

    def _read(self, source: Input) -> Iterator[Document]:
        match source.kind:
            case "text":
                yield from self._text(self._open(source), source)
            case "lines":
                for line in self._open(source).stream:
                    yield Document(line.rstrip(b"\r\n"), source.source)
            case "json":
                yield from self._json(json_records(self._open(source)), source)
            case "jsonl":
                yield from self._json(line_records(self._open(source).stream), source)
            case "parquet":
                yield from self._parquet(source)
            case "prepared":
                yield from self._prepared(source)
            case "datasets":
                yield from self._datasets(source)
            case "hub":
                for row, record in enumerate(hub_records(source.name, self._fields)):
                    yield from self._document(record, f"{source.name}, row {row}", source)
            case "binary" | "skipped":
                return

    def _open(self, source: Input) -> Content:
        self._file = file = source.open()
        content = examine(file, source.file_name, convert=not self.options.binary)
        if content.refusal and not self.options.binary:
            raise DataError(f"cannot read {source.name}: {content.refusal}")
        if content.encoding:
            self._counts.notes.append(f"{content.encoding.upper()} text, converted to UTF-8")
        if source.kind == "text":
            self._counts.notes += self._text_notes(content)
        return content

    def _text(self, content: Content, source: Input) -> Iterator[Document]:
        """Yield a file as one document; of a damaged one what can be read, before the error."""
        stream, most = content.stream, self.options.max_bytes
        if not self.options.skip_invalid:
            yield Document(stream.read(most or -1), source.source)
            return
        data = bytearray()
        try:
            while most is None or len(data) < most:
                part = stream.read1(_CHUNK if most is None else min(_CHUNK, most - len(data)))
                if not part:
                    break
                data += part
        except DAMAGED:
            if data:
                yield Document(bytes(data), source.source)
            raise
        yield Document(bytes(data), source.source)

    def _text_notes(self, content: Content) -> list[str]:
        """Return remarks on a file that is read as one document, and may not be meant to be."""
        if content.is_binary:
            return ["looks binary: its bytes are one document"]
        if self.options.format != "auto" or not content.head.startswith(b"{"):
            return []
        line, newline, _ = content.head.partition(b"\n")
        _, record = next(line_records([line if newline else b""]), ("", None))
        if isinstance(record, dict):
            return ["holds JSON: --format jsonl reads its lines as records"]
        return []

    def _json(self, found: Iterator[Found], source: Input) -> Iterator[Document]:
        for place, record in found:
            where = f"{source.name}, {place}"
            if isinstance(record, ValueError):
                self._invalid(f"{where} {record}")
            else:
                yield from self._document(record, where, source)

    def _parquet(self, source: Input) -> Iterator[Document]:
        self._file = file = source.open(parts=True)
        if not file.seekable():
            raise DataError(
                f"{source.name} is Parquet, and its server sends no parts of files: download it"
            )
        for row, record in enumerate(parquet_records(file, self._fields, source.name)):
            yield from self._document(record, f"{source.name}, row {row}", source)

    def _prepared(self, source: Input) -> Iterator[Document]:
        assert source.path is not None
        splits: tuple[Split, ...] = ("train", "validation")
        for split in splits:
            # Verify: damaged data must not get a new, valid hash.
            dataset = Dataset(source.path, split, verify=True)
            for index in range(len(dataset)):
                name = source.source or dataset.source_names[dataset.source_ids[index]]
                self._taken += int(dataset.lengths[index])
                yield Document(dataset.document(index), name, split, trained=dataset.trained(index))

    def _datasets(self, source: Input) -> Iterator[Document]:
        assert source.path is not None
        for row, record in enumerate(dataset_records(source.path, self._fields)):
            yield from self._document(record, f"{source.name}, row {row}", source)

    def _document(self, record: Mapping[str, Any], where: str, source: Input) -> Iterator[Document]:
        try:
            yield self._fields.document(record, where, source.source)
        except InvalidRecord as error:
            self._invalid(str(error))

    def _invalid(self, message: str) -> None:
        if not self.options.skip_invalid:
            raise DataError(f"{message} (--skip-invalid passes over such records)")
        self._counts.invalid += 1


def cut(document: Document, cut_bytes: int | None) -> Iterator[Document]:
    """Yield a document, unless it is empty, in parts of at most ``cut_bytes``."""
    data, begin = document.data, 0
    if cut_bytes is None or len(data) <= cut_bytes:
        if data:
            yield document
        return
    while begin < len(data):
        end = begin + cut_bytes
        if end < len(data):
            newline = data.rfind(b"\n", begin + cut_bytes // 2, end)
            end = newline + 1 if newline >= 0 else end
        yield document.part(begin, end)
        begin = end
