"""Find inputs: arguments such as files, folders, globs and ``-`` to files with their formats."""

import fnmatch
import glob
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath

from bytelm.data.dataset import JOURNAL, MANIFEST
from bytelm.data.hub import PREFIX as HUB
from bytelm.data.hub import hub_parts
from bytelm.data.inputs import Input, Kind, ReadOptions
from bytelm.data.jsonfiles import json_records
from bytelm.data.opening import DAMAGED, Content, compression_of, examine, suffix_of
from bytelm.data.records import Fields, InvalidRecord, valid_name
from bytelm.data.urls import find_remote, is_url
from bytelm.errors import DataError
from bytelm.storage import FILES, at_home

STDIN = "-"
SAME = "the same as"
"""Beginning of the note on an input that is left out because it is one already."""
_RECORDS: dict[str, Kind] = {
    ".jl": "jsonl",
    ".json": "json",
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".ldjson": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_AMBIGUOUS = (".jl", ".json")
"""Suffixes of records and also of other text: Julia and configuration files."""
_MADE_HERE = (MANIFEST, JOURNAL, FILES, "metrics.jsonl")
"""Files that identify folders of prepared data, checkpoints and runs."""


def find_inputs(
    arguments: Iterable[str],
    options: ReadOptions,
    leave_out: Iterable[Path] = (),
    known: Iterable[Input] = (),
) -> list[Input]:
    """Expand arguments into inputs, in a fixed order.

    Files in folders that cannot be read, look binary or are inputs already are among the result,
    as ``skipped`` or ``binary`` inputs with a note.

    Args:
        arguments: files; directories, searched recursively except for hidden files and output of
            bytelm; globs; ``-`` for standard input; pipes; folders that ``bytelm data prepare`` or
            the `datasets` library saved; ``hub:OWNER/NAME`` for data sets of the Hub.
            ``NAME=ARGUMENT`` names the source of an argument.
        options: how to read them.
        leave_out: folders not to search.
        known: inputs found before, which are not read again.

    Raises:
        DataError: an argument matches nothing or cannot be read, or there is nothing to read.
    """
    search, arguments, known = _Search(options, leave_out, known), list(arguments), list(known)
    if not arguments:
        raise DataError("there are no inputs: name at least one file or folder")
    for argument in arguments:
        if not argument:
            raise DataError("an input is empty: name a file or a folder (. for this one)")
        search.add(argument)
    if not any(one.is_read for one in search.found):
        again = [one.name for one in search.found if one.note.startswith(SAME)]
        if known and len(again) == len(search.found):
            raise DataError(
                f"{', '.join(again[:3])}: held out whole, and nothing else is left to train on; "
                "name other inputs, or hold out a share of these instead (--validation-share 0.01)"
            )
        reasons = [f"{one.name} ({one.note})" for one in search.found[:3]]
        more = len(search.found) - len(reasons)
        reasons += [f"{more} more"] if more else []
        binary = any(one.kind == "binary" for one in search.found)
        raise DataError(
            "the inputs hold no file to read: name others (hidden files are skipped"
            f"{', --binary reads binary files' if binary else ''}): {', '.join(reasons)}"
        )
    return search.found


class _Search:
    """Inputs found so far."""

    def __init__(
        self, options: ReadOptions, leave_out: Iterable[Path], known: Iterable[Input]
    ) -> None:
        self.found: list[Input] = []
        self._options = options
        self._fields = Fields(options.field, options.source_field)
        self._leave_out = {os.path.realpath(path) for path in leave_out}
        self._names = {_key(one): one.name for one in known if one.is_read}

    def add(self, argument: str) -> None:
        """Add the inputs of one argument."""
        source, named, paths = _expand(argument)
        if is_url(named):
            self._add_remote(named, source)
            return
        if not paths:
            raise DataError(f"{named!r} matches no file: check the path")
        if named == STDIN:
            self._add_stream(None, source or "stdin")
            return
        if paths == [Path(named)] and named.startswith(HUB) and not paths[0].exists():
            name, _, _ = hub_parts(named)
            self._add(Input(paths[0], source or valid_name(PurePath(name).name), "hub"))
            return
        for path in paths:
            try:
                mode = path.stat().st_mode
            except OSError as error:
                if path.is_symlink():
                    raise DataError(f"{path} is a broken link: mend it, or name another") from None
                raise _unreadable(path, error) from None
            if stat.S_ISREG(mode):
                self._add_file(path, source, _real(path))
            elif stat.S_ISDIR(mode):
                self._add_folder(path, source)
            elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
                is_nameless = path.parent in (Path("/dev/fd"), Path("/proc/self/fd"))
                self._add_stream(path, source or ("pipe" if is_nameless else source_name(path)))
            else:
                raise DataError(f"{path} is neither a file nor a folder: name another")

    def _add_stream(self, path: Path | None, source: str) -> None:
        kind = self._options.format
        if kind == "parquet":
            where = "standard input" if path is None else f"the pipe {path}"
            raise DataError(f"Parquet cannot be read from {where}: name a file")
        if kind == "auto":
            suffix = suffix_of(_without_compression(path.name)) if path else ""
            kind = _RECORDS.get(suffix, "text")
        self._add(Input(path, source, kind, is_stream=True))

    def _add_folder(self, path: Path, source: str) -> None:
        if (path / MANIFEST).exists():
            self._add(Input(path, source, "prepared"))
            return
        if (path / "dataset_dict.json").exists():
            splits = [p.name for p in sorted(path.iterdir()) if (p / "state.json").exists()]
            raise DataError(
                f"{path} holds several splits: name one of {', '.join(splits)}, as PATH/SPLIT"
            )
        if (path / "state.json").exists() and (path / "dataset_info.json").exists():
            self._add(Input(path, source or valid_name(path.resolve().name), "datasets"))
            return
        before = len(self.found)
        label = source or valid_name(path.resolve().name)
        for file, real in self._files_below(path):
            self._add_file(file, source, real, label)
        if len(self.found) == before:
            include = self._options.include
            self._skip(path, "no file in it matches --include" if include else "no file in it")

    def _files_below(self, top: Path) -> Iterator[tuple[Path, str]]:
        """Yield the files below a folder with their real paths, sorted.

        Hidden files and output of bytelm are left out; a folder that links lead to is read once.
        """
        visited, pending = set[str](), [top]
        while pending:
            here = pending.pop()
            real = os.path.realpath(here)
            if real in self._leave_out:
                continue
            if real in visited:
                self._skip(here, "a link to a folder that is read already")
                continue
            visited.add(real)
            try:
                with os.scandir(here) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if here == top:
                    raise _unreadable(here, error) from None
                self._skip(here, _reason(error))
                continue
            if any(entry.name in _MADE_HERE for entry in listed):
                self._skip(here, "made by bytelm: name it to read prepared data")
                continue
            folders = []
            for entry in listed:
                if entry.name.startswith("."):
                    continue
                path = here / entry.name
                kind = _entry_kind(entry)
                if kind == "folder":
                    folders.append(path)
                elif not self._is_included(path, top):
                    continue
                elif kind == "file":
                    yield path, _real(path) if entry.is_symlink() else os.path.join(real, path.name)
                else:
                    self._skip(path, kind)
            pending += reversed(folders)

    def _is_included(self, path: Path, top: Path) -> bool:
        include = self._options.include
        return include is None or any(
            fnmatch.fnmatch(one, include) for one in (path.name, str(path.relative_to(top)))
        )

    def _add_remote(self, url: str, source: str) -> None:
        """Add the files at a URL."""
        found, is_folder = find_remote(url, self._options.include)
        if not found:
            raise DataError(f"{url} matches no file: check the address")
        folder = source or valid_name(PurePath(url).name) if is_folder else None
        for one in found:
            self._examine(Input(None, source, "text", remote=one), one.open(), one.url, folder)

    def _add_file(self, path: Path, source: str, real: str, folder: str | None = None) -> None:
        """Add a file that is named, or that was found in a folder with the name ``folder``."""
        try:
            file = path.open("rb")
        except OSError as error:
            if folder is None:
                raise _unreadable(path, error) from None
            self._skip(path, _reason(error), source)
            return
        self._examine(Input(path, source, "text"), file, real, folder)

    def _examine(self, one: Input, file: io.BufferedIOBase, real: str, folder: str | None) -> None:
        """Add a file, with its format and source according to its name and first bytes."""
        with file:
            try:
                content = examine(file, one.file_name, convert=not self._options.binary)
            except DAMAGED:
                # Reading it reports what is wrong.
                content = Content(file, b"", _without_compression(one.file_name))
            kind, note = self._kind(one.name, content, is_named=folder is None)
        source = one.source
        suffix = suffix_of(content.inner_name)
        is_text = kind == "text" and suffix in _AMBIGUOUS
        if not source and folder is not None and (suffix not in _RECORDS or is_text):
            source = folder
        source = source or _short_name(content.inner_name)
        self._add(replace(one, source=source, kind=kind, note=note), real)

    def _kind(self, path: str, content: Content, is_named: bool) -> tuple[Kind, str]:
        """Return the format of a file, and a note on it."""
        options = self._options
        if content.refusal and not options.binary:
            if is_named:
                raise DataError(f"cannot read {path}: {content.refusal}")
            return "binary", content.refusal
        suffix = suffix_of(content.inner_name)
        is_parquet = content.head.startswith(b"PAR1") and not content.compression
        may_be_binary = is_named or options.binary or is_parquet or suffix in _RECORDS
        if content.is_binary and not may_be_binary:
            inside = f" inside {content.compression}" if content.compression else ""
            return "binary", f"looks binary{inside}: --binary reads it"
        if options.format != "auto":
            return options.format, ""
        if is_parquet:
            return "parquet", ""
        if suffix in _AMBIGUOUS and content.head:
            return self._ambiguous_kind(path, content, suffix, is_named)
        return _RECORDS.get(suffix, "text"), ""

    def _ambiguous_kind(
        self, path: str, content: Content, suffix: str, is_named: bool
    ) -> tuple[Kind, str]:
        """Return the format of a file that may hold records or other text, by its first record."""
        try:
            place, record = next(json_records(content), ("", ValueError("is missing")))
        except DAMAGED:
            # Reading it reports what is wrong.
            return _RECORDS[suffix], ""
        strict = is_named and suffix == ".json" and not self._options.skip_invalid
        remedy = "; --format text reads the file as text"
        if isinstance(record, ValueError):
            if strict:
                raise DataError(
                    f"{path} holds neither one JSON object per line nor an array of them: {place} "
                    f"{record}{remedy}"
                )
            return "text", "" if suffix == ".jl" else "holds no records: read as text"
        try:
            self._fields.document(record, f"{path}, {place}", "")
        except InvalidRecord as error:
            if strict:
                raise DataError(f"{error}{remedy}") from None
            if not is_named:
                return "text", f"its records have no {self._options.field!r}: read as text"
        return _RECORDS[suffix], ""

    def _add(self, one: Input, real: str | None = None) -> None:
        """Add an input, or skip it if it is one already."""
        real = real or _key(one)
        if one.is_read and real in self._names:
            note = f"{SAME} {self._names[real]}, which is read"
            self.found.append(replace(one, kind="skipped", note=note, is_stream=False))
            return
        if one.is_read:
            self._names[real] = one.name
        self.found.append(one)

    def _skip(self, path: Path | None, note: str, source: str = "") -> None:
        self.found.append(Input(path, source, "skipped", note=note))


def _entry_kind(entry: os.DirEntry[str]) -> str:
    """Return ``file``, ``folder``, or why an entry is neither."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError as error:
        return _reason(error)
    return "a broken link" if entry.is_symlink() else "neither a file nor a folder"


def _key(one: Input) -> str:
    return _real(one.path) if one.remote is None else one.remote.url


def _real(path: Path | None) -> str:
    return STDIN if path is None else os.path.realpath(path)


def _reason(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read {path}: {error.strerror or error}; check its permissions, or name another"
    )


def _expand(argument: str) -> tuple[str, str, list[Path]]:
    """Return the source that an argument names (or ""), the path or glob, and what matches it."""
    name, separator, rest = argument.partition("=")
    if is_url(argument):
        return "", argument, []
    if is_url(rest) and os.sep not in name:
        return name, rest, []
    paths = _matches(argument)
    # Text before "=" in the middle of an existing path, as in data/lang=en/*.txt, is no name.
    is_path = os.sep in name and at_home(name).parent.is_dir()
    if paths or not separator or is_path:
        return "", argument, paths
    return name, rest, _matches(rest)


def _matches(named: str) -> list[Path]:
    """Return the files and folders at a path or glob, sorted; standard input matches itself."""
    path = at_home(named)
    if named == STDIN or named.startswith(HUB) or path.exists():
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]


def _without_compression(name: str) -> str:
    return name.rpartition(".")[0] if compression_of(name) else name


def source_name(path: Path) -> str:
    """Return a file's name without suffixes and shard number.

    For example, ``english-books-00.jsonl.xz`` gives ``english-books``.
    """
    return _short_name(_without_compression(path.name))


def _short_name(inner_name: str) -> str:
    name = PurePath(inner_name).stem
    return valid_name(re.sub(r"[-_.]\d+(-of-\d+)?$", "", name) or name)
