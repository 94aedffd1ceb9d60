"""Atomic files and folders, locks, hashes, and disk errors.

Writes survive a kill or a power cut at any moment: readers find the old contents or the new ones,
never a part of either.

::

    with atomic_file(path) as temporary:        # also write_bytes, write_text, write_json
        draw(temporary)                         # renamed over path at the end

    with atomic_folder(path) as temporary:      # with a files.json that check_folder compares
        save(temporary / "weights")

    append_line(path, entry)                    # on disk when it returns
    read_lines(path)                            # without a last line that a kill cut short
"""

import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bytelm.errors import BytelmError, CheckpointError, ConfigError

FILES = "files.json"
"""Record of the size and SHA-256 of a folder's files, written last."""
LOCK = ".lock"
"""Name of the lock file of :func:`locked`."""
_UNFINISHED = ".writing-"
"""Prefix of the names of temporary files and folders."""


def at_home(path: str | PathLike[str]) -> Path:
    """Return a path in which ``~`` at the beginning is the home folder.

    Unlike :meth:`pathlib.Path.expanduser`, it keeps a name such as ``~draft`` that is no user's.
    """
    return Path(os.path.expanduser(path))


@contextmanager
def disk_errors(path: Path, raises: type[BytelmError], advice: str) -> Iterator[None]:
    """Turn an ``OSError`` into an error that names the path and the remedy.

    Args:
        path: path being written, named if the ``OSError`` names none.
        raises: class of the error to raise.
        advice: advice for the message, in which ``{remedy}`` is replaced by the remedy.

    Raises:
        BytelmError: of class ``raises``; the block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        # Some libraries drop the number; a full disk is then the likeliest cause.
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, None)
        remedy = "free some space" if is_full else "check the path and its permissions"
        raise raises(
            f"cannot write {error.filename or path}: {error.strerror or error}; "
            + advice.format(remedy=remedy)
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` if the block succeeds, and is removed if not.

    It has the suffix of ``path``, from which some libraries infer the format. Several processes
    may write the same path: the last to finish wins. A symbolic link is followed, and the
    permissions of an existing file are kept.

    Raises:
        OSError: the file cannot be written; ``path`` is unchanged.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = target.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}{path.suffix}")
    with _naming(path, temporary):
        try:
            yield temporary
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            _flush(temporary)
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    _flush_entry(target)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write_bytes(path, text.encode())


def to_json(data: Any, *, indent: int | None = None) -> str:
    """Return data as JSON that every parser reads: numbers that are not finite become null."""
    return json.dumps(_without_nan(data), indent=indent, allow_nan=False)


def _without_nan(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return data


def write_json(path: Path, data: Any, *, indent: int = 2) -> None:
    """Write indented JSON, atomically; see :func:`to_json`.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, to_json(data, indent=indent) + "\n")


