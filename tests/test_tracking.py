"""Metrics on their way to files and screens."""

import io
import math

import pytest
from rich.console import Console

from bytelm.tracking import JsonlSink, LiveLine, TensorBoardSink, preparation_bar, read_jsonl


def test_lines_go_on_where_a_run_is_resumed(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path)
    sink.write(1, {"loss": 2.0})
    position = sink.position()
    sink.write(2, {"loss": 1.5})  # after the checkpoint: lost by a kill
    sink.close()
    sink = JsonlSink(path, position)
    sink.write(2, {"loss": 1.25})
    sink.close()
    assert read_jsonl(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.25}]


def test_a_file_that_lost_its_end_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    sink = JsonlSink(path, 500)
    sink.write(3, {"loss": math.nan})
    sink.close()
    assert read_jsonl(path) == [{"step": 1}, {"step": 3, "loss": None}]
    assert "NaN" not in path.read_text()


def test_tensorboard_keeps_the_step_it_resumes_from(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        sink.write(step, {"bpb": float(step)})
    sink.close()
    sink = TensorBoardSink(tmp_path, resumed_step=2)
    sink.write(3, {"bpb": 30.0})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("bpb")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_without_a_terminal_progress_is_plain_lines():
    out = io.StringIO()
    with LiveLine(Console(file=out, width=200), "run[/x]", 10) as line:
        line.update(10, "1.5 bpb")
        line.note("a [note]")
    assert out.getvalue().splitlines() == ["run[/x] 10/10 1.5 bpb, 0:00 left", "a [note]"]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_terminal_of_any_width_gets_a_bar_with_how_far_things_are(width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width)
    with LiveLine(console, "run[/x]", 12_000) as line:
        line.update(5, "1.523 bpb  13.4kB/s  4.10 bytes/patch  padded 8% bytes 12% patches")
    for shown in ("run[/x]", "5/12000", "-:--:--", "1.523", "12%"):
        assert shown in out.getvalue()


def test_a_bar_for_preparation():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)

    class State:
        done_bytes, total_bytes, documents, shards = 50, 100, 7, 2

    with preparation_bar(console) as report:
        report(State())
    assert "7 documents, 2 shards" in out.getvalue()
