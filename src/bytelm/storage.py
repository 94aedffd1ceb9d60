"""Files and folders that are whole or absent, locks, hashes, and errors of the disk.

What is written here survives a kill or a power cut at any moment: readers find the old contents or
the new ones, never a part of either.

::

    with atomic_file(path) as temporary:        # also write_bytes, write_text, write_json
        draw(temporary)                         # renamed over path at the end

    with atomic_folder(path) as temporary:      # with a files.json that check_folder compares
        save(temporary / "weights")

    append_line(path, entry)                    # on disk when it returns
    read_lines(path)                            # without a last line that a kill cut short
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bytelm.errors import BytelmError, CheckpointError, ConfigError

FILES = "files.json"
"""Record of the size and SHA-256 of a folder's files, written last."""
LOCK = ".lock"
"""Name of the file that :func:`locked` holds."""
_UNFINISHED = ".writing-"
"""Begins the names of temporary files and folders."""


@contextmanager
def disk_errors(path: Path, raises: type[BytelmError], advice: str) -> Iterator[None]:
    """Turn an error of the disk into one that names the path and the remedy.

    Args:
        path: what is being written, named where the disk's error names nothing.
        raises: class of the error.
        advice: how to go on, with ``{remedy}`` where the remedy belongs.

    Raises:
        BytelmError: of class ``raises``; the disk refused.
    """
    try:
        yield
    except OSError as error:
        # Libraries that hide the number are taken to have met a full disk.
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, None)
        remedy = "free some space" if is_full else "check the path and its permissions"
        raise raises(
            f"cannot write {error.filename or path}: {error.strerror or error}; "
            + advice.format(remedy=remedy)
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Temporary file that replaces ``path`` if the block succeeds, and is removed if not.

    It has the suffix of ``path``, from which some libraries infer the format. Several processes
    may write the same path: the last to finish wins.

    Raises:
        OSError: the disk refused; ``path`` is as it was.
    """
    temporary = path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}{path.suffix}")
    with _naming(path, temporary):
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    _flush_entry(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: the disk refused.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all.

    Raises:
        OSError: the disk refused.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any, *, indent: int = 2) -> None:
    """Write JSON for people and programs, whole or not at all.

    Raises:
        OSError: the disk refused.
    """
    write_text(path, json.dumps(data, indent=indent) + "\n")


def read_json(path: Path, raises: type[BytelmError] = CheckpointError, remedy: str = "") -> Any:
    """Read JSON.

    Raises:
        BytelmError: of class ``raises``; the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        advice = f"; {remedy}" if remedy else ""
        raise raises(f"cannot read {path}: {error}{advice}") from None


def append_line(path: Path, line: str) -> None:
    """Append a line to a journal that one process writes; it is on disk when this returns.

    A last line that a kill cut short is removed first.

    Raises:
        OSError: the disk refused, and the line may be lost.
    """
    assert "\n" not in line
    with _naming(path), path.open("ab+") as file:
        size = file.tell()
        if size:
            file.seek(size - 1)
            if file.read() != b"\n":
                truncate_to_lines(path)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if not size:
        _flush_entry(path)


def read_lines(path: Path) -> list[str]:
    """Lines of a journal, without a last one that has no newline: a kill cut it short.

    Raises:
        OSError: the file cannot be read.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    return [line.decode() for line in lines]


def truncate_to_lines(path: Path, num_bytes: int | None = None) -> None:
    """Cut a journal after the last newline among its first ``num_bytes``, or among all.

    Raises:
        OSError: the disk refused.
    """
    kept = path.read_bytes()[:num_bytes]
    os.truncate(path, kept.rfind(b"\n") + 1)


@contextmanager
def atomic_folder(target: Path, *, record: bool = True) -> Iterator[Path]:
    """Temporary folder that becomes ``target`` if the block succeeds, and is removed if not.

    ``files.json`` is added at the end, unless ``record`` is off. What a killed writer of the same
    target left is removed first, so only one process at a time may write it.

    Raises:
        CheckpointError: ``target`` exists, or the disk refused.
    """
    check_absent(target)
    temporary = target.with_name(f"{_UNFINISHED}{target.name}")
    advice = "nothing was changed: {remedy} or choose another place, and run the command again"
    with disk_errors(target, CheckpointError, advice), _naming(target, temporary):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            if record:
                write_json(temporary / FILES, _describe_files(temporary))
            for path in temporary.rglob("*"):
                _flush(path)
            _flush(temporary)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _flush_entry(target)


def check_absent(target: Path) -> None:
    """Refuse to write where there is something already.

    Raises:
        CheckpointError: ``target`` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists: choose another name or remove it")


def is_vacant(folder: Path) -> bool:
    """Whether a folder does not exist or holds nothing but what a killed process left."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def remove_unfinished(parent: Path) -> None:
    """Remove what killed writers of files and folders in ``parent`` left.

    The caller must hold a lock that keeps other writers out.
    """
    for path in parent.glob(f"{_UNFINISHED}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def check_folder(folder: Path) -> dict[str, Any]:
    """Check every file of a folder against its ``files.json``, and return that record.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    record = read_json(folder / FILES)
    if not isinstance(record, dict) or not all(map(_is_description, record.values())):
        raise CheckpointError(f"{folder / FILES} is damaged: use another checkpoint")
    remedy = "restore it from a copy, or use another checkpoint"
    for name, expected in record.items():
        check_file(folder / name, expected["bytes"], expected["sha256"], CheckpointError, remedy)
    return record


def check_file(
    path: Path, num_bytes: int, sha256: str | None, raises: type[BytelmError], remedy: str
) -> None:
    """Check a file against its recorded size and, if given, its hash.

    Raises:
        BytelmError: of class ``raises``; the file is missing, cut short or altered.
    """
    if not path.is_file():
        raise raises(f"{path} is missing: {remedy}")
    size = path.stat().st_size
    if size != num_bytes:
        raise raises(
            f"{path} is damaged: it has {size} bytes where {num_bytes} were written; {remedy}"
        )
    if sha256 is not None and file_hash(path) != sha256:
        raise raises(f"{path} is damaged: its contents have changed; {remedy}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Short hash of the named files of a folder, by their hashes in its ``files.json``.

    Raises:
        CheckpointError: there is no ``files.json``, or it is not JSON.
    """
    record = read_json(folder / FILES)
    parts = "".join(record[name]["sha256"] for name in names)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be.

    The lock ends with the process, whatever ends that.

    Raises:
        ConfigError: another process is at work in it.
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another process is at work in {folder}: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        # While it is held: afterwards the file may be another process's. (On Windows the file
        # cannot be removed here, and releasing it does so.)
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()


@contextmanager
def _naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let the disk's errors name the path that the user knows, not nothing or a temporary one."""
    try:
        yield
    except OSError as error:
        named = error.filename
        is_ours = named is None or (temporary and Path(str(named)).is_relative_to(temporary))
        # One without a number is only a message, which a file's name would hide.
        if is_ours and error.errno is not None:
            error.filename = str(path)
        raise


def _is_description(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
        and isinstance(value["bytes"], int)
        and isinstance(value["sha256"], str)
    )


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }
        for path in paths
    }


def _flush(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return  # Windows opens no folders, and flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_entry(path: Path) -> None:
    """Force the name of a new file onto the disk; should that fail, only a power cut matters."""
    with suppress(OSError):
        _flush(path.parent)
