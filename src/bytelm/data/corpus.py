"""Reading text: files, directories, globs, standard input and datasets become documents.

A document is a byte string and the name of its source. Bytes are kept exactly: text is not
decoded, so invalid UTF-8 is as good as any other.
"""

import glob
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, cast, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from bytelm.codec import to_bytes
from bytelm.data.dataset import MANIFEST, Dataset, Split
from bytelm.errors import DataError

Format = Literal["auto", "text", "lines", "jsonl", "parquet"]

STDIN = "-"
_RECORDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSED = {".gz", ".xz", ".zst"}
_BINARY_PROBE = 8192


@runtime_checkable
class _Bytes(Protocol):
    """A file of bytes, whatever decompresses it."""

    def read(self) -> bytes: ...

    def __iter__(self) -> Iterator[bytes]: ...


class Document(NamedTuple):
    """One document."""

    data: bytes
    source: str
    split: Split | None = None
    """``None`` where it is not settled yet."""


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read."""

    format: Format = "auto"
    """auto: by the file's name; text: a file is a document; lines: a line is."""
    field: str = "text"
    """Field or column that holds the text of a record."""
    source_field: str | None = None
    """Field or column that names a record's source, in place of the file's name."""
    include: str | None = None
    """Glob that files in directories must match, such as ``*.py``."""
    binary: bool = False
    """Also read files in directories that look binary (a NUL byte near the start)."""
    skip_invalid: bool = False
    """Count and skip records that cannot be read, in place of stopping."""
    cut_bytes: int | None = None
    """Cut documents longer than this into pieces of at most as much, after a newline if one is in
    the second half: the parts of a single long file can then be shuffled and held out."""


@dataclass(frozen=True)
class Input:
    """One thing to read documents from."""

    path: Path | None
    """``None`` for standard input."""
    source: str
    kind: Literal["text", "lines", "jsonl", "parquet", "prepared", "datasets"]
    split: Split | None = None
    """Of all its documents; ``None`` where preparation settles it."""

    @property
    def name(self) -> str:
        """For messages."""
        return "standard input" if self.path is None else str(self.path)

    @property
    def num_bytes(self) -> int:
        """Size on disk, for progress; 0 where it is not known."""
        return self.path.stat().st_size if self.path and self.path.is_file() else 0

    @property
    def identity(self) -> list[str | int]:
        """What tells whether the input is still the same, without reading it."""
        changed = self.path.stat().st_mtime_ns if self.path else 0
        return [self.name, self.source, self.kind, self.split or "", self.num_bytes, changed]


def find_inputs(arguments: Iterable[str], options: ReadOptions) -> list[Input]:
    """Expand arguments into inputs, in a fixed order.

    Args:
        arguments: files, directories (searched recursively, hidden files left out), globs, ``-``
            for standard input, folders that ``bytelm data prepare`` or the `datasets` library
            saved; each may be written ``NAME=ARGUMENT`` to name its source.
        options: how to read.

    Raises:
        DataError: an argument matches nothing, or can be read in no way.
    """
    inputs: list[Input] = []
    for argument in arguments:
        source, separator, rest = argument.partition("=")
        if not separator or Path(argument).exists():
            source, rest = "", argument
        if rest == STDIN:
            kind = "text" if options.format == "auto" else options.format
            if kind == "parquet":
                raise DataError("Parquet cannot be read from standard input: name a file")
            inputs.append(Input(None, source or "stdin", kind))
            continue
        paths = [Path(rest)] if Path(rest).exists() else sorted(map(Path, glob.glob(rest)))
        if not paths:
            raise DataError(f"{rest!r} matches no file: check the path")
        for path in paths:
            inputs += _inputs_at(path, source, options)
    if not inputs:
        raise DataError("the inputs hold no file to read (hidden and binary ones are left out)")
    return inputs


