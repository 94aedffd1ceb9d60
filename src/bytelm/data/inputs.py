"""What is read: files, folders and streams with their formats, and the options of reading them."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from bytelm.data.dataset import Split, read_manifest
from bytelm.data.urls import Remote

Format = Literal["auto", "text", "lines", "json", "jsonl", "parquet"]
Kind = Literal[
    "text",
    "lines",
    "json",
    "jsonl",
    "parquet",
    "prepared",
    "datasets",
    "hub",
    "binary",
    "skipped",
]


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading inputs."""

    format: Format = "auto"
    """``auto``: by the file's name and content; ``text``: each file is a document; ``lines``: each
    line is; ``jsonl``: each line is a record; ``json``: also one array of records."""
    field: str = "text"
    """Field or column that holds the text of a record; see :class:`bytelm.data.records.Fields`."""
    source_field: str | None = None
    """Field or column that names a record's source; by default the file's name does."""
    include: str | None = None
    """Glob that files in directories must match, such as ``*.py``."""
    binary: bool = False
    """Also read files in directories that look binary (a NUL byte near the start), and archives;
    text in UTF-16 or UTF-32 is not converted."""
    skip_invalid: bool = False
    """Count and skip records that cannot be read, and what cannot be read of damaged files, instead
    of stopping."""
    cut_bytes: int | None = None
    """Cut longer documents into parts of at most this size, after a newline if one is in the second
    half. The parts of a single long file can then be shuffled and held out."""
    max_bytes: int | None = None
    """Stop reading an input after about this many bytes of text; ``None`` to read all."""


@dataclass(frozen=True)
class Input:
    """One file, folder or stream to read documents from."""

    path: Path | None
    """``None`` for standard input."""
    source: str
    kind: Kind
    """Format of the input; ``binary`` and ``skipped`` inputs are not read."""
    split: Split | None = None
    """Split of all its documents; ``None`` if preparation decides it."""
    note: str = ""
    """Reason why it is not read, or why its format is not the one its name suggests."""
    is_stream: bool = False
    """Whether it can be read only once, as standard input and pipes."""
    remote: Remote | None = None
    """File at a URL, in which case there is no path."""

    @property
    def name(self) -> str:
        """Name for messages."""
        if self.remote is not None:
            return self.remote.url
        return "standard input" if self.path is None else str(self.path)

    @property
    def file_name(self) -> str:
        """Name of the file; "" for standard input."""
        if self.remote is not None:
            return self.remote.file_name
        return "" if self.path is None else self.path.name

    def open(self, *, parts: bool = False) -> io.BufferedIOBase:
        """Open a file or a stream; ``parts`` is for seeking, see :meth:`Remote.open`."""
        if self.remote is not None:
            return self.remote.open(parts=parts)
        return (
            cast(io.BufferedIOBase, sys.stdin.buffer)
            if self.path is None
            else open(self.path, "rb")
        )

    @property
    def is_read(self) -> bool:
        """Whether its documents are read."""
        return self.kind not in ("binary", "skipped")

    @property
    def num_bytes(self) -> int:
        """Size of the input, for progress; 0 if unknown."""
        if self.remote is not None:
            return self.remote.size or 0
        if self.kind == "prepared" and self.path is not None:
            return sum(shard.text_bytes for shard in read_manifest(self.path).shards)
        return self.path.stat().st_size if self.path and self.path.is_file() else 0

    @property
    def identity(self) -> list[str | int]:
        """Values that change when the input changes, found without reading it."""
        if self.remote is not None:
            remote = [self.name, self.source, self.kind, self.split or ""]
            return [*remote, self.num_bytes, self.remote.version]
        if self.path is None:
            return [self.name, self.source, self.kind, self.split or ""]
        if self.kind == "hub":
            return [self.name, self.source, self.kind, self.split or ""]
        named: list[str | int] = [
            str(self.path.resolve()),
            self.source,
            self.kind,
            self.split or "",
        ]
        if self.kind == "prepared":
            return [*named, read_manifest(self.path).fingerprint]
        if self.is_stream:
            return named
        return [*named, self.num_bytes, self.path.stat().st_mtime_ns]
