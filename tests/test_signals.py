"""Signals to commands: one line, soon, and nothing that has to be repaired."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bytelm import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process; returns its exit status, output and error output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bytelm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("module", "function", "arguments", "line"),
    [
        ("bytelm.data", "prepare", ["data", "prepare", "x", "--out", "y"], "resumes"),
        ("bytelm.data.dataset", "read_manifest", ["data", "info", "x"], "stopped"),
        ("bytelm.language_model", "load", ["eval", "x", "y"], "stopped"),
        ("bytelm.language_model", "load", ["generate", "x"], "stopped"),
        ("bytelm.language_model", "load", ["patch", "x", "y"], "stopped"),
        ("bytelm.training", "train", ["train", "blt-1m", "data.path=x"], "resumes"),
    ],
)
def test_a_signal_ends_every_command_with_one_line(
    command, monkeypatch, number, status, module, function, arguments, line
):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(f"{module}.{function}", lambda *a, **k: signal.raise_signal(number))
    # Not a repetition of the signal of the test before.
    monkeypatch.setattr(sys.modules["bytelm.cli.app"]._interrupts, "_last", 0.0)
    code, out, err = command(*arguments)
    assert (code, out, len(err.splitlines())) == (status, "", 1)
    assert err.startswith("stopped")
    assert line in err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def write_text(folder):
    lines = [json.dumps({"text": f"line {n} of some text " * 400}) for n in range(600)]
    (folder / "text.jsonl").write_text("\n".join(lines))


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "bytelm", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A group of its own, as a command in a terminal has.
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.5, 1.5, 3.0, 4.5, 6.0])
def test_a_signal_while_workers_start_leaves_one_line(tmp_path, number, delay):
    """It reaches the whole group, whose processes import, start and work at that time."""
    write_text(tmp_path)
    prepare = ["data", "prepare", tmp_path / "text.jsonl", "--out", tmp_path / "out"]
    prepare += ["--workers", "3", "--shard-mb", "0.1"]
    process = start(*prepare)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    if process.returncode not in (0, -number):
        assert process.returncode == 128 + number
        assert out == ""
        assert err.splitlines() in (["stopped"], ["stopped: the same command resumes"])
    elif process.returncode:
        assert (out, err) == ("", "")
    process = start(*prepare)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
