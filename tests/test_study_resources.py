"""What a study records of a run: memory, time, and the source that ran."""

import mmap
import time
from pathlib import Path

import pytest
import torch

import bytelm
from bytelm.study import measuring
from bytelm.study.resources import ANONYMOUS, Resources, anonymous_bytes

SIZE = 64 << 20
linux = pytest.mark.skipif(anonymous_bytes() is None, reason="needs the status file of Linux")


def measured(work):
    with Resources(torch.device("cpu")) as resources:
        kept = work()
        time.sleep(0.3)
    del kept
    return resources.record()


@linux
def test_mapped_files_are_not_counted_as_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))

    def read():
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(mapped[::4096]) == 0
        return mapped

    nothing = measured(lambda: None)
    assert nothing["memory"] == ANONYMOUS
    assert measured(read)["peak_bytes"] < nothing["peak_bytes"] + SIZE // 2
    filled = measured(lambda: torch.ones(SIZE // 4))
    assert filled["peak_bytes"] > nothing["peak_bytes"] + SIZE // 2


@linux
def test_a_peak_counts_although_the_memory_is_given_back():
    def peak():
        torch.ones(SIZE // 4)
        kept = torch.ones(SIZE // 4)
        time.sleep(0.5)
        del kept

    before = anonymous_bytes()
    assert measured(peak)["peak_bytes"] > before + SIZE // 2


def test_a_system_that_does_not_say_what_is_anonymous(tmp_path):
    status = tmp_path / "status"
    assert anonymous_bytes(status) is None
    status.write_text("Name: python\nVmHWM: 100 kB\n")
    assert anonymous_bytes(status) is None
    status.write_text("VmHWM: 100 kB\nRssAnon:\t  7 kB\n")
    assert anonymous_bytes(status) == 7168


def test_waiting_is_time_but_not_time_of_processors():
    waited = measured(lambda: time.sleep(0.5))
    assert waited["seconds"] > 0.5
    assert waited["cpu_seconds"] < 0.4


def test_time_of_processors_is_unknown_if_a_slice_did_not_record_it():
    old = {"seconds": 1.0, "peak_bytes": 5}
    new = {"seconds": 1.0, "cpu_seconds": 0.5, "peak_bytes": 7, "memory": ANONYMOUS}
    resources = measuring._resources
    assert resources([new, new]) == {"cpu_seconds": 1.0, "peak_bytes": 7, "memory": ANONYMOUS}
    assert resources([old]) == {"cpu_seconds": None, "peak_bytes": 5, "memory": "resident"}
    assert resources([old, new]) == {"cpu_seconds": None, "peak_bytes": 7, "memory": "mixed"}


def test_the_hash_is_of_the_code_that_decides_results(tmp_path, monkeypatch):
    root = Path(bytelm.__file__).parent
    for path in root.rglob("*.py"):
        copy = tmp_path / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(measuring.bytelm, "__file__", str(tmp_path / "__init__.py"))
    source_hash = measuring.source_hash.__wrapped__

    def changes(path):
        before = source_hash()
        with (tmp_path / path).open("a") as file:
            file.write("# changed\n")
        return source_hash() != before

    for path in ("figures.py", "study/page.py", "cli/app.py"):
        assert not changes(path)
    for path in ("codec.py", "training/optim.py", "study/text.py", "model/blt.py"):
        assert changes(path)
