import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bytelm.errors import CheckpointError, ConfigError, DataError
from bytelm.storage import (
    FILES,
    append_line,
    atomic_file,
    atomic_folder,
    check_file,
    check_folder,
    disk_errors,
    file_hash,
    folder_fingerprint,
    is_vacant,
    locked,
    read_json,
    read_lines,
    remove_unfinished,
    to_json,
    truncate_to_lines,
    write_bytes,
    write_json,
    write_text,
)

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="/\0\n")
NAMES = st.text(CHARACTERS, min_size=1, max_size=40).filter(lambda name: name.strip("."))
LINES = st.lists(st.text(CHARACTERS), unique=True)
# Of no name can a flipped bit make another.
FOLDERS = st.fixed_dictionaries(
    {"config.json": st.binary(), "weights": st.binary()},
    optional={"inner/notes.txt": st.binary(), "inner/more/empty": st.just(b"")},
)


class Disk:
    """A disk that refuses one call, or all from that one on; of a refused write, half is done."""

    CALLS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "truncate")

    def __init__(self, moment, *, is_lasting=False, before=lambda name, arguments: None):
        self.moment, self.is_lasting, self.before = moment, is_lasting, before
        self.num_calls = 0

    def __enter__(self):
        self.patches = ExitStack()
        for name in self.CALLS:
            call = self.refusing(name, getattr(os, name))
            self.patches.enter_context(mock.patch.object(os, name, call))
        opened = self.refusing("open", io.open)
        call = lambda *args, **kwargs: DiskFile(self, opened(*args, **kwargs))  # noqa: E731
        self.patches.enter_context(mock.patch.object(io, "open", call))
        return self

    def __exit__(self, *_):
        self.patches.close()

    def refusing(self, name, function):
        def call(*arguments, **options):
            self.check(name, *arguments)
            return function(*arguments, **options)

        return call

    def check(self, name, *arguments):
        self.before(name, arguments)
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if number == self.moment or (self.is_lasting and number > self.moment):
            raise OSError(errno.ENOSPC, "No space left on device")


