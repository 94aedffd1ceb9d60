"""Open files: compressions, encodings and archives are recognised by their first bytes.

::

    with path.open("rb") as file:
        content = examine(file, path.name)
        content.stream.read()       # decompressed; UTF-16 and UTF-32 become UTF-8
"""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa

from bytelm.data.zstd import open_zstd

PROBE = 8192
"""Bytes at the beginning of a file, decompressed, that decide what it holds."""
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException)
"""Errors of reading a file, damaged ones included."""


@dataclass(frozen=True)
class Content:
    """What a file holds, according to its name and first bytes."""

    stream: io.BufferedIOBase
    """The file from its beginning, decompressed, as UTF-8 if it is text in UTF-16 or UTF-32."""
    head: bytes
    """First bytes of the stream."""
    inner_name: str
    """Name without the suffixes of the compression."""
    compression: str = ""
    encoding: str = ""
    """Encoding of the text, if it has been converted to UTF-8."""
    refusal: str = ""
    """Reason why the bytes are no text, and the remedy; empty for text and unknown bytes."""

    @property
    def is_binary(self) -> bool:
        """Whether there is a NUL byte near the beginning."""
        return b"\0" in self.head


def examine(file: io.BufferedIOBase, name: str, *, convert: bool = True) -> Content:
    """Return what a file holds; its stream begins at the beginning.

    Args:
        file: the file, at its beginning. It need not be seekable.
        name: its name.
        convert: convert UTF-16 and UTF-32 to UTF-8.

    Raises:
        OSError: the file cannot be read, or needs too much memory.
        EOFError, LZMAError, zlib.error: it is compressed and damaged.
    """
    can_seek = file.seekable()
    stream, head = _peek(file, can_seek)
    content = Content(stream, head, name)
    compression = _compression(head, name)
    if compression and head:
        opened = _DECOMPRESSORS[compression](stream, head)
        stream, head = _peek(opened, can_seek and opened.seekable())
        content = Content(stream, head, _inner_name(name, compression), compression)
    refusal = _refusal(content)
    if refusal:
        return replace(content, refusal=refusal)
    encoding = _encoding(head) if convert else ""
    if not encoding:
        return content
    stream, head = _peek(io.BufferedReader(_Utf8(stream, encoding)), can_seek=False)
    return replace(content, stream=stream, head=head, encoding=encoding)


