"""Progress: callbacks, and what the command line shows of them."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from bytelm.cli.reading import HeldOutText
from bytelm.data import PreparationState, Reader, ReadOptions, find_inputs
from bytelm.display import ConsoleProgress, TrainingBar
from bytelm.display import progress as display
from bytelm.progress import Progress

METRICS = {
    "bpb": 1.523,
    "bytes_per_second": 13_400.0,
    "patch_size": 4.1,
    "padded_bytes": 0.08,
    "padded_patches": 0.12,
}


def drive(progress):
    """Do all that work of several parts may tell."""
    progress.stage("reading")
    progress.note("a [note]")
    bar = progress.training("run[/x]")
    bar.on_begin(0, 12_000)
    bar.on_metrics(5, METRICS)
    bar.on_metrics(5, {"validation_bpb": 2.25, "validation_flops": 1e9})
    bar.on_checkpoint(5, Path("step-5"))
    bar.on_end()
    with progress.preparing() as report:
        report(PreparationState(50, 100, 7, 2))
    with progress.counting("study", 100) as update:
        update(100, "a, b")
    with progress.measuring("evaluating") as report:
        report(5, 10)
    with progress.waiting("counting"):
        pass


def test_work_that_nobody_watches_says_nothing(capsys):
    drive(Progress())
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_progress_is_plain_lines():
    out = io.StringIO()
    drive(ConsoleProgress(Console(file=out, width=200), 3))
    assert out.getvalue().splitlines() == [
        "1/3  reading",
        "      a [note]",
        "  step 5: held-out 2.2500 bpb",
        "study 100/100 a, b, 0:00 left",
    ]


def test_long_work_without_a_terminal_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.02)
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=200))
    with progress.waiting("counting [/n]-grams"):
        while "counting [/n]-grams: 0 s" not in out.getvalue():
            time.sleep(0.01)
    with progress.measuring("evaluating [/b]") as report:
        time.sleep(0.03)
        report(5, 20)
        time.sleep(0.03)
        report(1500, None)
        time.sleep(0.03)
        report(30, 20)
    lines = out.getvalue().splitlines()
    said = ["25%", "1,500 bytes", "100%"]
    assert lines[-3:] == [f"evaluating [/b], {one}" for one in said]


def test_the_text_of_inputs_is_estimated_while_they_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "0123456789"}\n' * 100)
    (tmp_path / "b.txt").write_text("x" * 4600)
    inputs = find_inputs([str(tmp_path)], ReadOptions())
    text = HeldOutText(inputs, Reader(ReadOptions()))
    assert text.expected_bytes is None
    expected = [text.expected_bytes for _ in text]
    # A record of 23 bytes has 10 bytes of text; then comes as much plain text.
    assert len(expected) == 101
    assert 2000 <= expected[50] <= 4000
    assert text.expected_bytes == 1000 + 4600


def test_the_last_step_is_always_shown():
    out = io.StringIO()
    bar = TrainingBar(Console(file=out, width=200), "run[/x]")
    bar.on_begin(3, 5)
    bar.on_metrics(4, {"bpb": 2.0, "bytes_per_second": 80.0})
    bar.on_metrics(5, {"bpb": 1.5, "bytes_per_second": 2.5e6})
    bar.on_end()
    assert out.getvalue() == "run[/x] 5/5 1.500 bpb  2.5MB/s, 0:00 left\n"


def test_a_run_that_fails_before_it_begins_has_no_bar():
    out = io.StringIO()
    TrainingBar(Console(file=out), "run").on_end()
    assert out.getvalue() == ""


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_terminal_of_any_width_gets_a_bar_with_how_far_things_are(width):
    out = io.StringIO()
    drive(ConsoleProgress(Console(file=out, force_terminal=True, width=width)))
    for shown in ("run[/x]", "5/12000", "-:--:--", "1.523", "12%", "7 documents", "100/100"):
        assert shown in out.getvalue()


def test_what_has_no_figures_leaves_no_gap():
    console = Console(file=io.StringIO(), width=80)
    with ConsoleProgress(console).counting("study", 100) as update:
        update(100, "")
    assert console.file.getvalue() == "study 100/100, 0:00 left\n"
