"""Progress: callbacks, and what the command line shows of them."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from bytelm.data import PreparationState
from bytelm.display import ConsoleProgress, TrainingBar
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