def compression_of(name: str) -> str:
    """Return the compression that a file's name ends with, or ""."""
    return _SUFFIXES.get(suffix_of(name), "")


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, such as ``.txt``, or ""."""
    stem, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() if stem else ""


def _compression(head: bytes, name: str) -> str:
    by_content = (kind for kind, magic in _MAGIC if head.startswith(magic))
    return next(by_content, compression_of(name))


def _inner_name(name: str, compression: str) -> str:
    """Return a name without a suffix of the compression and what follows it, such as ``.part``."""
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):
        if _SUFFIXES.get("." + parts[at].lower()) == compression:
            return ".".join(parts[:at])
    return name


def _peek(stream: io.BufferedIOBase, can_seek: bool) -> tuple[io.BufferedIOBase, bytes]:
    """Return a stream, not advanced, and its first bytes."""
    # Standard input need not be at the beginning of its file.
    start = stream.tell() if can_seek else 0
    head = stream.read(PROBE)
    if can_seek:
        stream.seek(start)
        return stream, head
    return io.BufferedReader(_Replayed(head, stream)), head


class _Replayed(io.RawIOBase):
    """Stream of which a head has been read, from its beginning."""

    def __init__(self, head: bytes, rest: io.BufferedIOBase) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        taken = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def readall(self) -> bytes:
        head, self._head = self._head, b""
        return head + self._rest.read()


class _Utf8(io.RawIOBase):
    """Text of another encoding as UTF-8, without a byte order mark; lone surrogates are kept."""

    def __init__(self, stream: io.BufferedIOBase, encoding: str) -> None:
        self._stream, self._encoding = stream, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._ready, self._begun = memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            data = self._stream.read(io.DEFAULT_BUFFER_SIZE)
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise OSError(
                    f"it is {self._encoding.upper()} text with invalid bytes ({error.reason}): "
                    "convert it to UTF-8"
                ) from None
            if not self._begun and text:
                text, self._begun = text.removeprefix("\ufeff"), True
            self._ready = memoryview(text.encode("utf-8", "surrogatepass"))
            if not data and not self._ready:
                return 0
        taken, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _encoding(head: bytes) -> str:
    """Return the encoding of text in UTF-16 or UTF-32, with or without a byte order mark, or ""."""
    for encoding, mark in _MARKS:
        rest = head.removeprefix(mark)
        # Text in UTF-16 or UTF-32 is hardly ever also UTF-8.
        if (
            rest != head
            and _is_text(rest, encoding)
            and (b"\0" in rest or not _is_text(rest, "utf-8"))
        ):
            return encoding
    if b"\0" not in head:
        return ""
    # Most characters of text in Latin script have one byte that is not 0.
    return next((e for e, _ in _MARKS if _is_text(head, e) and _is_mostly_ascii(head, e)), "")


def _is_mostly_ascii(head: bytes, encoding: str) -> bool:
    text = _decoded(head, encoding)
    return sum(character < "\x80" for character in text) > 0.7 * len(text)


def _is_text(head: bytes, encoding: str) -> bool:
    """Whether bytes are text without control characters, disregarding a cut at the end."""
    try:
        text = _decoded(head, encoding)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(c >= " " or c in "\t\n\r\f\x1b" for c in text)


def _decoded(head: bytes, encoding: str) -> str:
    return codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) < PROBE - 4)


def _refusal(content: Content) -> str:
    """Return why a file is no text, and what to do about it, or ""."""
    head, suffix = content.head, suffix_of(content.inner_name)
    inside = f" inside {content.compression}" if content.compression else ""
    archive = next((kind for kind, magic in _ARCHIVES if head.startswith(magic)), "")
    if head[257:262] == b"ustar" or (suffix == ".tar" and b"\0" in head):
        archive = "tar"
    if archive:
        return f"it is a {archive} archive{inside}: unpack it, and name the folder"
    if inside and head.startswith(b"PAR1"):
        return f"it is Parquet{inside}: decompress it first"
    unread = next((kind for kind, magic in _UNREAD if head.startswith(magic)), "")
    if not unread and suffix in _UNREAD_SUFFIXES and not _is_text(head, "utf-8"):
        unread = _UNREAD_SUFFIXES[suffix]
    if unread:
        return f"it is compressed with {unread}, which is not read: decompress it first"
    return ""


def _open_lz4(file: io.BufferedIOBase, head: bytes) -> io.BufferedIOBase:
    stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "lz4")
    return io.BufferedReader(cast(io.RawIOBase, stream))


_DECOMPRESSORS: dict[str, Callable[[io.BufferedIOBase, bytes], io.BufferedIOBase]] = {
    "bzip2": lambda file, _: bz2.BZ2File(cast(Any, file)),
    "gzip": lambda file, _: gzip.GzipFile(fileobj=cast(Any, file)),
    "lz4": _open_lz4,
    "xz": lambda file, _: lzma.LZMAFile(cast(Any, file)),  # noqa: SIM115
    "zstd": open_zstd,
}
_SUFFIXES = {
    ".bz2": "bzip2",
    ".bzip2": "bzip2",
    ".gz": "gzip",
    ".gzip": "gzip",
    ".lz4": "lz4",
    ".lzma": "xz",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
_MAGIC = (
    ("gzip", b"\x1f\x8b\x08"),
    *(("bzip2", b"BZh%d1AY&SY" % level) for level in range(1, 10)),
    ("xz", b"\xfd7zXZ\0"),
    ("zstd", b"\x28\xb5\x2f\xfd"),
    ("lz4", b"\x04\x22\x4d\x18"),
)
_ARCHIVES = (
    ("zip", b"PK\x03\x04"),
    ("zip", b"PK\x05\x06"),
    ("7z", b"7z\xbc\xaf\x27\x1c"),
    ("rar", b"Rar!\x1a\x07"),
)
_UNREAD = (
    ("compress", b"\x1f\x9d"),
    ("lzip", b"LZIP\x01"),
    ("lzop", b"\x89LZO\0"),
    ("snappy", b"\xff\x06\0\0sNaPpY"),
    ("legacy lz4", b"\x02\x21\x4c\x18"),
)
_UNREAD_SUFFIXES = {
    ".br": "brotli",
    ".lz": "lzip",
    ".lzo": "lzop",
    ".snappy": "snappy",
    ".sz": "snappy",
    ".z": "compress or zlib",
    ".zlib": "zlib",
}
_MARKS = (
    ("utf-32-le", codecs.BOM_UTF32_LE),
    ("utf-32-be", codecs.BOM_UTF32_BE),
    ("utf-16-le", codecs.BOM_UTF16_LE),
    ("utf-16-be", codecs.BOM_UTF16_BE),
)
"""Encodings with their byte order marks; that of UTF-32-LE begins with that of UTF-16-LE."""
