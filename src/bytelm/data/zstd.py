"""Zstandard files, with windows of up to 2 GiB."""

import io
from typing import Any, cast

import pyarrow as pa

MAX_WINDOW = 2**31
"""Largest window, in bytes, that is read: up to so much memory is used while the file is open."""
_ARROW_WINDOW = 2**27
"""Largest window that Arrow reads."""
_CHUNK = 16_384


def open_zstd(file: io.BufferedIOBase, head: bytes) -> io.BufferedReader:
    """Return the decompressed stream of a file.

    Args:
        file: the file, at its beginning.
        head: its first bytes.

    Raises:
        OSError: the window is too large, or the package `zstandard` is needed and missing.
    """
    window = window_size(head)
    if window <= _ARROW_WINDOW:
        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream))
    remedy = "decompress it first, with `zstd -d --long=31`"
    size = f"{window / 2**20:,.0f} MiB"
    if window > MAX_WINDOW:
        raise OSError(f"its window of {size} is above {MAX_WINDOW // 2**20:,} MiB: {remedy}")
    try:
        import zstandard
    except ImportError:
        raise OSError(
            f"its window of {size} needs a package: install bytelm[zstd], or {remedy}"
        ) from None
    return io.BufferedReader(_LongWindows(file, zstandard))


def window_size(head: bytes) -> int:
    """Return the bytes of window of a file's first frame, or 0 if the header is not whole."""
    while head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # A frame to skip.
        head = head[8 + int.from_bytes(head[4:8], "little") :]
    if len(head) < 6 or not head.startswith(b"\x28\xb5\x2f\xfd"):
        return 0
    descriptor = head[4]
    if not descriptor & 0x20:
        exponent, eighths = head[5] >> 3, head[5] & 7
        return (8 + eighths) << (7 + exponent)
    # A frame of a single segment: the window is as large as its content.
    at, length = 5 + (0, 1, 2, 4)[descriptor & 3], (1, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(head[at : at + length], "little") + 256 * (length == 2)


class _LongWindows(io.RawIOBase):
    """Decompressed frames; Arrow's stream has a limit, and `zstandard`'s hides a file cut short."""

    def __init__(self, file: io.BufferedIOBase, zstandard: Any) -> None:
        self._file, self._zstandard = file, zstandard
        self._codec = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._output:
            self._input = self._input or self._file.read(_CHUNK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends too early")
                return 0
            self._frame = self._frame or self._codec.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        taken, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)
