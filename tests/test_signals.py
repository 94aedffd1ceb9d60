"""Signals to commands: one line, soon, and nothing that has to be repaired."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from builders import random_byte_lm
from bytelm import cli
from bytelm.checkpoint import save_model
from bytelm.config import ModelDescription, TransformerConfig
from bytelm.data import PrepareOptions, prepare
from bytelm.layout import saved_steps, step_number
from bytelm.training import Trainer


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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_stopped_has_a_checkpoint_and_the_status_of_the_signal(
    command, tmp_path, monkeypatch, number, status
):
    (tmp_path / "text.txt").write_text("some text " * 400)
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", PrepareOptions(validation_share=0.0))
    monkeypatch.setattr(sys.modules["bytelm.cli.app"]._interrupts, "_last", 0.0)
    update = Trainer._update

    def update_and_signal(trainer):
        update(trainer)
        signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "_update", update_and_signal)
    small = ["model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=16"]
    train = ["train", "byte-1m", f"data.path={tmp_path / 'data'}", "data.row_bytes=64", *small]
    code, out, err = command(*train, "train.steps=5", "--out", tmp_path / "run")
    assert (code, err) == (status, "")
    assert out.splitlines()[-1] == (
        "stopped after step 1 with a checkpoint: the same command resumes"
    )
    assert [step_number(one) for one in saved_steps(tmp_path / "run")] == [1]


def write_text(folder):
    lines = [json.dumps({"text": f"line {n} of some text " * 400}) for n in range(250)]
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
@pytest.mark.parametrize(
    ("number", "delay"),
    [
        (signal.SIGINT, 0.5),
        (signal.SIGTERM, 1.5),
        (signal.SIGINT, 3.0),
        (signal.SIGTERM, 4.5),
        (signal.SIGINT, 6.0),
    ],
)
def test_a_signal_while_workers_start_leaves_one_line(tmp_path, number, delay):
    """It reaches the whole group, whose processes import, start and work at that time."""
    write_text(tmp_path)
    size = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "window": 6}
    description = ModelDescription(model=TransformerConfig(**size))
    save_model(tmp_path / "scorer", random_byte_lm(**size), description)
    prepare = ["data", "prepare", tmp_path / "text.jsonl", "--out", tmp_path / "out"]
    prepare += ["--scorer", tmp_path / "scorer", "--workers", "2", "--shard-mb", "0.1"]
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
