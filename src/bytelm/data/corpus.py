"""Read documents from files, directories, globs, standard input and datasets.

A document is a byte string and the name of its source. Bytes are kept exactly: text is not decoded,
so invalid UTF-8 is accepted.
"""

import bz2
import fnmatch
import glob
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast, runtime_checkable

import pyarrow as pa

from bytelm.data.dataset import MANIFEST, Dataset, Split, read_manifest
from bytelm.data.records import Document, Fields, InvalidRecord, parse_record, valid_name
from bytelm.data.tables import dataset_records, parquet_records
from bytelm.errors import DataError
from bytelm.storage import FILES

Format = Literal["auto", "text", "lines", "jsonl", "parquet"]

STDIN = "-"
_RECORDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_BINARY_PROBE = 8192
_MADE_HERE = (MANIFEST, "preparing.jsonl", FILES, "metrics.jsonl")
"""Files that identify folders of prepared data, checkpoints and runs."""


@runtime_checkable
class _Bytes(Protocol):
    """Binary file, possibly decompressed while it is read."""

    def read(self) -> bytes: ...

    def __iter__(self) -> Iterator[bytes]: ...


def _arrow_stream(codec: str, file: BinaryIO) -> _Bytes:
    stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)
    return io.BufferedReader(cast(io.RawIOBase, stream))


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], _Bytes]] = {
    ".bz2": bz2.BZ2File,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".lz4": partial(_arrow_stream, "lz4"),
    ".xz": lzma.LZMAFile,
    ".zst": partial(_arrow_stream, "zstd"),
}
"""Readers of compressed files, by suffix."""


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading inputs."""

    format: Format = "auto"
    """``auto``: by the file's name; ``text``: each file is a document; ``lines``: each line is."""
    field: str = "text"
    """Field or column that holds the text of a record; see :class:`bytelm.data.records.Fields`."""
    source_field: str | None = None
    """Field or column that names a record's source; by default the file's name does."""
    include: str | None = None
    """Glob that files in directories must match, such as ``*.py``."""
    binary: bool = False
    """Also read files in directories that look binary (a NUL byte near the start)."""
    skip_invalid: bool = False
    """Count and skip records that cannot be read, instead of stopping."""
    cut_bytes: int | None = None
    """Cut longer documents into parts of at most this size, after a newline if one is in the second
    half. The parts of a single long file can then be shuffled and held out."""


@dataclass(frozen=True)
class Input:
    """One file, folder or stream to read documents from."""

    path: Path | None
    """``None`` for standard input."""
    source: str
    kind: Literal["text", "lines", "jsonl", "parquet", "prepared", "datasets", "binary"]
    """Format of the input; ``binary`` inputs are skipped."""
    split: Split | None = None
    """Split of all its documents; ``None`` if preparation decides it."""

    @property
    def name(self) -> str:
        """Name for messages."""
        return "standard input" if self.path is None else str(self.path)

    @property
    def num_bytes(self) -> int:
        """Size of the input, for progress; 0 if unknown."""
        if self.kind == "prepared" and self.path is not None:
            return sum(shard.text_bytes for shard in read_manifest(self.path).shards)
        return self.path.stat().st_size if self.path and self.path.is_file() else 0

    @property
    def identity(self) -> list[str | int]:
        """Values that change when the input changes, found without reading it."""
        if self.path is None:
            return [self.name, self.source, self.kind, self.split or ""]
        named = [str(self.path.resolve()), self.source, self.kind, self.split or ""]
        if self.kind == "prepared":
            return [*named, read_manifest(self.path).fingerprint]
        return [*named, self.num_bytes, self.path.stat().st_mtime_ns]


def find_inputs(
    arguments: Iterable[str], options: ReadOptions, leave_out: Iterable[Path] = ()
) -> list[Input]:
    """Expand arguments into inputs, in a fixed order.

    Args:
        arguments: files; directories, searched recursively except for hidden files and output of
            bytelm; globs; ``-`` for standard input; folders that ``bytelm data prepare`` or the
            `datasets` library saved. ``NAME=ARGUMENT`` names the source of an argument.
        options: how to read them.
        leave_out: folders not to search.

    Raises:
        DataError: an argument matches nothing, or cannot be read.
    """
    inputs: list[Input] = []
    skip = {path.resolve() for path in leave_out}
    for argument in arguments:
        if not argument:
            raise DataError("an input is empty: name a file or a folder (. for this one)")
        source, named, paths = _expand(argument)
        if not paths:
            raise DataError(f"{named!r} matches no file: check the path")
        if named == STDIN:
            kind = "text" if options.format == "auto" else options.format
            if kind == "parquet":
                raise DataError("Parquet cannot be read from standard input: name a file")
            inputs.append(Input(None, source or "stdin", kind))
            continue
        for path in paths:
            inputs += _inputs_at(path, source, options, skip)
    if all(one.kind == "binary" for one in inputs):
        raise DataError(
            f"the inputs hold no file to read: name others (hidden files are skipped, and so are "
            f"{len(inputs)} binary ones, which --binary reads)"
        )
    return inputs


def _expand(argument: str) -> tuple[str, str, list[Path]]:
    """Return the source that an argument names (or ""), the path or glob, and what matches it."""
    paths = _matches(argument)
    name, separator, rest = argument.partition("=")
    # Text before "=" in the middle of an existing path, as in data/lang=en/*.txt, is no name.
    is_path = os.sep in name and Path(name).expanduser().parent.is_dir()
    if paths or not separator or is_path:
        return "", argument, paths
    return name, rest, _matches(rest)


