"""Learning rates over a run, and ends that are decided while it is in progress."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bytelm.checkpoint import read_config, saved_steps
from bytelm.config import Cooldown, OptimizerConfig, Recipe, dump_yaml, load_recipe, parse
from bytelm.data import PrepareOptions, prepare
from bytelm.errors import ConfigError
from bytelm.progress import BeginCooldown, Callback, StopTraining
from bytelm.training import learning_rate, train


@st.composite
def decided(draw):
    """Cooldowns as runs decide them: each starts before the end of the one before it."""
    start, left = draw(st.integers(0, 30)), draw(st.integers(1, 30))
    cooldowns = [Cooldown(start=start, end=start + left)]
    while (last := cooldowns[-1]).end > last.start + 1 and draw(st.booleans()):
        start = draw(st.integers(last.start + 1, last.end - 1))
        cooldowns.append(Cooldown(start=start, end=start + draw(st.integers(1, 30))))
    return cooldowns


configs = st.builds(
    OptimizerConfig,
    schedule=st.just("wsd"),
    learning_rate=st.floats(1e-4, 1.0),
    warmup_steps=st.integers(0, 20),
    final_ratio=st.floats(0, 0.5),
    cooldown=st.sampled_from(["linear", "1-sqrt"]),
    cooldown_fraction=st.floats(0.01, 1.0),
    cooldowns=st.none() | decided(),
)


def rates_step_by_step(steps, config):
    """The readable twin: each step of a cooldown takes an equal share of what remains."""
    start = steps - max(round(config.cooldown_fraction * steps), 1)
    ends = {c.start: c.end for c in config.cooldowns or [Cooldown(start=start, end=steps)]}
    end, done, rates = None, 0.0, []
    for step in range(steps):
        end = ends.get(step, end)
        left = 1 - (done if config.cooldown == "linear" else math.sqrt(done))
        rate = config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * left)
        warm = config.learning_rate * (step + 1) / max(config.warmup_steps, 1)
        rates.append(min(rate, warm))
        if end is not None:
            done += (1 - done) / (end - step)
    return rates


@given(configs, st.integers(1, 80))
def test_wsd_equals_its_readable_twin(config, steps):
    if config.cooldowns:
        steps = config.cooldowns[-1].end
    found = [learning_rate(step, steps, config) for step in range(steps)]
    assert found == pytest.approx(rates_step_by_step(steps, config), rel=1e-6, abs=1e-9)


@given(configs, st.integers(1, 80))
def test_wsd_rises_then_is_constant_then_falls_to_its_end(config, steps):
    if config.cooldowns:
        steps = config.cooldowns[-1].end
    rates = [learning_rate(step, steps, config) for step in range(steps + 1)]
    top = rates.index(max(rates))
    assert all(a <= b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    assert max(rates) <= config.learning_rate
    # The step after the last one would have the final rate.
    end = config.learning_rate * config.final_ratio
    assert rates[-1] == pytest.approx(min(end, rates[-1]), abs=1e-7 * config.learning_rate)
    first = config.cooldowns[0].start if config.cooldowns else None
    if first is not None:
        assert all(r == config.learning_rate for r in rates[config.warmup_steps : first + 1])


def test_cosine_is_the_default():
    assert OptimizerConfig().schedule == "cosine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine", "cooldowns": [{"start": 2, "end": 9}]}, "schedule=wsd"),
        ({"schedule": "cosine", "cooldown": "linear"}, "schedule=wsd"),
        ({"schedule": "cosine", "cooldown_fraction": 0.1}, "schedule=wsd"),
        ({"schedule": "wsd", "cooldowns": [{"start": 2, "end": 8}]}, "ends at step 8, but .* is 9"),
        ({"schedule": "wsd", "cooldowns": [{"start": 9, "end": 9}]}, "each end after its start"),
        ({"schedule": "wsd", "cooldowns": []}, "start one after the other"),
        (
            {"schedule": "wsd", "cooldowns": [{"start": 5, "end": 7}, {"start": 5, "end": 9}]},
            "start one after the other",
        ),
    ],
)
def test_cooldowns_that_no_run_has_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        recipe("somewhere", **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{n} green bottles " * (n % 7 + 1)}) for n in range(99))
    )
    prepare([str(folder / "x.jsonl")], folder / "d", PrepareOptions(workers=1))
    return str(folder / "d")


def recipe(data, steps=9, **optimizer):
    settings = {
        "model": {"kind": "transformer", "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16},
        "data": {"path": data, "row_bytes": 64, "rows_per_step": 2},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "schedule": "wsd", **optimizer},
        "train": {
            "steps": steps,
            "log_every": 1,
            "validate_every": 3,
            "checkpoint_every": 3,
            "validation_bytes": 500,
            "keep_checkpoints": 99,
        },
    }
    return parse(Recipe, settings, "test")


class Decide(Callback):
    """Decides at some steps that a number of steps remain, and stops at another."""

    def __init__(self, remaining, stop=None):
        self.remaining, self.stop = remaining, stop

    def on_metrics(self, step, metrics):
        if "validation_bpb" in metrics:
            return
        if step == self.stop:
            raise StopTraining
        if step in self.remaining:
            raise BeginCooldown(self.remaining[step])


def assert_same(run, other):
    assert [s.name for s in saved_steps(run)] == [s.name for s in saved_steps(other)]
    a, b = (load_file(saved_steps(each)[-1] / "model.safetensors") for each in (run, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rates(run) == rates(other)


def rates(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


DECISIONS = {5: 6, 8: 2}


def test_a_run_ends_when_it_is_decided(data, tmp_path):
    result = train(recipe(data, steps=1000), tmp_path / "r", callbacks=[Decide(DECISIONS)])
    assert result.finished
    assert result.step == 10
    found = rates(tmp_path / "r")
    assert found[1:5] == [0.01] * 4
    assert all(a > b for a, b in pairwise(found[5:]))
    # The command that began it has nothing left to do.
    again = train(recipe(data, steps=1000), tmp_path / "r")
    assert again.finished
    assert (again.step, again.flops) == (result.step, result.flops)


def test_its_recorded_recipe_trains_the_same_run(data, tmp_path):
    train(recipe(data, steps=1000), tmp_path / "r", callbacks=[Decide(DECISIONS)])
    last = saved_steps(tmp_path / "r")[-1]
    recorded = parse(Recipe, (read_config(last).training or {})["recipe"], "recorded")
    assert recorded.train.steps == 10
    assert [c.model_dump() for c in recorded.optimizer.cooldowns or []] == [
        {"start": 5, "end": 11},
        {"start": 8, "end": 10},
    ]
    (tmp_path / "recorded.yaml").write_text(dump_yaml(recorded))
    assert train(load_recipe(str(tmp_path / "recorded.yaml")), tmp_path / "again").finished
    assert_same(tmp_path / "r", tmp_path / "again")


@pytest.mark.parametrize("stop", [4, 6, 9])
def test_stopped_before_or_during_its_cooldown_it_resumes_to_the_same_bits(data, tmp_path, stop):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = recipe(data, steps=1000)
    train(settings, whole, callbacks=[Decide(DECISIONS)])
    assert not train(settings, stopped, callbacks=[Decide(DECISIONS, stop)]).finished
    later = {step: left for step, left in DECISIONS.items() if step > stop}
    assert train(settings, stopped, callbacks=[Decide(later)]).finished
    a, b = (load_file(saved_steps(each)[-1] / "model.safetensors") for each in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rates(whole) == rates(stopped)


def test_a_planned_cooldown_can_end_earlier(data, tmp_path):
    settings = recipe(data, cooldown_fraction=0.5, cooldown="linear")
    train(settings, tmp_path / "planned")
    train(settings, tmp_path / "cut", callbacks=[Decide({6: 1})])
    planned, cut = rates(tmp_path / "planned"), rates(tmp_path / "cut")
    assert planned[:7] == cut
    assert planned[5:] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_a_cosine_run_cannot_decide_its_end(data, tmp_path):
    with pytest.raises(ConfigError, match=r"only optimizer\.schedule=wsd"):
        train(recipe(data, schedule="cosine"), tmp_path / "r", callbacks=[Decide({5: 2})])