def read_json(path: Path, raises: type[BytelmError] = CheckpointError, remedy: str = "") -> Any:
    """Return the contents of a JSON file.

    Args:
        path: the file.
        raises: class of the error to raise.
        remedy: what to do if the file cannot be read, for the message.

    Raises:
        BytelmError: of class ``raises``; the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        advice = f"; {remedy}" if remedy else ""
        raise raises(f"cannot read {path}: {error}{advice}") from None


def append_line(path: Path, line: str) -> None:
    """Append a line to a journal of a single writer; it is on disk when this returns.

    An incomplete last line, which a kill leaves, is removed first.

    Raises:
        OSError: the line cannot be written, and may be lost.
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
    """Return the lines of a journal, without an incomplete last one, which a kill leaves.

    Raises:
        OSError: the file cannot be read.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    return [line.decode() for line in lines]


def truncate_to_lines(path: Path, num_bytes: int | None = None) -> None:
    """Truncate a journal after the last newline of its first ``num_bytes``, or of all its bytes.

    Raises:
        OSError: the file cannot be read or written.
    """
    kept = path.read_bytes()[:num_bytes]
    os.truncate(path, kept.rfind(b"\n") + 1)


@contextmanager
def atomic_folder(target: Path, *, record: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``target`` if the block succeeds, else is removed.

    ``files.json`` is added at the end if ``record`` is true. Leftovers of killed writers of the
    same target are removed first; a lock keeps other writers of it out.

    Raises:
        CheckpointError: ``target`` exists, cannot be written, or is being written.
    """
    check_absent(target)
    prefix = f"{_UNFINISHED}{target.name}"
    temporary = target.with_name(f"{prefix}-{secrets.token_hex(8)}")
    lock = FileLock(target.with_name(f"{prefix}.lock"), timeout=0)
    advice = "nothing was changed: {remedy} or choose another place, and run the command again"
    with (
        disk_errors(target, CheckpointError, advice),
        _naming(target, temporary, Path(lock.lock_file)),
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise CheckpointError(
                f"another process is writing {target}: wait for it, or choose another name"
            ) from None
        try:
            for path in target.parent.glob(f"{glob.escape(prefix)}*"):
                if re.fullmatch("(-[0-9a-f]{16})?", path.name.removeprefix(prefix)):
                    shutil.rmtree(path, ignore_errors=True)
            temporary.mkdir()
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
        finally:
            _release(lock)
    _flush_entry(target)


def move_folder(folder: Path, target: Path) -> None:
    """Move a folder within a file system: at any moment it is whole, and at one of the places.

    Raises:
        CheckpointError: ``target`` exists.
        OSError: the folder cannot be moved.
    """
    check_absent(target)
    folder.rename(target)
    _flush_entry(target)
    _flush_entry(folder)


def check_absent(target: Path) -> None:
    """Check that nothing exists at ``target``.

    Raises:
        CheckpointError: ``target`` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists: choose another name or remove it")


def is_vacant(folder: Path) -> bool:
    """Whether a folder is absent, or holds only what killed writers and file managers leave.

    Other hidden entries, such as the ``.git`` of a repository, belong to someone.
    """
    if not folder.exists():
        return True
    return folder.is_dir() and all(_is_leftover(path.name) for path in folder.iterdir())


def _is_leftover(name: str) -> bool:
    return name in (LOCK, ".DS_Store") or name.startswith(_UNFINISHED)


def remove_unfinished(parent: Path) -> None:
    """Remove the temporary files and folders that killed writers left in ``parent``.

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
    record = _read_record(folder)
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
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Return a short hash of some files of a folder, made from their hashes in ``files.json``.

    Raises:
        CheckpointError: ``files.json`` is missing or damaged, or lacks one of the files.
    """
    record = _read_record(folder)
    missing = next((name for name in names if name not in record), None)
    if missing is not None:
        raise CheckpointError(f"{folder / FILES} does not list {missing}: use another checkpoint")
    parts = "".join(record[name]["sha256"] for name in names)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist.

    The lock is released when the process ends, even by a kill.

    Raises:
        ConfigError: another process holds the lock.
        OSError: the folder or the lock file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another process is writing to {folder}: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        _release(lock)


def _release(lock: FileLock) -> None:
    """Release a lock and remove its file."""
    # Remove the file while it is held: afterwards it may be another process's. (Windows does not
    # allow this; there, releasing the lock removes the file.)
    with suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


@contextmanager
def _naming(path: Path, *temporary: Path) -> Iterator[None]:
    """Make each ``OSError`` name ``path`` if it names no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        named = error.filename
        is_ours = named is None or any(Path(str(named)).is_relative_to(one) for one in temporary)
        # An error without a number is only a message, which a file name would hide.
        if is_ours and error.errno is not None:
            error.filename = str(path)
        raise


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / FILES)
    if not isinstance(record, dict) or not all(map(_is_description, record.values())):
        raise CheckpointError(f"{folder / FILES} is damaged: use another checkpoint")
    return record


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
    """Flush a file, or the entries of a folder, to disk."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return  # Windows cannot open folders, and flushes only files opened for writing.
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_entry(path: Path) -> None:
    """Flush the directory entry of a new file; a failure matters only after a power cut."""
    with suppress(OSError):
        _flush(path.parent)
