"""Read files at URLs, streamed: ``s3://``, ``gs://``, ``http://`` and what else fsspec knows."""

import fnmatch
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.core import split_protocol

from bytelm.errors import DataError

BUFFER = 2**20
"""Bytes read at once."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_VERSION = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest"),
    *("Last-Modified", "LastModified", "mtime", "modified", "created"),
)
"""What file systems call values that change with a file's contents."""


@dataclass(frozen=True)
class Remote:
    """File at a URL, as it was when it was found."""

    url: str
    size: int | None
    """Bytes; ``None`` if the server does not say."""
    version: str
    """Value that changes with the contents, if the server tells one."""

    @property
    def file_name(self) -> str:
        """Last part of its path."""
        path = urlsplit(self.url).path if _is_http(self.url) else self.url
        return unquote(PurePosixPath(path).name)

    def open(self, *, parts: bool = False) -> io.BufferedReader:
        """Open the file at its beginning.

        Args:
            parts: ask a web server for parts of the file, to seek in it; otherwise the whole comes
                in one answer, which every server gives.

        Raises:
            DataError: it cannot be read, now or later; the message says why.
        """
        system = _system(self.url)
        with _explained(self.url):
            is_whole = _is_http(self.url) and not parts
            options: dict[str, Any] = {"block_size": 0} if is_whole else {}
            file: Any = system.open(self.url, "rb", **options)
        return io.BufferedReader(_Checked(file, self.url), BUFFER)


class _Checked(io.RawIOBase):
    """File at a URL whose failures are errors of the network, not damage of its contents."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url
        try:
            file.seek(1)
            file.seek(0)
            self._can_seek = True
        except (OSError, ValueError):
            # A stream of a server that sends no parts of files, which says that it can seek.
            self._can_seek = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._can_seek

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any, /) -> int:
        with _explained(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def is_url(argument: str) -> bool:
    """Whether an argument is a URL."""
    return _URL.match(argument) is not None


def find_remote(url: str, include: str | None) -> tuple[list[Remote], bool]:
    """Return the files at a URL, sorted, and whether they are those of a folder.

    Args:
        url: a file, a glob, or a folder, of which hidden files are left out.
        include: glob that files in a folder must match.

    Raises:
        DataError: there is nothing, or it cannot be reached or read.
    """
    system = _system(url)
    with _explained(url):
        # A question mark begins the query of an address.
        if any(mark in url for mark in ("*" if _is_http(url) else "*?[")):
            found = cast(dict[str, Any], system.glob(url, detail=True))
            return [_remote(url, name, one) for name, one in _files(found)], False
        info = system.info(url)
        if info.get("type") != "directory":
            return [_remote(url, url, info)], False
        top = str(info["name"]).rstrip("/") + "/"
        found = cast(dict[str, Any], system.find(url, detail=True))
        files = []
        for name, one in _files(found):
            inner = name.removeprefix(top)
            is_hidden = any(part.startswith(".") for part in inner.split("/"))
            is_wanted = include is None or any(
                fnmatch.fnmatch(part, include) for part in (inner, inner.rpartition("/")[2])
            )
            if not is_hidden and is_wanted:
                files.append(_remote(url, name, one))
        return files, True


def _files(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, one) for name, one in sorted(found.items()) if one.get("type") == "file")


def _remote(url: str, name: str, info: dict[str, Any]) -> Remote:
    protocol, _ = split_protocol(url)
    size = info.get("size")
    version = next((str(info[key]) for key in _VERSION if info.get(key)), "")
    return Remote(name if is_url(name) else f"{protocol}://{name.lstrip('/')}", size, version)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _system(url: str) -> Any:
    """Return the file system of a URL.

    Raises:
        DataError: fsspec does not know it, or needs another package.
    """
    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        raise DataError(f"cannot read {url}: {error}") from None
    except ValueError as error:
        raise DataError(f"cannot read {url}: {error}; check the beginning of the URL") from None
    except Exception as error:
        raise _unreadable(url, error) from error


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn errors of the block, which may be of any library, into one that names the remedy."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: Exception) -> DataError:
    # The file system of http says that a file is missing, whatever the reason was.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    reason = cause or error
    status = getattr(reason, "status", None)
    if isinstance(reason, PermissionError) or status in (401, 403):
        return DataError(
            f"cannot read {url}: permission denied; check the credentials of this computer for it, "
            "or name a file that needs none"
        )
    if isinstance(reason, FileNotFoundError) or status in (404, 410):
        return DataError(f"there is nothing at {url}: check the address")
    what = " ".join(str(reason).split()) or repr(reason)
    return DataError(
        f"cannot read {url}: {what[:300]}; check the address and the network, and run the same "
        "command again"
    )