class DiskFile:
    def __init__(self, disk, file):
        self.disk, self.file = disk, file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        try:
            self.disk.check("write")
        except OSError:
            self.file.write(data[: len(data) // 2])
            raise
        return self.file.write(data)


def refusing_disks(**options):
    """Disks that refuse the first call, the second and so on, and one that refuses none."""
    for moment in itertools.count():
        disk = Disk(moment, **options)
        yield disk
        if disk.num_calls <= moment:
            assert moment > 3, "calls are not intercepted"
            return


def contents(folder):
    # Not by Path.read_bytes: a reader is not to be refused.
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                found[path.relative_to(folder).as_posix()] = file.read()
    return found


def fill(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


PIPES = ("stdin", "stdout", "stderr")


def start(code, *arguments):
    """A process that runs some code after its imports, and prints a line when it has begun."""
    begin = "import os, signal, sys\nfrom pathlib import Path\nfrom bytelm.storage import *\n"
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    return subprocess.Popen(command, text=True, **dict.fromkeys(PIPES, subprocess.PIPE))


def finish(process):
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def kill(process):
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL


# Files


@given(old=st.none() | st.binary(), new=st.binary(), name=NAMES, is_lasting=st.booleans())
def test_whatever_the_disk_refuses_a_file_is_the_old_one_or_the_new(old, new, name, is_lasting):
    def look(*_):
        assert contents(path.parent).get(name) in (old, new)

    for disk in refusing_disks(is_lasting=is_lasting, before=look):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            if old is not None:
                path.write_bytes(old)
            error = None
            with disk:
                try:
                    write_bytes(path, new)
                except OSError as refused:
                    error = refused
            assert contents(path.parent).get(name) == (new if error is None else old)
            assert error is None or error.filename == str(path)
            if is_lasting:  # the temporary file could not be removed either
                remove_unfinished(path.parent)
            assert contents(path.parent).keys() <= {name}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(5, "I/O", "b")])
def test_a_failure_of_the_writer_leaves_the_old_file_and_its_error(tmp_path, error):
    path = tmp_path / "a.svg"
    path.write_bytes(b"old")

    def fail():
        with atomic_file(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".svg"
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert getattr(error, "filename", "b") == "b", "an error about another file keeps its name"
    assert contents(tmp_path) == {"a.svg": b"old"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_contents_are_on_disk_before_they_have_their_name(tmp_path, kind):
    """Otherwise a power cut after the renaming would leave a name with nothing behind it."""
    flushed, renamed = set(), []

    def watch(name, arguments):
        if name == "fsync":
            flushed.add(os.fstat(arguments[0]).st_ino)
        elif name in ("replace", "rename"):
            source = Path(arguments[0])
            assert {p.stat().st_ino for p in (source, *source.rglob("*"))} <= flushed
            renamed.append(Path(arguments[1]))

    with Disk(-1, before=watch):
        if kind == "file":
            write_bytes(tmp_path / "a", b"data")
        else:
            with atomic_folder(tmp_path / "a") as folder:
                fill(folder, {"b": b"1", "c/d": b"2"})
    assert renamed[-1] == tmp_path / "a"
    assert tmp_path.stat().st_ino in flushed, "a power cut could take the new name back"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(data=JSON, text=st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_written_is_read_back(data, text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        write_json(path, data)
        assert read_json(path) == data
        assert path.read_bytes() == (json.dumps(data, indent=2) + "\n").encode()
        write_text(path, text)
        assert path.read_bytes() == text.encode()


@given(st.recursive(st.floats(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@example({"a": [math.nan, (math.inf,), -math.inf, 1.0]})
def test_json_is_strict(data):
    def nulls(data):
        if isinstance(data, dict):
            return {key: nulls(value) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return [nulls(value) for value in data]
        return data if math.isfinite(data) else None

    found = json.loads(to_json(data), parse_constant=lambda name: pytest.fail(name))
    assert found == nulls(data)


@pytest.mark.parametrize("damage", [b"", b"{", b'"\xff"', b"[" * 100_000, None])
def test_json_that_cannot_be_read_is_named_with_a_remedy(tmp_path, damage):
    path = tmp_path / "a.json"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(CheckpointError, match=f"^cannot read {re.escape(str(path))}: .*[^;]$"):
        read_json(path)
    with pytest.raises(DataError, match=r"; make it again$"):
        read_json(path, DataError, "make it again")


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_permissions_and_links_outlive_a_write(tmp_path, mode):
    (tmp_path / "data").mkdir()
    path, link = tmp_path / "data" / "a.txt", tmp_path / "link.txt"
    path.write_bytes(b"old")
    path.chmod(mode)
    (tmp_path / "other").symlink_to("data/a.txt")
    link.symlink_to("other")
    for target in (path, link):
        write_text(target, target.name)
        assert path.read_text() == link.read_text() == target.name
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert link.readlink() == Path("other")
    path.unlink()
    write_text(link, "new")  # through a link that leads nowhere, as open does
    assert path.read_text() == "new"
    assert os.listdir(tmp_path / "data") == ["a.txt"]


def test_threads_that_write_one_file_leave_the_contents_of_one(tmp_path):
    path, texts = tmp_path / "a", [bytes([letter]) * 50_000 for letter in b"abcd"]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda n: write_bytes(path, texts[n % 4]), range(60)):
            assert path.read_bytes() in texts
    assert contents(tmp_path).keys() == {"a"}


WRITE_FOREVER = """
path, text = Path(sys.argv[1]), sys.argv[2].encode() * 300_000
print("begun", flush=True)
while True:
    write_bytes(path, text)
"""


def test_processes_that_write_one_file_and_are_killed_leave_the_contents_of_one(tmp_path):
    path, seen = tmp_path / "a", set()
    processes = [start(WRITE_FOREVER, path, letter) for letter in "abc"]
    for process in processes:
        assert process.stdout.readline() == "begun\n"
    for process in processes:
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                text = path.read_bytes()
                assert text == text[:1] * 300_000
                seen.add(text[:1])
        kill(process)
    text = path.read_bytes()
    assert text == text[:1] * 300_000
    assert len(seen) > 1
    remove_unfinished(tmp_path)
    assert contents(tmp_path).keys() == {"a"}


DIE_AT_CALL = """
calls = iter(range(10_000))
def deadly(function):
    def call(*arguments, **options):
        if next(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
for name in ("open", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink"):
    setattr(os, name, deadly(getattr(os, name)))
"""
WRITE_FILE = """
write_bytes(Path(sys.argv[1]) / "a", b"new")
"""
WRITE_FOLDER = """
with atomic_folder(Path(sys.argv[1]) / "a") as folder:
    for name in ("b", "c"):
        (folder / name).write_bytes(b"new")
"""


@pytest.mark.parametrize("code", [WRITE_FILE, WRITE_FOLDER], ids=["file", "folder"])
def test_a_writer_killed_at_any_call_leaves_nothing_or_the_whole(tmp_path, code):
    states = []
    for moment in itertools.count():
        parent = tmp_path / str(moment)
        parent.mkdir()
        status, errors = finish(start(DIE_AT_CALL + code, parent, moment))
        target = parent / "a"
        states.append(target.exists())
        if target.is_dir():
            assert set(check_folder(target)) == {"b", "c"}
        elif target.exists():
            assert target.read_bytes() == b"new"
        assert is_vacant(parent) != target.exists()
        if not target.exists():
            assert finish(start(code, parent)) == (0, "")
        remove_unfinished(parent)
        assert os.listdir(parent) == ["a"]
        if status == 0:
            break
        assert (status, errors) == (-signal.SIGKILL, "")
    assert states == sorted(states)
    assert states.count(False) >= 3
    assert states.count(True) >= 2, "no kill came after the renaming"


# Journals


@given(lines=LINES, cut=st.integers(min_value=0))
def test_a_journal_loses_only_a_last_line_that_is_cut(lines, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        for line in lines:
            append_line(path, line)
        if not lines:
            path.touch()
        assert read_lines(path) == lines
        data = path.read_bytes()
        assert data == "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(data[: cut % (len(data) + 1)])
        num_whole = path.read_bytes().count(b"\n")
        assert read_lines(path) == lines[:num_whole]
        append_line(path, "after the cut")
        assert read_lines(path) == [*lines[:num_whole], "after the cut"]


@given(lines=LINES, num_bytes=st.integers(0, 200))
def test_truncated_journals_hold_the_lines_that_fit(lines, num_bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())
        truncate_to_lines(path, num_bytes)
        kept = read_lines(path)
        assert kept == lines[: len(kept)]
        assert path.stat().st_size <= num_bytes
        if len(kept) < len(lines):
            assert path.stat().st_size + len(lines[len(kept)].encode()) + 1 > num_bytes


@given(lines=LINES.filter(len))
def test_a_line_that_the_disk_refuses_can_be_appended_again(lines):
    for disk in refusing_disks():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "journal"
            for line in lines:
                with suppress(OSError), disk:
                    append_line(path, line)
                    continue
                append_line(path, line)
            # Twice if it was refused after the line was written.
            assert list(dict.fromkeys(read_lines(path))) == lines
            assert len(read_lines(path)) <= len(lines) + 1


def test_a_line_is_on_disk_when_appending_returns_and_refusals_name_the_journal(tmp_path):
    sizes = []

    def watch(name, arguments):
        if name == "fsync":
            sizes.append(os.fstat(arguments[0]).st_size)

    for number in range(1, 4):
        with Disk(-1, before=watch):
            append_line(tmp_path / "journal", "x" * 9)
        assert 10 * number in sizes
        sizes.clear()
    with pytest.raises(OSError, match="journal"), Disk(2):
        append_line(tmp_path / "journal", "")


# Folders


@settings(max_examples=6)  # of some forty disks each
@given(files=FOLDERS, is_lasting=st.booleans())
def test_whatever_the_disk_refuses_a_folder_is_absent_or_complete(files, is_lasting):
    def look(*_):
        found = contents(target)
        assert not found or {name: found[name] for name in files} == files

    for disk in refusing_disks(is_lasting=is_lasting, before=look):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "target"
            error = None
            with disk:
                try:
                    with atomic_folder(target) as temporary:
                        fill(temporary, files)
                except CheckpointError as refused:
                    error = str(refused)
            if error is not None:
                where = f"cannot write {target}: No space left on device; nothing was changed: "
                assert error.startswith(where + "free some space")
                assert not target.exists()
                assert is_lasting or os.listdir(folder) == []
                with atomic_folder(target) as temporary:
                    fill(temporary, files)
            assert check_folder(target).keys() == files.keys()
            assert {n: d for n, d in contents(target).items() if n != FILES} == files
            # A lock file may stay if the disk refused to remove it.
            assert set(os.listdir(folder)) - {".writing-target.lock"} == {"target"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failure_of_the_writer_leaves_no_folder(tmp_path, error):
    def fail():
        with atomic_folder(tmp_path / "a") as folder:
            fill(folder, {"b": b"half"})
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_a_folder_is_never_overwritten(tmp_path):
    fill(tmp_path / "a", {"b": b"old"})
    with pytest.raises(CheckpointError, match="exists: choose"), atomic_folder(tmp_path / "a"):
        pytest.fail("work was done in vain")
    # Nor is one that appears meanwhile.
    with pytest.raises(CheckpointError, match="nothing was changed"), atomic_folder(tmp_path / "c"):
        fill(tmp_path / "c", {"d": b"old"})
    assert contents(tmp_path) == {"a/b": b"old", "c/d": b"old"}


def test_of_two_writers_of_a_folder_one_is_refused_before_it_writes(tmp_path):
    fill(tmp_path, {"n/.writing-a/b": b"stale", f"n/.writing-a-{'0' * 16}/b": b"stale"})
    fill(tmp_path, {f"n/.writing-ab-{'0' * 16}/b": b"other"})
    with atomic_folder(tmp_path / "n" / "a") as first:
        fill(first, {"b": b"1"})
        with (
            pytest.raises(CheckpointError, match="another process is writing"),
            atomic_folder(tmp_path / "n" / "a"),
        ):
            pytest.fail("both were let in")
        with atomic_folder(tmp_path / "n" / "c") as other:
            fill(other, {"b": b"2"})
    assert check_folder(tmp_path / "n" / "a").keys() == {"b"}
    assert sorted(os.listdir(tmp_path / "n")) == [f".writing-ab-{'0' * 16}", "a", "c"]


def test_a_folder_for_others_has_no_record(tmp_path):
    with atomic_folder(tmp_path / "a", record=False) as folder:
        fill(folder, {"b": b"data"})
    assert contents(tmp_path) == {"a/b": b"data"}


@given(files=FOLDERS, data=st.data())
def test_any_damage_to_a_folder_is_noticed(files, data):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "a"
        with atomic_folder(folder) as temporary:
            fill(temporary, files)
        assert check_folder(folder).keys() == files.keys()
        path = folder / data.draw(st.sampled_from(sorted(contents(folder))))
        whole = path.read_bytes()
        kinds = ["remove", "extra"] if path.name != FILES else ["remove"]
        match data.draw(st.sampled_from([*kinds, *(["flip", "cut"] if whole else [])])):
            case "flip":
                flipped = bytearray(whole)
                flipped[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(
                    st.integers(0, 7)
                )
                path.write_bytes(flipped)
            case "cut":
                # Without its newline the record is the same.
                longest = len(whole) - 1 - (path.name == FILES)
                path.write_bytes(whole[: data.draw(st.integers(0, longest))])
            case "extra":
                path.write_bytes(whole + b"\0")
            case "remove":
                path.unlink()
        with pytest.raises(CheckpointError, match=r"is missing|is damaged|cannot read"):
            check_folder(folder)
        if path.name != FILES:
            with pytest.raises(CheckpointError, match=f"{path.name}.*restore it from a copy"):
                check_folder(folder)


@pytest.mark.parametrize(
    "record", [[], 3, {"b": 3}, {"b": {"bytes": 4}}, {"b": {"bytes": 4, "sha256": None}}]
)
def test_a_record_of_another_shape_is_damage(tmp_path, record):
    fill(tmp_path, {"b": b"data"})
    write_json(tmp_path / FILES, record)
    with pytest.raises(CheckpointError, match=r"files\.json is damaged"):
        check_folder(tmp_path)


@given(data=st.binary())
def test_hashes_and_checks_of_a_file(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(data)
        assert file_hash(path) == hashlib.sha256(data).hexdigest()
        check_file(path, len(data), file_hash(path), DataError, "again")
        check_file(path, len(data), None, DataError, "again")
        with pytest.raises(DataError, match="its contents have changed; again"):
            check_file(path, len(data), file_hash(path)[::-1], DataError, "again")
        with pytest.raises(DataError, match=f"has {len(data)} bytes where {len(data) + 1} were"):
            check_file(path, len(data) + 1, None, DataError, "again")


@given(first=FOLDERS, second=FOLDERS)
def test_a_fingerprint_is_of_the_named_files_alone(first, second):
    found = []
    with tempfile.TemporaryDirectory() as parent:
        for number, files in enumerate((first, second)):
            with atomic_folder(Path(parent) / str(number)) as folder:
                fill(folder, files)
            names = ["config.json", "weights"]
            found.append(folder_fingerprint(Path(parent) / str(number), names))
    are_same = all(first[name] == second[name] for name in names)
    assert (found[0] == found[1]) == are_same
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in found)


def test_a_fingerprint_of_a_file_that_is_not_listed_is_refused(tmp_path):
    with atomic_folder(tmp_path / "a") as folder:
        fill(folder, {"b": b"1"})
    with pytest.raises(CheckpointError, match=r"files\.json does not list c: "):
        folder_fingerprint(tmp_path / "a", ["b", "c"])


def test_only_what_is_unfinished_is_removed(tmp_path):
    fill(tmp_path, {".writing-a/b": b"", ".writing-c.svg": b"", ".lock": b""})
    assert is_vacant(tmp_path)
    fill(tmp_path, {"writing-a": b"", "d/.writing-e": b""})
    assert not is_vacant(tmp_path)
    remove_unfinished(tmp_path)
    assert contents(tmp_path).keys() == {".lock", "writing-a", "d/.writing-e"}
    assert is_vacant(tmp_path / "nowhere")
    assert not is_vacant(tmp_path / "writing-a")


@pytest.mark.parametrize("name", [".git/config", ".gitignore", ".hidden", ".lock.txt"])
def test_a_folder_with_hidden_entries_of_others_is_not_vacant(tmp_path, name):
    fill(tmp_path, {".DS_Store": b"", ".lock": b""})
    assert is_vacant(tmp_path)
    fill(tmp_path, {name: b""})
    assert not is_vacant(tmp_path)


# Locks

HOLD = """
with locked(Path(sys.argv[1])):
    print("begun", flush=True)
    sys.stdin.read()
"""


def test_a_lock_keeps_others_out_at_once_until_its_block_ends(tmp_path):
    folder = tmp_path / "new" / "folder"
    with suppress(ZeroDivisionError), locked(folder):
        began = time.monotonic()
        with pytest.raises(ConfigError, match=f"another process is writing to {folder}: wait"):
            locked(folder).__enter__()
        assert time.monotonic() - began < 2
        with locked(tmp_path / "other"):
            pass
        status, errors = finish(start(HOLD, folder))
        assert status == 1
        assert "another process is writing to" in errors
        raise ZeroDivisionError
    assert os.listdir(folder) == []
    with locked(folder):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(tmp_path, how):
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "begun\n"
    with pytest.raises(ConfigError, match="another process"):
        locked(tmp_path).__enter__()
    process.send_signal(how)
    assert finish(process)[0] == -how
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


COUNT = """
from bytelm.errors import ConfigError
path, left = Path(sys.argv[1]), int(sys.argv[2])
while left:
    try:
        with locked(path):
            count = int((path / "count").read_text())
            (path / "count").write_text(str(count + 1))
        left -= 1
    except ConfigError:
        pass
"""


def test_holders_of_a_lock_never_overlap(tmp_path):
    (tmp_path / "count").write_text("0")
    processes = [start(COUNT, tmp_path, 300) for _ in range(3)]
    assert [finish(process) for process in processes] == [(0, "")] * 3
    assert (tmp_path / "count").read_text() == "900"


def test_a_folder_that_cannot_be_locked_is_an_error_of_the_disk(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(OSError, match="File exists"), locked(tmp_path / "a"):
        pass


# Errors of the disk


@pytest.mark.parametrize("raises", [CheckpointError, DataError])
@pytest.mark.parametrize("named", [None, "other/file"])
def test_errors_of_the_disk_name_the_path_the_reason_and_the_remedy(raises, named):
    for number in errno.errorcode:
        refused = OSError(number, os.strerror(number), named)
        with pytest.raises(raises) as caught, disk_errors(Path("a"), raises, "{remedy}, go on"):
            raise refused
        is_full = number in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if is_full else "check the path and its permissions"
        expected = f"cannot write {named or 'a'}: {os.strerror(number)}; {remedy}, go on"
        assert str(caught.value) == expected
        assert caught.value.__cause__ is refused


def test_an_error_without_a_number_keeps_its_words_and_is_taken_for_a_full_disk(tmp_path):
    path = tmp_path / "a"
    expected = f"^cannot write {re.escape(str(path))}: why; .*free some space"
    with (
        pytest.raises(DataError, match=expected),
        disk_errors(path, DataError, "then {remedy}"),
        atomic_file(path),
    ):
        raise OSError("why")
    with pytest.raises(CheckpointError, match=expected), atomic_folder(path):
        raise OSError("why")


@pytest.mark.parametrize("error", [ValueError("x"), DataError("x"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    with (
        pytest.raises(type(error)) as caught,
        disk_errors(Path("a"), CheckpointError, "{remedy}"),
    ):
        raise error
    assert caught.value is error
