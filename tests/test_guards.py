"""Guards against losses that jump or are not finite, profiles, and how well devices are used."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import SPACE_BLT, merged
from bytelm.config import Recipe, TrainConfig, parse
from bytelm.data import PrepareOptions, prepare
from bytelm.errors import ConfigError, TrainingError
from bytelm.training import Trainer, train
from bytelm.training.guards import MEMORY, Guard

losses = st.lists(st.one_of(st.floats(0, 10), st.sampled_from([math.nan, math.inf])), max_size=30)


def first_that_ends(values, max_skipped, max_rise):
    """The definition: what is skipped, and where the run ends."""
    average, skipped, in_row = None, [], 0
    for i, loss in enumerate(values):
        rises = max_rise is not None and average is not None and loss > average + max_rise
        if math.isfinite(loss) and not rises:
            average = loss if average is None else MEMORY * average + (1 - MEMORY) * loss
            in_row = 0
        elif in_row == max_skipped:
            return skipped, i
        else:
            in_row += 1
            skipped.append(i)
    return skipped, None


@given(losses, st.integers(0, 3), st.none() | st.floats(0.5, 3))
def test_updates_are_skipped_as_often_as_the_recipe_allows(values, max_skipped, max_rise):
    config = TrainConfig(steps=1, max_skipped=max_skipped, max_rise=max_rise)
    guard, skipped = Guard(), []
    wanted, end = first_that_ends(values, max_skipped, max_rise)
    for i, loss in enumerate(values):
        if i == end:
            with pytest.raises(TrainingError, match=f"at step {i}"):
                guard.admits(loss, 1.0, i, config)
            break
        if not guard.admits(loss, 1.0, i, config):
            skipped.append(i)
    assert skipped == wanted
    assert guard.skipped == len(skipped)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("some words of a text that repeats them. " * 200)
    prepare([str(folder / "text.txt")], folder / "d", PrepareOptions(validation_share=0.0))

    def recipe(**options):
        values = {"data": {"path": str(folder / "d")}, "train": {"log_every": 1, **options}}
        return parse(Recipe, merged(SPACE_BLT, values), "test")

    return recipe


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def diverge_at(monkeypatch, *steps):
    accumulate = Trainer._accumulate

    def damaged(trainer, stop):
        counts, nats = accumulate(trainer, stop)
        for parameter in trainer.lm.trained.parameters():
            if trainer.num_steps + 1 in steps and parameter.grad is not None:
                parameter.grad.fill_(math.nan)
        return counts, nats._replace(targets=math.nan) if trainer.num_steps + 1 in steps else nats

    monkeypatch.setattr(Trainer, "_accumulate", damaged)


def test_a_step_that_is_not_finite_is_left_out(settings, tmp_path, monkeypatch):
    diverge_at(monkeypatch, 2)
    one = Trainer(settings(steps=4, max_skipped=1))
    one.step()
    before = [p.detach().clone() for p in one.lm.trained.parameters()]
    one.report()
    one.step()
    assert all(map(torch.equal, before, one.lm.trained.parameters()))
    assert (one.num_steps, one.report()["skipped_steps"]) == (2, 1)
    one.step()
    assert not all(map(torch.equal, before, one.lm.trained.parameters()))
    assert all(bool(p.isfinite().all()) for p in one.lm.trained.parameters())
    assert train(settings(steps=4, max_skipped=1), tmp_path / "run").finished
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0, 1, 1, 1]


def test_a_run_that_ended_may_resume_with_a_guard(settings, tmp_path, monkeypatch):
    diverge_at(monkeypatch, 3)
    with pytest.raises(TrainingError, match=r"finite at step 3 .*last good checkpoint is"):
        train(settings(steps=5, checkpoint_every=2), tmp_path / "run")
    assert train(settings(steps=5, checkpoint_every=2, max_skipped=1), tmp_path / "run").finished


def test_steps_are_profiled(settings, tmp_path):
    train(settings(steps=4), tmp_path / "run", profile=(2, 3))
    trace = json.loads((tmp_path / "run/profile/rank-0.json").read_text())
    updates = [one for one in trace["traceEvents"] if "Optimizer.step" in one.get("name", "")]
    assert len(updates) == 2


@pytest.mark.parametrize("steps", ["0", "3-2", "x", "1-", ""])
def test_bad_ranges_of_steps_are_named(steps):
    from bytelm.cli.options import step_range

    with pytest.raises(ConfigError, match="is no range of steps: write 10, or 10-12"):
        step_range(steps)
    assert (step_range("10"), step_range("10-12")) == ((10, 10), (10, 12))


def test_model_flops_utilisation_is_that_of_the_counted_flops(settings, tmp_path):
    one = Trainer(settings(steps=3, peak_flops=1e9))
    one.step()
    seconds, flops = one.interval.seconds, one.flops
    assert one.report()["mfu"] == pytest.approx(flops / seconds / 1e9)
    one.step()
    assert one.report()["mfu"] > 0
    unknown = Trainer(settings(steps=3))
    unknown.step()
    assert "mfu" not in unknown.report()