def _matches(named: str) -> list[Path]:
    """Return the files and folders at a path or glob, sorted; standard input matches itself."""
    path = Path(named).expanduser()
    if named == STDIN or path.exists():
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]


def _inputs_at(path: Path, source: str, options: ReadOptions, skip: set[Path]) -> list[Input]:
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
        return [Input(path, source or valid_name(path.resolve().name), "datasets")]
    found = []
    for file in _files_below(path, options.include, skip):
        is_record = _suffixes(file)[0] in _RECORDS
        name = source or (_source_name(file) if is_record else valid_name(path.resolve().name))
        if is_record or options.binary or not _looks_binary(file):
            found.append(_file_input(file, name, options))
        else:
            found.append(Input(file, name, "binary"))
    return found


def _files_below(top: Path, include: str | None, skip: set[Path]) -> Iterator[Path]:
    """Yield the files below a folder, sorted, except hidden ones and output of bytelm."""
    for folder, folders, files in os.walk(top):
        here = Path(folder)
        if here.resolve() in skip or any((here / mark).exists() for mark in _MADE_HERE):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = here / name
            wanted = include is None or any(
                fnmatch.fnmatch(one, include) for one in (name, str(path.relative_to(top)))
            )
            if wanted and not name.startswith(".") and path.is_file():
                yield path


def _file_input(path: Path, source: str, options: ReadOptions) -> Input:
    if options.format != "auto":
        return Input(path, source, options.format)
    kind = _RECORDS.get(_suffixes(path)[0], "text")
    return Input(path, source, cast(Literal["text", "jsonl", "parquet"], kind))


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes of the format and of the compression; empty if there is none."""
    compression = path.suffix.lower() if path.suffix.lower() in _DECOMPRESSORS else ""
    inner = path.with_suffix("") if compression else path
    return inner.suffix.lower(), compression


def _source_name(path: Path) -> str:
    """Return a file's name without suffixes and shard number.

    For example, ``english-books-00.jsonl.xz`` gives ``english-books``.
    """
    name = path.name
    for suffix in reversed(_suffixes(path)):
        name = name[: len(name) - len(suffix)] if suffix else name
    return valid_name(re.sub(r"[-_.]\d+(-of-\d+)?$", "", name) or name)


def _looks_binary(path: Path) -> bool:
    if _suffixes(path)[1]:
        return False
    with path.open("rb") as file:
        return b"\0" in file.read(_BINARY_PROBE)


class Reader:
    """Reader of inputs, which also counts the documents, records and files that it skips."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self._fields = Fields(options.field, options.source_field)
        self.num_empty = 0
        """Documents without a byte."""
        self.num_invalid = 0
        """Records skipped because they could not be read."""
        self.num_binary = 0
        """Files left out because they look binary."""
        self._taken = 0
        self._file: BinaryIO | None = None

    @property
    def position(self) -> int:
        """Amount of the current input that has been read, in units of :attr:`Input.num_bytes`."""
        if self._file is None or self._file.closed:
            return self._taken
        return self._file.tell() if self._file.seekable() else 0

    def read(self, source: Input) -> Iterator[Document]:
        """Yield the documents of one input, except empty ones.

        Raises:
            DataError: the file or a record cannot be read; the message names the place.
        """
        if source.kind == "binary":
            self.num_binary += 1
            return
        self._taken = 0
        try:
            for document in self._read(source):
                if source.split:
                    document = document._replace(split=source.split)
                if document.data:
                    yield from cut(document, self.options.cut_bytes)
                else:
                    self.num_empty += 1
        except (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
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
        suffix = _suffixes(source.path)[1]
        return _DECOMPRESSORS[suffix](file) if suffix else file

    def _jsonl(self, source: Input) -> Iterator[Document]:
        for number, line in enumerate(self._open(source), start=1):
            if not line.strip():
                continue
            where = f"{source.name}, line {number}"
            try:
                record = parse_record(line)
            except ValueError as error:
                self._invalid(f"{where} {error}")
                continue
            yield from self._document(record, where, source)

    def _parquet(self, source: Input) -> Iterator[Document]:
        assert source.path is not None
        self._file = source.path.open("rb")
        for row, record in enumerate(parquet_records(self._file, self._fields, source.name)):
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

    def _document(self, record: dict[str, Any], where: str, source: Input) -> Iterator[Document]:
        try:
            yield self._fields.document(record, where, source.source)
        except InvalidRecord as error:
            self._invalid(str(error))

    def _invalid(self, message: str) -> None:
        if not self.options.skip_invalid:
            raise DataError(f"{message} (--skip-invalid passes over such records)")
        self.num_invalid += 1


def cut(document: Document, cut_bytes: int | None) -> Iterator[Document]:
    """Yield a document in parts of at most ``cut_bytes``."""
    data, begin = document.data, 0
    if cut_bytes is None or len(data) <= cut_bytes:
        yield document
        return
    while begin < len(data):
        end = begin + cut_bytes
        if end < len(data):
            newline = data.rfind(b"\n", begin + cut_bytes // 2, end)
            end = newline + 1 if newline >= 0 else end
        yield document.part(begin, end)
        begin = end