def _inputs_at(path: Path, source: str, options: ReadOptions) -> list[Input]:
    if path.is_file():
        return [_file_input(path, source or _source_name(path), options)]
    if (path / MANIFEST).exists():
        return [Input(path, source, "prepared")]
    if (path / "dataset_dict.json").exists():
        splits = [p.name for p in sorted(path.iterdir()) if (p / "state.json").exists()]
        raise DataError(
            f"{path} holds several splits: name one of {', '.join(splits)}, as PATH/SPLIT"
        )
    if (path / "state.json").exists() and (path / "dataset_info.json").exists():
        return [Input(path, source or path.resolve().name, "datasets")]
    found = []
    for file in sorted(path.rglob(options.include or "*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if hidden or not file.is_file():
            continue
        is_record = _suffixes(file)[0] in _RECORDS
        if is_record:
            found.append(_file_input(file, source or _source_name(file), options))
        elif options.binary or not _looks_binary(file):
            found.append(_file_input(file, source or path.resolve().name, options))
    return found


def _file_input(path: Path, source: str, options: ReadOptions) -> Input:
    if options.format != "auto":
        return Input(path, source, options.format)
    kind = _RECORDS.get(_suffixes(path)[0], "text")
    return Input(path, source, cast(Literal["text", "jsonl", "parquet"], kind))


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells the format, and that of the compression."""
    compression = path.suffix.lower() if path.suffix.lower() in _COMPRESSED else ""
    inner = path.with_suffix("") if compression else path
    return inner.suffix.lower(), compression


def _source_name(path: Path) -> str:
    """``english-books-00.jsonl.xz`` -> ``english-books``: no suffixes, no shard number."""
    name = path.name
    for suffix in reversed(_suffixes(path)):
        name = name[: len(name) - len(suffix)] if suffix else name
    return re.sub(r"[-_.]\d+(-of-\d+)?$", "", name) or name


def _looks_binary(path: Path) -> bool:
    if _suffixes(path)[1]:
        return False
    with path.open("rb") as file:
        return b"\0" in file.read(_BINARY_PROBE)


class Reader:
    """Reads inputs one after another, keeping count of what it passes over."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self.num_empty = 0
        """Documents without a byte."""
        self.num_invalid = 0
        """Records skipped because they could not be read."""
        self._file: BinaryIO | None = None

    @property
    def position(self) -> int:
        """Bytes of the current file read so far, for progress."""
        return self._file.tell() if self._file and not self._file.closed else 0

    def read(self, source: Input) -> Iterator[Document]:
        """The documents of one input, empty ones left out.

        Raises:
            DataError: the file or a record cannot be read; the message says where.
        """
        try:
            for document in self._read(source):
                if source.split:
                    document = document._replace(split=source.split)
                if document.data:
                    yield from _cut(document, self.options.cut_bytes)
                else:
                    self.num_empty += 1
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
            raise DataError(f"cannot read {source.name}: {error or 'it ends too early'}") from error
        finally:
            if self._file is not None and self._file is not sys.stdin.buffer:
                self._file.close()
            self._file = None

    def _read(self, source: Input) -> Iterator[Document]:
        match source.kind:
            case "text":
                yield Document(self._open(source).read(), source.source)
            case "lines":
                for line in self._open(source):
                    yield Document(line.rstrip(b"\r\n"), source.source)
            case "jsonl":
                yield from self._jsonl(source)
            case "parquet":
                yield from self._parquet(source)
            case "prepared":
                yield from self._prepared(source)
            case "datasets":
                yield from self._datasets(source)

    def _open(self, source: Input) -> _Bytes:
        if source.path is None:
            self._file = sys.stdin.buffer
            return sys.stdin.buffer
        file = self._file = source.path.open("rb")
        match _suffixes(source.path)[1]:
            case ".gz":
                return gzip.GzipFile(fileobj=file)
            case ".xz":
                return lzma.LZMAFile(file)
            case ".zst":
                stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
                return io.BufferedReader(cast(io.RawIOBase, stream))
        return file

    def _jsonl(self, source: Input) -> Iterator[Document]:
        for number, line in enumerate(self._open(source), start=1):
            if not line.strip():
                continue
            where = f"{source.name}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                self._invalid(f"{where} is not JSON: {error}")
                continue
            if not isinstance(record, dict):
                self._invalid(f"{where} holds {type(record).__name__}, not an object")
                continue
            yield from self._document(record, where, source)

    def _parquet(self, source: Input) -> Iterator[Document]:
        assert source.path is not None
        self._file = source.path.open("rb")
        table = pq.ParquetFile(self._file)
        self._check_columns(table.schema_arrow.names, source)
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=self._columns()):
            for record in batch.to_pylist():
                yield from self._document(record, f"{source.name}, row {row}", source)
                row += 1

    def _prepared(self, source: Input) -> Iterator[Document]:
        assert source.path is not None
        splits: tuple[Split, ...] = ("train", "validation")
        for split in splits:
            dataset = Dataset(source.path, split)
            for index in range(len(dataset)):
                name = source.source or dataset.source_names[dataset.source_ids[index]]
                yield Document(dataset.document(index), name, split)

    def _datasets(self, source: Input) -> Iterator[Document]:
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{source.name} was saved by the `datasets` library: install bytelm[hub] to read it"
            ) from None
        dataset = datasets.load_from_disk(str(source.path))
        self._check_columns(dataset.column_names, source)
        for row, record in enumerate(dataset.select_columns(self._columns())):
            yield from self._document(dict(record), f"{source.name}, row {row}", source)

    def _columns(self) -> list[str]:
        field, source_field = self.options.field, self.options.source_field
        return [field, source_field] if source_field else [field]

    def _check_columns(self, names: Iterable[str], source: Input) -> None:
        missing = [c for c in self._columns() if c not in names]
        if missing:
            raise DataError(
                f"{source.name} has no column {missing[0]!r}; it has {', '.join(names)}: "
                "choose one with --field (or --source-field)"
            )

    def _document(self, record: dict[str, Any], where: str, source: Input) -> Iterator[Document]:
        for name in self._columns():
            if name not in record:
                self._invalid(
                    f"{where} has no field {name!r}; it has {', '.join(map(repr, record))}: choose "
                    "one with --field (or --source-field)"
                )
                return
        text = record[self.options.field]
        if not isinstance(text, str | bytes):
            self._invalid(f"{where}: field {self.options.field!r} holds {text!r:.60}, not text")
            return
        label = record[self.options.source_field] if self.options.source_field else source.source
        yield Document(to_bytes(text), str(label))

    def _invalid(self, message: str) -> None:
        if not self.options.skip_invalid:
            raise DataError(f"{message} (--skip-invalid passes over such records)")
        self.num_invalid += 1


def _cut(document: Document, cut_bytes: int | None) -> Iterator[Document]:
    """A document in pieces of at most ``cut_bytes``."""
    data, begin = document.data, 0
    if cut_bytes is None or len(data) <= cut_bytes:
        yield document
        return
    while begin < len(data):
        end = begin + cut_bytes
        if end < len(data):
            newline = data.rfind(b"\n", begin + cut_bytes // 2, end)
            end = newline + 1 if newline >= 0 else end
        yield document._replace(data=data[begin:end])
        begin = end
