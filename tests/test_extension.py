"""Runs that are given more steps after they were begun, or have finished."""

import json
import shutil
from io import StringIO
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from builders import merged
from bytelm.config import OptimizerConfig, Recipe, load_recipe, parse
from bytelm.data import PrepareOptions, prepare
from bytelm.display import TrainingBar
from bytelm.errors import ConfigError
from bytelm.layout import best_step, find_checkpoint, saved_steps, step_number
from bytelm.progress import BeginCooldown, Callback, StopTraining
from bytelm.training import extension, learning_rate, train
from bytelm.training.optim import last_shared_step
from bytelm.training.run import Run

CONSTANT = {"schedule": "cosine", "final_ratio": 1.0}


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


def recipe(data, steps=10, train=None, **optimizer):
    """A wsd run whose cooldown takes 40% of its steps."""
    settings = {
        "model": {"kind": "transformer", "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16},
        "data": {"path": data, "row_bytes": 64, "rows_per_step": 2},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "train": {"steps": steps, "log_every": 1, "validate_every": 2, "checkpoint_every": 2,
                  "validation_bytes": 500, "keep_checkpoints": 2},
    }  # fmt: skip
    wsd = {"schedule": "wsd", "cooldown_fraction": 0.4}
    settings = merged(settings, {"optimizer": optimizer or wsd, "train": train or {}})
    return parse(Recipe, settings, "test")


@pytest.fixture(scope="module")
def wsd(data, tmp_path_factory):
    """Runs of 10 and of 20 steps."""
    folder = tmp_path_factory.mktemp("wsd")
    for steps in (10, 20):
        train(recipe(data, steps), folder / str(steps))
    return folder


def steps_of(run):
    return [step_number(one) for one in saved_steps(run)]


def lines(run):
    """All metrics but those of time."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "bytes_per_second"} for line in found]


def assert_same_end(run, other):
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(saved_steps(one)[-1] / name) for one in (run, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    states = [
        json.loads((saved_steps(one)[-1] / "trainer.json").read_text()) for one in (run, other)
    ]
    assert states[0]["data"] == states[1]["data"]


def copy(wsd, tmp_path):
    shutil.copytree(wsd / "10", tmp_path / "r")
    return tmp_path / "r"


def contents(folder):
    """All files by path, except locks."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@given(
    st.builds(
        OptimizerConfig,
        schedule=st.sampled_from(["wsd", "cosine"]),
        warmup_steps=st.integers(0, 5),
        final_ratio=st.floats(0, 1),
    ),
    st.integers(2, 40),
    st.integers(1, 40),
)
def test_rates_up_to_the_last_shared_step_are_those_of_every_longer_run(config, steps, more):
    shared = last_shared_step(steps, config)
    if config.schedule == "cosine":
        assert shared is None
        return
    short, long = (
        [learning_rate(step, total, config) for step in range(steps)]
        for total in (steps, steps + more)
    )
    assert short[:shared] == long[:shared]


def test_the_newest_checkpoint_before_the_cooldown_is_kept(wsd):
    # The cooldown of 10 steps begins after 6, that of 20 after 12.
    assert steps_of(wsd / "10") == [6, 8, 10]
    assert steps_of(wsd / "20") == [12, 18, 20]


def test_a_run_is_saved_before_its_cooldown_whenever_that_is(data, tmp_path):
    train(recipe(data, train={"checkpoint_every": 100}), tmp_path / "r")
    assert steps_of(tmp_path / "r") == [6, 10]


def test_an_extended_run_is_one_that_had_all_steps_from_the_start(data, wsd, tmp_path):
    run = copy(wsd, tmp_path)
    before = contents(run)
    result = train(recipe(data, 20), run)
    assert (result.step, result.finished) == (20, True)
    assert steps_of(run) == steps_of(wsd / "20")
    assert_same_end(run, wsd / "20")
    assert lines(run) == lines(wsd / "20")
    assert (run / "recipe.yaml").read_text() == (wsd / "20" / "recipe.yaml").read_text()
    # What it had after the step that it was extended from is a run of its own.
    old = run / "superseded" / "10-steps"
    assert steps_of(old) == [8, 10]
    assert find_checkpoint(old).name == "step-00000010"
    for name in ("recipe.yaml", "metrics.jsonl"):
        assert (old / name).read_bytes() == before[name]
    for name, data_before in before.items():
        if name.startswith(("checkpoints/step-00000008", "checkpoints/step-00000010")):
            assert (old / name).read_bytes() == data_before


def test_a_constant_learning_rate_extends_from_the_last_step(data, tmp_path):
    run = tmp_path / "r"
    train(recipe(data, 5, **CONSTANT), run)
    train(recipe(data, 9, **CONSTANT), tmp_path / "whole")
    assert train(recipe(data, 9, **CONSTANT), run).step == 9
    assert_same_end(run, tmp_path / "whole")
    assert not (run / "superseded").exists()
    # The last step of the shorter run was validated; everything else is the same.
    extra = [line for line in lines(run) if line not in lines(tmp_path / "whole")]
    assert [line["step"] for line in extra] == [5]


def test_a_run_can_be_extended_again_and_its_cooldown_made_shorter(data, wsd, tmp_path):
    run = copy(wsd, tmp_path)
    settings = {"schedule": "wsd", "cooldown_fraction": 0.25}
    train(recipe(data, 16, **settings), run)
    train(recipe(data, 20, **settings), run)
    train(recipe(data, 20, **settings), tmp_path / "whole")
    assert_same_end(run, tmp_path / "whole")
    assert sorted(p.name for p in (run / "superseded").iterdir()) == ["10-steps", "16-steps"]


