"""Threads: the wanted number, the recorded one, or the fastest."""

import io
import json
import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytelm import cli, threads
from bytelm.config import Recipe, parse
from bytelm.data import PrepareOptions, prepare
from bytelm.display import TrainingBar
from bytelm.progress import Callback, StopTraining
from bytelm.terminal import Terminal
from bytelm.training import recorded_threads, train


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def measured(monkeypatch, seconds):
    monkeypatch.setattr(
        threads, "measure_threads", lambda numbers: {n: seconds[n] for n in numbers}
    )


def test_the_fastest_number_is_used_and_named(monkeypatch):
    measured(monkeypatch, {1: 2.0, 2: 1.0, 4: 3.0})
    assert "using 2 of 4 threads: 4 are 3.0 times as slow" in threads.use_threads(None)
    assert torch.get_num_threads() == 2


def test_nothing_is_said_of_all_threads(monkeypatch):
    measured(monkeypatch, {1: 4.0, 2: 2.0, 4: 1.0})
    assert threads.use_threads(None) == ""
    assert torch.get_num_threads() == 4
    # Fewer are only a little faster: what else the computer does may end.
    measured(monkeypatch, {1: 0.6, 2: 2.0, 4: 1.0})
    assert threads.use_threads(None) == ""


def test_what_the_user_wants_is_not_measured(monkeypatch):
    monkeypatch.setattr(threads, "measure_threads", None)
    assert threads.use_threads(3, recorded=2) == ""
    assert torch.get_num_threads() == 3
    assert threads.use_threads(None, recorded=2) == ""
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.use_threads(None, recorded=1) == threads.use_threads(None) == ""
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads.use_threads(None, "cuda") == ""


def test_a_measurement_finds_slow_numbers_soon_and_changes_nothing():
    def work():
        time.sleep(0.02 if torch.get_num_threads() == 4 else 0.001)

    began = time.monotonic()
    found = threads.measure_threads([1, 2, 4], work)
    assert time.monotonic() - began < threads.PROBE_SECONDS + 1
    assert found[4] > found[1] > 0
    assert torch.get_num_threads() == 4


@given(st.integers(1, 300))
def test_candidates_are_one_all_and_powers_of_two_between(most):
    found = threads.candidates(most)
    assert found == sorted(set(found))
    assert found[0] == 1
    assert found[-1] == most
    assert all(b <= 2 * a for a, b in pairwise(found))


def test_a_run_resumes_with_the_threads_that_it_had(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.txt").write_text("ten green bottles\n" * 99)
    prepare([str(tmp_path / "x.txt")], tmp_path / "d", PrepareOptions(workers=1))
    recipe = {
        "model": {"kind": "transformer", "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16},
        "data": {"path": str(tmp_path / "d"), "row_bytes": 64, "rows_per_step": 1},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 2, "log_every": 1},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))

    class Stop(Callback):
        def on_metrics(self, step, metrics):
            raise StopTraining

    torch.set_num_threads(3)
    train(parse(Recipe, recipe, "r"), tmp_path / "run", callbacks=[Stop()])
    assert recorded_threads(tmp_path / "run") == 3
    torch.set_num_threads(4)
    command = ["bytelm", "train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, torch.get_num_threads()) == (0, 3)
    assert recorded_threads(tmp_path / "another") is None


@pytest.mark.parametrize(
    ("rates", "warnings"), [([9.0, 4.0, 9.0, 4.0], 0), ([9.0, 2.9, 1.0, 9.0, 1.0], 1)]
)
def test_steps_that_became_far_slower_are_noticed_once(rates, warnings):
    terminal = Terminal(file=io.StringIO(), width=500)
    bar = TrainingBar(terminal, "run")
    bar.on_begin(0, len(rates))
    for step, rate in enumerate(rates, 1):
        bar.on_metrics(step, {"bpb": 1.0, "bytes_per_second": rate})
    bar.on_end()
    assert terminal.file.getvalue().count("times as long as before") == warnings


@pytest.mark.parametrize(
    ("code", "given", "policy"),
    [
        ("import bytelm", None, "passive"),
        ("import torch, bytelm", None, None),
        ("import bytelm", "active", "active"),
    ],
)
def test_threads_wait_without_spinning_unless_torch_or_the_user_came_first(code, given, policy):
    environment = {name: x for name, x in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    code += "; import os; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == str(policy)
