"""Models that train in turns: the same FLOPs, a cooldown, the deadline, and resuming."""

import json
import shutil
import time

import pytest

from bytelm.checkpoint import read_config, saved_steps
from bytelm.config import Recipe, parse
from bytelm.data import PrepareOptions, prepare
from bytelm.errors import ConfigError
from bytelm.progress import Callback, StopTraining
from bytelm.stopping import Stopped
from bytelm.tracking import read_jsonl
from bytelm.training import train_in_turns


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{n} green bottles " * (n % 7 + 1)}) for n in range(99))
    )
    prepare(
        [str(folder / "x.jsonl")], folder / "d", PrepareOptions(workers=1, validation_share=0.1)
    )
    return str(folder / "d")


def recipes(data, folder):
    found = []
    for name, dim in (("small", 16), ("large", 32)):
        settings = {
            "model": {"kind": "transformer", "dim": dim, "num_layers": 1, "num_heads": 2}
            | {"ffn_dim": 16},
            "data": {"path": data, "row_bytes": 64, "rows_per_step": 2},
            "optimizer": {"schedule": "wsd", "cooldown_fraction": 0.4, "warmup_steps": 2},
            "train": {"steps": 10**9, "log_every": 1, "validate_every": 10**9}
            | {"checkpoint_every": 10**9, "validation_bytes": 500, "keep_checkpoints": 99},
        }
        found.append((parse(Recipe, settings, "test"), folder / name))
    return found


class StopsAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_metrics(self, step, metrics):
        if step == self.step:
            raise StopTraining


def rates(folder):
    metrics = [m for m in read_jsonl(folder / "metrics.jsonl") if "learning_rate" in m]
    return [m["learning_rate"] for m in metrics]


def test_all_flops_are_spent_if_the_time_allows(tmp_path, data):
    reports = []
    pair = recipes(data, tmp_path)
    found = train_in_turns(
        pair, 6e8, time.monotonic() + 60, report=lambda turns: reports.append(turns.share)
    )
    small, large = found
    assert all(result.finished for result in found)
    assert all(result.validation for result in found)
    assert small.step > 1.2 * large.step
    assert small.flops == pytest.approx(large.flops, rel=0.02)
    assert small.flops == pytest.approx(6e8, rel=0.03)
    assert reports[-1] == pytest.approx(1.0, abs=0.05)
    for (_, folder), result in zip(pair, found, strict=True):
        decayed = [rate < max(rates(folder)) for rate in rates(folder)]
        assert sum(decayed) == pytest.approx(0.4 * result.step, abs=5)
        assert rates(folder)[-1] < 0.2 * max(rates(folder))
    again = train_in_turns(pair, 6e8, time.monotonic() + 60)
    assert again == found


def test_the_deadline_ends_it_with_a_cooldown(tmp_path, data):
    began, pair = time.monotonic(), recipes(data, tmp_path)
    small, large = train_in_turns(pair, 1e15, began + 4.0)
    assert time.monotonic() - began < 8.0
    assert small.finished
    assert large.finished
    # Half a step of each, and few are taken while other processes use the cores.
    assert small.flops == pytest.approx(large.flops, rel=0.03)
    for _, folder in pair:
        assert rates(folder)[-1] < 0.5 * max(rates(folder))


def test_no_time_at_all_is_a_step_or_two(tmp_path, data):
    small, large = train_in_turns(recipes(data, tmp_path), 1e15, time.monotonic() - 1)
    assert small.finished
    assert large.finished
    assert 1 <= large.step <= small.step <= 3


@pytest.mark.parametrize("step", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_stop_saves_all_models_and_they_resume(tmp_path, data, step):
    # Before the cooldown, and in it.
    pair, whole = recipes(data, tmp_path / "a"), recipes(data, tmp_path / "b")
    expected = train_in_turns(whole, 6e8, time.monotonic() + 60)
    assert expected[1].step > 42
    with pytest.raises(Stopped):
        train_in_turns(pair, 6e8, time.monotonic() + 60, callbacks=[Callback(), StopsAt(step)])
    stopped = [int(saved_steps(folder)[-1].name.split("-")[-1]) for _, folder in pair]
    assert stopped[1] == step
    found = train_in_turns(pair, 6e8, time.monotonic() + 60)
    assert [r.step for r in found] == [r.step for r in expected]
    assert all(r.finished for r in found)
    assert found[0].validation == expected[0].validation
    assert rates(pair[0][1]) == rates(whole[0][1])


def test_a_model_that_was_killed_before_its_cooldown_was_saved_joins_the_other(tmp_path, data):
    pair = recipes(data, tmp_path)
    expected = train_in_turns(pair, 6e8, time.monotonic() + 60)
    large = pair[1][1]
    first, *others = saved_steps(large)
    assert others
    assert not read_config(first).training["recipe"]["optimizer"]["cooldowns"]
    for folder in others:
        shutil.rmtree(folder)
    # The time and the FLOPs given now would allow much more.
    found = train_in_turns(pair, 6e9, time.monotonic() + 60)
    assert [r.step for r in found] == [r.step for r in expected]
    assert rates(large)[-1] < 0.3 * max(rates(large))


def test_schedules_that_cannot_end_at_any_time_are_refused(tmp_path, data):
    pair = recipes(data, tmp_path)
    cosine = pair[0][0].optimizer.model_copy(
        update={"schedule": "cosine", "cooldown_fraction": 0.2}
    )
    pair[0] = (pair[0][0].model_copy(update={"optimizer": cosine}), pair[0][1])
    with pytest.raises(ConfigError, match=r"set optimizer\.schedule=wsd"):
        train_in_turns(pair, 1e9, time.monotonic() + 9)