def test_a_stopped_run_can_be_extended(data, wsd, tmp_path):
    class Stop(Callback):
        def on_metrics(self, step, metrics):
            if step == 5:
                raise StopTraining

    assert not train(recipe(data), tmp_path / "r", callbacks=[Stop()]).finished
    train(recipe(data, 20), tmp_path / "r")
    assert_same_end(tmp_path / "r", wsd / "20")
    assert not (tmp_path / "r" / "superseded").exists()


def test_a_run_whose_end_was_decided_is_extended_from_before_the_decision(data, tmp_path):
    class Decide(Callback):
        def on_metrics(self, step, metrics):
            if step == 4 and "loss" in metrics:
                raise BeginCooldown(4)

    train(recipe(data, 1000), tmp_path / "r", callbacks=[Decide()])
    assert steps_of(tmp_path / "r") == [2, 6, 8]
    train(recipe(data, 12), tmp_path / "r")
    train(recipe(data, 12), tmp_path / "whole")
    assert_same_end(tmp_path / "r", tmp_path / "whole")


@pytest.mark.parametrize("final_ratio", [0.0, 0.5])
def test_a_decayed_run_is_refused_and_left_as_it_is(data, tmp_path, final_ratio):
    run, schedule = tmp_path / "r", {"schedule": "cosine", "final_ratio": final_ratio}
    train(recipe(data, **schedule), run)
    before = contents(run)
    with pytest.raises(ConfigError) as error:
        train(recipe(data, 20, **schedule), run)
    assert "run of 10 steps that cannot be extended to 20" in str(error.value)
    assert "schedule=cosine" in str(error.value)
    assert f"init.from={run}" in str(error.value)
    assert contents(run) == before


def test_a_run_without_a_checkpoint_before_its_cooldown_is_refused(data, wsd, tmp_path):
    run = copy(wsd, tmp_path)
    shutil.rmtree(saved_steps(run)[0])
    with pytest.raises(ConfigError, match=r"after step 7, and its oldest checkpoint is of step 8"):
        train(recipe(data, 20), run)


def test_other_changes_and_fewer_steps_are_another_recipe(data, wsd, tmp_path):
    run = copy(wsd, tmp_path)
    before = contents(run)
    for other in (recipe(data, 8), recipe(data, 20, schedule="wsd", learning_rate=1.0)):
        with pytest.raises(ConfigError, match="holds a run of another recipe"):
            train(other, run)
    assert contents(run) == before


def test_the_best_checkpoint_is_one_that_remains(data, wsd, tmp_path):
    run = copy(wsd, tmp_path)
    best = [line for line in lines(run) if "validation_bpb" in line]
    assert best_step(run) == saved_steps(run)[-1]
    extension.extend(recipe(data, 20), run, saved_steps(run)[0])
    assert steps_of(run) == [6]
    expected = next(line["validation_bpb"] for line in best if line["step"] == 6)
    assert json.loads((run / "best.json").read_text()) == {"step": 6, "validation_bpb": expected}
    assert best_step(run / "superseded" / "10-steps").name == "step-00000010"


class Killed(BaseException):
    pass


WRITES = ("write_bytes", "write_json", "write_text", "move_folder")


@pytest.mark.parametrize("then", ["extend", "resume"])
@pytest.mark.parametrize("moment", range(8))
def test_a_kill_while_extending_loses_nothing(data, wsd, tmp_path, monkeypatch, moment, then):
    """Three copies, two moves, the best checkpoint and the recipe: seven moments, and training."""
    run, done = copy(wsd, tmp_path), []
    before = contents(run)

    def dying(name, original=extension):
        write = getattr(original, name)

        def call(*args):
            if len(done) == moment:
                raise Killed
            done.append(name)
            write(*args)

        return call

    for name in WRITES:
        monkeypatch.setattr(extension, name, dying(name))
    if moment == 7:
        monkeypatch.setattr(Run, "step", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(recipe(data, 20), run)
    monkeypatch.undo()
    assert len(done) == moment
    after = contents(run)
    for name, value in before.items():
        places = (name, f"superseded/10-steps/{name}")
        assert any(after.get(place) == value for place in places), name
    if then == "resume" and moment < 7:
        assert train(recipe(data), run).finished
        assert_same_end(run, wsd / "10")
    assert train(recipe(data, 20), run).finished
    assert_same_end(run, wsd / "20")
    assert lines(run) == lines(wsd / "20")
    everything = {(p.name, value) for p, value in _files(run)}
    for name, value in before.items():
        if name.startswith(("checkpoints/step-00000008", "checkpoints/step-00000010")):
            assert (name.rpartition("/")[2], value) in everything


def _files(folder):
    return [(p, p.read_bytes()) for p in folder.rglob("*") if p.is_file()]


def test_the_command_line_says_what_happens(data, wsd, tmp_path):
    run, output = copy(wsd, tmp_path), StringIO()
    bar = TrainingBar(Console(file=output), "r")
    settings = load_recipe(str(run / "recipe.yaml"), ["train.steps=12"])
    train(settings, run, callbacks=[bar])
    assert (
        "extended from the checkpoint of step 6: later ones, and the metrics so far, are in "
        in (output.getvalue())
    )
    assert str(run / "superseded" / "10-steps") in output.getvalue()


def test_rates_of_an_extended_run_have_no_break(data, wsd, tmp_path):
    run = copy(wsd, tmp_path)
    train(recipe(data, 20), run)
    rates = [line["learning_rate"] for line in lines(run) if "learning_rate" in line]
    assert rates[2:13] == [0.01] * 11
    assert all(a > b for a, b in pairwise(rates[12:]))
