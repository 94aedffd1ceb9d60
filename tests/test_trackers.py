"""The best checkpoint of a run, and trackers that a recipe asks for."""

import importlib.util
import json

import pytest

from builders import random_ids
from bytelm import load
from bytelm.checkpoint import saved_steps
from bytelm.config import Recipe, load_recipe, parse
from bytelm.data import PrepareOptions, prepare
from bytelm.errors import CheckpointError, ConfigError
from bytelm.layout import find_checkpoint
from bytelm.progress import Callback, StopTraining
from bytelm.storage import read_json
from bytelm.tracking import WandbMetrics, read_jsonl
from bytelm.training import Trainer, train
from bytelm.training.best import BestCheckpoint

MODEL = {"kind": "transformer", "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48}


LETTERS = bytes(32 + n % 90 for n in range(256))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for n in range(20):
        letters = bytes(random_ids(300, seed=n, num_values=30).tolist()).translate(LETTERS)
        (folder / "text" / f"{n}.txt").write_bytes(letters)
    prepare([str(folder / "text")], folder / "d", PrepareOptions(workers=1, validation_share=0.2))
    return str(folder / "d")


def recipe(data, steps=6, track=None, **train_options):
    settings = {
        "model": MODEL,
        "data": {"path": data, "row_bytes": 64, "rows_per_step": 2},
        "optimizer": {"learning_rate": 3e-2, "warmup_steps": 1},
        "train": {
            "steps": steps,
            "log_every": 2,
            "validate_every": 1,
            "checkpoint_every": 2,
            "validation_bytes": 500,
            "keep_checkpoints": 1,
            **train_options,
        },
        "track": track or {},
    }
    return parse(Recipe, settings, "test")


class Made(Callback):
    """Validations of our choosing, in place of those measured."""

    def __init__(self, monkeypatch, bpbs):
        on_metrics = BestCheckpoint.on_metrics

        def replaced(best, step, metrics):
            if "validation_bpb" in metrics:
                metrics = {**metrics, "validation_bpb": float(bpbs[step - 1])}
            on_metrics(best, step, metrics)

        monkeypatch.setattr(BestCheckpoint, "on_metrics", replaced)


@pytest.mark.parametrize(
    ("bpbs", "best"),
    [
        ([9, 5, 9, 4, 9, 6], 4),  # a step between two that are kept
        ([1, 5, 1, 6, 1, 7], 2),  # steps without a checkpoint do not count
        ([9, 5, 9, 5, 9, 5], 2),  # the first of equals
        ([9, 5, 9, 4, 9, 3], 6),
    ],
)
@pytest.mark.parametrize("stop", [None, 3, 4])
def test_the_best_checkpoint_is_kept_and_can_be_named(
    data, tmp_path, monkeypatch, bpbs, best, stop
):
    class Stop(Callback):
        def on_metrics(self, step, metrics):
            if step == stop and "validation_bpb" in metrics:
                raise StopTraining

    bpbs = list(bpbs)
    Made(monkeypatch, bpbs)
    run = tmp_path / "run"
    if stop:
        if stop % 2:
            # The stop saves a checkpoint, which counts as well.
            bpbs[stop - 1] = 9
        assert not train(recipe(data), run, callbacks=[Stop()]).finished
    train(recipe(data), run)
    assert find_checkpoint(run / "best") == run / "checkpoints" / f"step-{best:08d}"
    assert read_json(run / "best.json") == {"step": best, "validation_bpb": bpbs[best - 1]}
    kept = {int(folder.name.removeprefix("step-")) for folder in saved_steps(run)}
    assert kept >= {6, best}
    assert find_checkpoint(run).name == "step-00000006"
    assert load(run / "best").config.training["step"] == best


def test_the_bits_per_byte_recorded_are_those_measured(data, tmp_path):
    train(recipe(data), tmp_path / "run")
    record = read_json(tmp_path / "run" / "best.json")
    measured = {
        line["step"]: line["validation_bpb"]
        for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")
        if "validation_bpb" in line and line["step"] % 2 == 0
    }
    assert record["validation_bpb"] == min(measured.values()) == measured[record["step"]]
    # It can be trained on from.
    (tmp_path / "on.yaml").write_text(
        json.dumps(
            {
                "init": {"from": str(tmp_path / "run" / "best")},
                "data": {"path": data},
                "train": {"steps": 1},
            }
        )
    )
    origin = Trainer(load_recipe(str(tmp_path / "on.yaml"))).setup.origin
    assert origin["step"] == record["step"]


def test_a_run_without_a_best_checkpoint_says_why(data, tmp_path):
    train(recipe(data, steps=3, checkpoint_every=2, validate_every=9), tmp_path / "run")
    (tmp_path / "run" / "best.json").unlink()
    with pytest.raises(CheckpointError, match="both saved and validated"):
        load(tmp_path / "run" / "best")
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nothing" / "best")


@pytest.mark.parametrize(
    ("package", "track"),
    [("wandb", {"wandb": {"project": "p"}}), ("tensorboard", {"tensorboard": True})],
)
def test_a_missing_library_is_reported_before_anything_is_written(
    data, tmp_path, monkeypatch, package, track
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(
        ConfigError, match=rf"track.{package} needs {package}: pip install 'bytelm\["
    ):
        train(recipe(data, track=track), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_can_be_asked_for_under_either_name(data, tmp_path):
    train(recipe(data, steps=1, track={"tensorboard": True}), tmp_path / "a")
    train(recipe(data, steps=1, tensorboard=True), tmp_path / "b")
    for name in "ab":
        assert list((tmp_path / name / "tensorboard").glob("events*"))


def test_wandb_continues_the_same_run_offline(data, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, opened = [], []
    log, init = wandb.Run.log, wandb.init

    def recorded(run, metrics, *args, **kwargs):
        logged.append((run.id, metrics))
        return log(run, metrics, *args, **kwargs)

    def begun(**options):
        opened.append(options)
        return init(**options)

    monkeypatch.setattr(wandb.Run, "log", recorded)
    monkeypatch.setattr(wandb, "init", begun)
    track = {"wandb": {"project": "bytes", "mode": "offline", "name": "mine"}}

    class Stop(Callback):
        def on_checkpoint(self, step, folder):
            raise StopTraining

    run = tmp_path / "run"
    train(recipe(data, steps=4, track=track), run, callbacks=[Stop()])
    # Another name is no other recipe: trackers do not affect the result.
    track["wandb"]["name"] = "ours"
    train(recipe(data, steps=4, track=track), run)
    assert len({run_id for run_id, _ in logged}) == 1
    assert [options["name"] for options in opened] == ["mine", "ours"]
    assert opened[0]["project"] == "bytes"
    assert opened[0]["config"]["train"]["steps"] == 4
    lines = read_jsonl(run / "metrics.jsonl")
    assert [metrics for _, metrics in logged] == lines
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_wandb_run_that_cannot_start_is_explained(tmp_path, monkeypatch):
    import wandb

    def refuse(**options):
        raise wandb.errors.UsageError("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"no API key configured\): log in .*mode=offline"):
        WandbMetrics(tmp_path, {}, project="p")
