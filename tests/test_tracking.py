"""Metrics on their way to files."""

import math

from bytelm.tracking import JsonlMetrics, TensorBoardMetrics, read_jsonl


def test_lines_go_on_where_a_run_is_resumed(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics = JsonlMetrics(path)
    metrics.on_metrics(1, {"loss": 2.0})
    position = metrics.position()
    metrics.on_metrics(2, {"loss": 1.5})  # after the checkpoint: lost by a kill
    metrics.on_end()
    metrics = JsonlMetrics(path, position)
    metrics.on_metrics(2, {"loss": 1.25})
    metrics.on_end()
    assert read_jsonl(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.25}]


def test_a_file_that_lost_its_end_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    metrics = JsonlMetrics(path, 500)
    metrics.on_metrics(3, {"loss": math.nan})
    metrics.on_end()
    assert read_jsonl(path) == [{"step": 1}, {"step": 3, "loss": None}]
    assert "NaN" not in path.read_text()


def test_tensorboard_keeps_the_step_it_resumes_from(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = TensorBoardMetrics(tmp_path)
    for step in (1, 2, 3):
        metrics.on_metrics(step, {"bpb": float(step)})
    metrics.on_end()
    metrics = TensorBoardMetrics(tmp_path, resumed_step=2)
    metrics.on_metrics(3, {"bpb": 30.0})
    metrics.on_end()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("bpb")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
