import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from builders import (
    BASE_BLT,
    BLT_VARIANTS,
    NGRAMS,
    LearnedRule,
    random_blt,
    random_byte_lm,
    random_ids,
    random_transformer,
)
from bytelm import codec, load, stopping
from bytelm.accounting import Part, register_parts
from bytelm.checkpoint import load_model, save_model, saved_steps
from bytelm.config import (
    MODELS,
    RULES,
    BLTConfig,
    CombinedPatching,
    InitConfig,
    Kinds,
    ModelConfig,
    ModelDescription,
    MonotonicPatching,
    NgramRecipe,
    Node,
    OptimizerConfig,
    PatchingConfig,
    Recipe,
    RopeScaling,
    StaticPatching,
    TrackConfig,
    TrainConfig,
    TransformerConfig,
    dump_yaml,
    parse,
)
from bytelm.config.reading import _held_in
from bytelm.data import PrepareOptions, prepare
from bytelm.display import TrainingBar
from bytelm.errors import CheckpointError, ConfigError, DataError, PatchingError, TrainingError
from bytelm.lm import CausalLM, register_model
from bytelm.patching import register_rule
from bytelm.progress import Callback, StopTraining
from bytelm.stopping import Stopped
from bytelm.storage import locked
from bytelm.tracking import JsonlMetrics
from bytelm.training import (
    Trainer,
    build_optimizer,
    fit_ngrams,
    learning_rate,
    objective,
    run,
    saving,
    setup,
    state,
    train,
    trainer,
)
from bytelm.units import ByteUnits, PatchUnits

SMALL = {"kind": "transformer", "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48}
WORDS = ["the", "patch", "of", "bytes", "is", "cut", "where", "entropy", "rises", "\n"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scored data of made-up sentences, most words of which are predictable from their start."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"text": " ".join(rng.choice(WORDS, rng.integers(5, 60)))}) for _ in range(300)
    ]
    (folder / "x.jsonl").write_text("\n".join(lines))
    scorer = TransformerConfig(**{**SMALL, "window": 6})
    save_model(
        folder / "scorer",
        random_byte_lm(num_layers=1, window=6),
        ModelDescription(model=scorer),
    )
    options = PrepareOptions(scorer=folder / "scorer", workers=1, validation_share=0.1)
    prepare([str(folder / "x.jsonl")], folder / "d", options)
    return str(folder / "d")


def recipe(data, kind="blt", **train_options):
    settings = {
        "data": {"path": data, "row_bytes": 96, "rows_per_step": 4},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {
            "steps": 9,
            "log_every": 2,
            "validate_every": 4,
            "checkpoint_every": 3,
            "validation_bytes": 2000,
            "keep_checkpoints": 9,
            **train_options,
        },
    }
    if kind == "blt":
        settings["model"] = {"kind": "blt", **BASE_BLT}
        settings["patching"] = {"kind": "entropy", "patch_size": 3.0}
    else:
        settings["model"] = {**SMALL, "window": 16}
    return parse(Recipe, settings, "test")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Runs that nothing interrupted, each made once: the folder and the result."""

    @functools.cache
    def trained(kind="blt", **train_options):
        folder = tmp_path_factory.mktemp("whole") / "r"
        return folder, train(recipe(data, kind, **train_options), folder)

    return trained


def changed(settings: Recipe, section: str, **values) -> Recipe:
    node = getattr(settings, section).model_copy(update=values)
    return settings.model_copy(update={section: node})


def metrics(run):
    """Metrics of a run without those that measure time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "bytes_per_second"} for line in lines]


def assert_same_bits(run, other):
    assert metrics(run) == metrics(other)
    for mine, theirs in zip(saved_steps(run), saved_steps(other), strict=True):
        for name in ("model.safetensors", "optimizer.safetensors"):
            a, b = load_file(mine / name), load_file(theirs / name)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a), (mine, name)
        mine_state, other_state = (state_of(folder) for folder in (mine, theirs))
        assert mine_state == other_state


def state_of(checkpoint):
    """Everything in a checkpoint's state but how long things took."""
    state = json.loads((checkpoint / "trainer.json").read_text())
    state["interval"].pop("seconds")
    state.pop("metrics_bytes")
    return state


class StopAt(Exception):
    """Raised in place of a kill."""


@pytest.mark.parametrize("kind", ["blt", "transformer"])
@pytest.mark.parametrize("stop", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 8))])
def test_a_killed_run_resumes_to_the_same_bits(data, whole, tmp_path, monkeypatch, kind, stop):
    """Killed after any step, it goes on from the last checkpoint as if nothing had happened."""
    settings, (expected, _) = recipe(data, kind), whole(kind)
    step = Trainer.step

    def kill(self, *args):
        if self.num_steps == stop:
            raise StopAt
        step(self, *args)

    monkeypatch.setattr(Trainer, "step", kill)
    with pytest.raises(StopAt):
        train(settings, tmp_path / "killed")
    monkeypatch.setattr(Trainer, "step", step)
    result = train(settings, tmp_path / "killed")
    assert result.finished
    assert_same_bits(expected, tmp_path / "killed")


# The functions that a step, a validation, an update of the parameters and a checkpoint call.
GRADIENTS, VALIDATION = (trainer, "position_nats"), (objective, "position_nats")
UPDATE, CHECKPOINT = (torch.optim.AdamW, "step"), (saving, "save_step")


@pytest.mark.parametrize(
    ("where", "calls", "saved"),
    [
        (GRADIENTS, 2 * 7 + 2, 7),
        (VALIDATION, 4, 8),
        (UPDATE, 6, 6),
        (CHECKPOINT, 1, 3),
        pytest.param(GRADIENTS, 1, 0, marks=pytest.mark.slow),
        pytest.param(VALIDATION, 1, 4, marks=pytest.mark.slow),
        pytest.param(VALIDATION, 5, 9, marks=pytest.mark.slow),
        pytest.param(UPDATE, 2, 2, marks=pytest.mark.slow),
        pytest.param(UPDATE, 9, 9, marks=pytest.mark.slow),
        pytest.param(CHECKPOINT, 3, 9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_anywhere_leaves_a_run_that_resumes_to_the_same_bits(
    data, whole, tmp_path, monkeypatch, where, calls, saved
):
    """Gradients and validations are abandoned, updates and checkpoints completed."""
    options = {"micro_rows": 2, "validation_bytes": 1000}
    settings, (expected, _) = recipe(data, **options), whole(**options)
    original, count = getattr(*where), 0

    def interrupted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            signal.raise_signal(signal.SIGTERM)
            assert where in (UPDATE, CHECKPOINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(*where, interrupted)
    result = train(settings, tmp_path / "stopped")
    monkeypatch.undo()
    assert (result.step, result.finished, result.validation) == (saved, False, {})
    assert saved_steps(tmp_path / "stopped")[-1].name == f"step-{saved:08d}"
    result = train(settings, tmp_path / "stopped")
    assert result.finished
    assert result.validation
    assert metrics(tmp_path / "stopped") == metrics(expected)
    a, b = (saved_steps(run)[-1] for run in (expected, tmp_path / "stopped"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_a_second_signal_quits_at_once_and_loses_only_the_last_steps(
    data, whole, tmp_path, monkeypatch
):
    settings = recipe(data, "transformer")
    save = saving.save_step

    def interrupted(*args):
        if args[3].step == 6:
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(stopping, "SAME_SECONDS", -1.0)
            signal.raise_signal(signal.SIGINT)
        save(*args)

    monkeypatch.setattr(saving, "save_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "stopped")
    monkeypatch.undo()
    assert [path.name for path in saved_steps(tmp_path / "stopped")] == ["step-00000003"]
    train(settings, tmp_path / "stopped")
    assert_same_bits(tmp_path / "stopped", whole("transformer")[0])


def test_a_signal_before_the_first_step_leaves_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Trainer", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped):
        train(recipe(data), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_time_limit_does_not_wait_for_a_huge_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "OVERTIME", 0.01)

    def huge(*args):
        until = time.monotonic() + 3600
        while time.monotonic() < until:
            sum(range(1000))

    monkeypatch.setattr(*GRADIENTS, huge)
    # Long enough to set up the run, on a busy machine too.
    result = train(recipe(data, "transformer"), tmp_path / "r", time_limit=4.0)
    assert (result.step, result.finished) == (0, False)
    assert saved_steps(tmp_path / "r")


def test_a_validation_is_not_repeated_for_checkpoints_of_earlier_versions(data, tmp_path):
    """They were saved after their validation, and their metrics have it."""
    settings = recipe(data, steps=4, checkpoint_every=2)
    train(settings, tmp_path / "r")
    before = metrics(tmp_path / "r")
    path = saved_steps(tmp_path / "r")[-1] / "trainer.json"
    state = json.loads(path.read_text())
    assert state.pop("is_validation_due")
    size = (tmp_path / "r" / "metrics.jsonl").stat().st_size
    assert state["metrics_bytes"] < size
    path.write_text(json.dumps({**state, "metrics_bytes": size}))
    record = path.parent / "files.json"
    files = json.loads(record.read_text())
    contents = path.read_bytes()
    sha = hashlib.sha256(contents).hexdigest()
    record.write_text(
        json.dumps({**files, "trainer.json": {"bytes": len(contents), "sha256": sha}})
    )
    result = train(settings, tmp_path / "r")
    assert result.finished
    assert result.validation
    assert metrics(tmp_path / "r") == before


@pytest.fixture
def patient(monkeypatch):
    """The step in progress at a time limit is completed, however slow the machine is."""
    monkeypatch.setattr(stopping, "OVERTIME", 3600.0)


def test_a_time_limit_stops_with_a_checkpoint_and_the_same_command_goes_on(
    data, whole, tmp_path, patient
):
    settings = recipe(data, "transformer")
    stops = 0
    while not (result := train(settings, tmp_path / "sliced", time_limit=0.0)).finished:
        stops += 1
        assert saved_steps(tmp_path / "sliced")[-1].name == f"step-{result.step:08d}"
    assert stops == 8
    last = [saved_steps(run)[-1] for run in (whole("transformer")[0], tmp_path / "sliced")]
    a, b = (load_file(folder / "model.safetensors") for folder in last)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["blt", "transformer"])
@pytest.mark.parametrize(
    "micro_rows",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
)
def test_accumulating_micro_batches_equals_one_large_batch(whole, kind, micro_rows):
    large, _ = whole(kind, steps=4)
    small, _ = whole(kind, steps=4, micro_rows=micro_rows)
    a, b = (load_model(run)[0].state_dict() for run in (large, small))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=5e-5)
    for one, other in zip(metrics(large), metrics(small), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("kind", ["blt", "transformer"])
def test_a_model_learns(data, tmp_path, kind):
    settings = recipe(data, kind, steps=40, validate_every=40, checkpoint_every=40)
    settings = changed(settings, "optimizer", learning_rate=1e-2)
    result = train(settings, tmp_path / "r")
    first, *_, last = [m["bpb"] for m in metrics(tmp_path / "r") if "bpb" in m]
    held_out = result.validation["x"].bits_per_byte
    assert last < 0.7 * first
    assert abs(held_out - last) < 0.7


def test_what_a_run_reports(whole):
    folder, result = whole()
    rows = metrics(folder)
    assert [r["step"] for r in rows if "bpb" in r] == [2, 4, 6, 8, 9]
    assert [r["step"] for r in rows if "validation_bpb" in r] == [4, 8, 9]
    trained = [r for r in rows if "bpb" in r]
    assert all(2.5 < r["patch_size"] < 3.5 for r in trained)
    assert all(0 <= r[k] < 0.5 for r in trained for k in ("padded_bytes", "padded_patches"))
    assert result.flops == trained[-1]["flops"] > 0
    assert 0 < result.bytes_seen <= 9 * 4 * 96
    assert rows[-1]["validation_bpb"] == pytest.approx(result.validation["x"].bits_per_byte)
    _, config = load_model(folder)
    assert config.patching is not None
    assert config.context_bytes == 96
    assert config.training is not None
    assert config.training["step"] == 9


def test_the_newest_checkpoints_are_kept(data, tmp_path):
    train(recipe(data, keep_checkpoints=2), tmp_path / "r")
    assert [p.name for p in saved_steps(tmp_path / "r")] == ["step-00000006", "step-00000009"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    data, tmp_path, monkeypatch
):
    nats = trainer.position_nats

    def poisoned(lm, batch):
        poisoned.calls += 1
        return nats(lm, batch) * (math.nan if poisoned.calls == 5 else 1.0)

    poisoned.calls = 0
    monkeypatch.setattr(trainer, "position_nats", poisoned)
    with pytest.raises(TrainingError, match=r"step 5 \(loss nan, .* nan\); the last good") as e:
        train(recipe(data), tmp_path / "r")
    assert "step-00000003" in str(e.value)
    assert "optimizer.learning_rate" in str(e.value)
    model, _ = load_model(tmp_path / "r")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_full_disk_during_a_save_keeps_the_last_good_checkpoint(
    data, whole, tmp_path, monkeypatch
):
    save = saving.save_tensors

    def full(path, tensors):
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        save(path, tensors)

    expected, result = whole()
    monkeypatch.setattr(saving, "save_tensors", full)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was changed"):
        train(recipe(data), tmp_path / "r")
    assert [p.name for p in saved_steps(tmp_path / "r")] == ["step-00000003"]
    assert os.listdir(tmp_path / "r" / "checkpoints") == ["step-00000003"]
    monkeypatch.setattr(saving, "save_tensors", save)
    assert train(recipe(data), tmp_path / "r") == result
    assert_same_bits(expected, tmp_path / "r")


def test_damaged_checkpoints_are_set_aside_and_the_one_before_them_resumes(
    data, whole, tmp_path, capsys
):
    settings, (expected, _) = recipe(data, "transformer"), whole("transformer")
    shutil.copytree(expected, tmp_path / "r")
    saved = saved_steps(tmp_path / "r")
    for one, name in ((saved[-1], "trainer.json"), (saved[-2], "optimizer.safetensors")):
        path = one / name
        path.write_bytes(path.read_bytes()[:-5])
    assert state.recorded_threads(tmp_path / "r") == torch.get_num_threads()
    bar = TrainingBar(Console(), "r")
    assert train(settings, tmp_path / "r", callbacks=[bar]).finished
    said = capsys.readouterr().out.splitlines()[:2]
    for line, one, name in zip(said, saved[:-3:-1], ("trainer", "optimizer"), strict=True):
        assert re.search(f"{one.name}/{name}.* is damaged.*: resuming from", line)
        assert line.endswith(f"{one}.damaged")
        assert one.with_name(f"{one.name}.damaged").is_dir()
    assert_same_bits(expected, tmp_path / "r")


def test_a_run_without_a_whole_checkpoint_is_refused(data, tmp_path):
    train(recipe(data, "transformer", steps=6), tmp_path / "r")
    for one in saved_steps(tmp_path / "r"):
        (one / "trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-00000006/trainer.json is damaged.*no other"):
        train(recipe(data, "transformer", steps=6), tmp_path / "r")


def test_another_recipe_is_refused_and_harmless_changes_are_not(data, tmp_path):
    train(recipe(data, steps=3), tmp_path / "r")
    other = changed(recipe(data, steps=3), "optimizer", learning_rate=1e-4)
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate: 0\.003 -> 0\.0001"):
        train(other, tmp_path / "r")
    assert train(recipe(data, steps=3, log_every=1), tmp_path / "r").finished


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        train(recipe(data), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_other_data_is_refused_on_resuming(data, tmp_path):
    train(recipe(data, steps=3), tmp_path / "r")
    (tmp_path / "y.txt").write_text("other text " * 50)
    prepare([str(tmp_path / "y.txt")], tmp_path / "d", PrepareOptions(validation_share=0.0))
    with pytest.raises(DataError, match="has no entropies"):
        train(recipe(str(tmp_path / "d"), steps=3), tmp_path / "r")
    run = tmp_path / "t"
    train(recipe(data, "transformer", steps=3), run)
    with pytest.raises(ConfigError, match="was trained on other data"):
        train(recipe(str(tmp_path / "d"), "transformer", steps=3), run)


def test_bad_recipes_are_named(data, tmp_path):
    no_path = changed(recipe(data), "data", path=None)
    with pytest.raises(ConfigError, match=r"add data\.path=FOLDER"):
        train(no_path, tmp_path / "a")
    too_large = changed(recipe(data), "patching", patch_size=900.0)
    with pytest.raises(PatchingError, match=r"patch size of 900 cannot be reached.*gives 1\.00 to"):
        train(too_large, tmp_path / "b")
    no_threshold = changed(recipe(data), "patching", patch_size=None)
    with pytest.raises(PatchingError, match="has no threshold"):
        train(no_threshold, tmp_path / "c")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device is available"):
            train(recipe(data, device="cuda"), tmp_path / "d")


def test_a_recipe_of_tokens_needs_a_tokenizer(data, tmp_path):
    tokens = changed(recipe(data, "byte"), "model", vocab_size=4096, window=None)
    with pytest.raises(ConfigError, match=r"is 4096.* add data\.tokenizer=FILE, made by"):
        train(tokens, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_data_without_entropies_hints_at_a_rule_that_needs_none(data, tmp_path):
    (tmp_path / "x.txt").write_text("some text\n" * 100)
    prepare([str(tmp_path / "x.txt")], tmp_path / "d", PrepareOptions(validation_share=0.0))
    with pytest.raises(DataError, match=r"has no entropies.* 'patching=\{kind: space\}'"):
        train(changed(recipe(data), "data", path=str(tmp_path / "d")), tmp_path / "r")


def test_a_recipe_that_cannot_be_used_does_not_keep_the_folder(data, tmp_path):
    with pytest.raises(PatchingError):
        train(changed(recipe(data, steps=3), "patching", patch_size=900.0), tmp_path / "r")
    assert train(recipe(data, steps=3), tmp_path / "r").finished
    # Nor does one that was killed before its first checkpoint, or while it was being written.
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "recipe.yaml").touch()
    assert train(recipe(data, steps=3), tmp_path / "s").finished


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_weights_that_are_not_finite_are_never_saved(data, tmp_path, checkpoint_every):
    """The update can overflow although the loss and its gradient were fine."""
    settings = recipe(data, steps=3, checkpoint_every=checkpoint_every, validate_every=100)
    settings = changed(settings, "optimizer", learning_rate=3e38, warmup_steps=0)
    with pytest.raises(TrainingError, match=r"no longer finite at step.*none was saved yet"):
        train(settings, tmp_path / "r")
    assert saved_steps(tmp_path / "r") == []


def test_two_processes_cannot_train_in_one_folder(data, tmp_path):
    with locked(tmp_path / "r"), pytest.raises(ConfigError, match="another process is writing to"):
        train(recipe(data, steps=3), tmp_path / "r")
    assert train(recipe(data, steps=3), tmp_path / "r").finished


def test_runs_without_held_out_text_train_all_the_same(tmp_path):
    (tmp_path / "y.txt").write_text("some text " * 100)
    prepare([str(tmp_path / "y.txt")], tmp_path / "d", PrepareOptions(validation_share=0.0))
    result = train(recipe(str(tmp_path / "d"), "transformer", steps=2), tmp_path / "r")
    assert result.finished
    assert result.validation == {}


def test_learning_rate_warms_up_and_decays_to_its_end():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_ratio=0.1)
    rates = [learning_rate(s, 20, config) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[3:]))


def test_tables_and_norms_are_not_decayed():
    model = random_blt()
    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.5)).param_groups
    decayed, others = sorted(groups, key=lambda group: -group["weight_decay"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.5
    assert others["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or "embedding" in names[id(p)] for p in others["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_parts_learn_at_rates_of_their_own():
    model = random_blt()
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {"embeddings": 3.0, "global": 0.1, "output": 2.0}
    groups = build_optimizer(model, OptimizerConfig(lr_multipliers=rates)).param_groups
    found = {names[id(p)]: group["lr_multiplier"] for group in groups for p in group["params"]}
    assert len(found) == len(names)
    for name, rate in found.items():
        special = {"global_model": 0.1, "decoder.output": 2.0}
        wanted = [value for part, value in special.items() if name.startswith(f"{part}.")]
        assert rate == (3.0 if "embedding" in name else wanted[0] if wanted else 1.0), name
    assert sorted(set(found.values())) == [0.1, 1.0, 2.0, 3.0]
    model = random_transformer(hash_embeddings=NGRAMS)
    groups = build_optimizer(model, OptimizerConfig(lr_multipliers=rates)).param_groups
    tables = {id(model.embedding.ids.weight), id(model.embedding.ngrams.weight)}
    for group in groups:
        assert group["lr_multiplier"] in (1.0, 2.0, 3.0)
        for parameter in group["params"]:
            assert (group["lr_multiplier"] == 3.0) == (id(parameter) in tables)


def test_the_rate_of_a_part_scales_its_steps(data):
    """A rate so small that nothing moves leaves a part as it was, and the others move."""
    settings = changed(recipe(data), "optimizer", lr_multipliers={"global": 1e-12})
    one = Trainer(settings)
    before = {n: p.detach().clone() for n, p in one.lm.trained.named_parameters()}
    # What a branch adds begins at 0, and so do gradients before it.
    for _ in range(3):
        one.step()
    for name, parameter in one.lm.trained.named_parameters():
        moved = float((parameter.detach() - before[name]).abs().max())
        assert (moved < 1e-9) == name.startswith("global_model."), name


def test_rates_of_parts_that_are_not_there_are_refused(data):
    with pytest.raises(ConfigError, match="of a transformer model it can name embeddings, "):
        parse(
            Recipe,
            {
                **recipe(data, "transformer").model_dump(mode="json"),
                "optimizer": {"lr_multipliers": {"global": 0.1}},
            },
            "test",
        )


def test_an_ngram_scorer_is_fitted_and_saved(data, tmp_path):
    settings = parse(NgramRecipe, {"model": {"kind": "ngram"}, "data": {"path": data}}, "test")
    scorer = fit_ngrams(settings, tmp_path / "t")
    ids = random_ids(30)[None]
    loaded = load_model(tmp_path / "t")[0].get_scorer()
    assert torch.equal(loaded.entropies(ids), scorer.entropies(ids))
    assert len(scorer.keys) > 50
    again = fit_ngrams(settings, tmp_path / "t")
    assert torch.equal(again.values, scorer.values)
    with pytest.raises(CheckpointError, match="exists"):
        fit_ngrams(settings.model_copy(update={"seed": 3}), tmp_path / "t")


@pytest.mark.slow
def test_every_setting_is_read_by_something(data, tmp_path, monkeypatch):
    """A setting that nothing reads would silently do nothing."""
    read = set()

    def owner(node, name):
        """The first class to have the field."""
        bases = [base for base in node.__mro__ if name in getattr(base, "model_fields", {})]
        return bases[-1]

    def watched(node, name, original=Node.__getattribute__):
        if name in type(node).model_fields:
            read.add((owner(type(node), name), name))
        return original(node, name)

    monkeypatch.setattr(Node, "__getattribute__", watched)
    train(recipe(data, steps=4), tmp_path / "blt")
    train(recipe(data, "transformer", steps=1), tmp_path / "transformer")
    init = parse(InitConfig, {"from": str(tmp_path / "blt")}, "test")
    Trainer(recipe(data).model_copy(update={"init": init}))
    track = parse(TrackConfig, {"wandb": {"project": "p", "mode": "disabled"}}, "test")
    tracked = recipe(data, "transformer", steps=1).model_copy(update={"track": track})
    train(tracked, tmp_path / "tracked")
    scaled = TransformerConfig(**{**SMALL, "rope_scaling": RopeScaling(kind="llama3", factor=2.0)})
    Trainer(recipe(data, "transformer").model_copy(update={"model": scaled})).step()
    pieces = {"kind": "blt", **BASE_BLT, **BLT_VARIANTS["vocabulary"]}
    model = parse(BLTConfig, pieces, "test")
    Trainer(recipe(data).model_copy(update={"model": model}))
    Trainer(changed(recipe(data), "optimizer", schedule="wsd")).step()
    table = {"model": {"kind": "ngram"}, "data": {"path": data}}
    fit_ngrams(parse(NgramRecipe, table, "test"), tmp_path / "table")
    for rule in (StaticPatching(length=3), MonotonicPatching(increase=0.001),
                 CombinedPatching(increase=0.001, threshold=1.0)):  # fmt: skip
        settings = recipe(data, steps=1).model_copy(update={"patching": rule})
        Trainer(settings)
    Trainer(settings.model_copy(update={"patching": MonotonicPatching(patch_size=2.0)}))

    def settings_of(node, seen):
        for name, field in node.model_fields.items():
            if name != "kind":
                yield node, name
            for child in _held_in(field.annotation, *field.metadata):
                if isinstance(child, type) and child not in seen:
                    seen.add(child)
                    yield from settings_of(child, seen)

    every = {*settings_of(Recipe, set()), *settings_of(NgramRecipe, set())}
    # Kinds that other tests have registered are not ours to read.
    ours = {(owner(node, name), name) for node, name in every if "bytelm" in node.__module__}
    # Several ranks read these: tests/test_distributed.py.
    shared = {(TrainConfig, "shard_ranks"), (TrainConfig, "reshard")}
    assert ours - read == shared


# Callbacks --------------------------------------------------------------------------------------


class Recorder(Callback):
    """Keeps what it is told."""

    def __init__(self, stop_at=None):
        self.told, self.stop_at = [], stop_at

    def on_begin(self, step, steps):
        self.told.append(("begin", step, steps))

    def on_metrics(self, step, metrics):
        self.told.append(("validation" if "validation_bpb" in metrics else "report", step))
        if step == self.stop_at:
            raise StopTraining

    def on_checkpoint(self, step, folder):
        assert load_model(folder)
        self.told.append(("checkpoint", step))

    def on_end(self):
        self.told.append(("end",))


def test_callbacks_are_told_what_happens_in_order(data, tmp_path):
    one, other = Recorder(), Recorder()
    train(recipe(data, steps=5), tmp_path / "r", callbacks=[one, other])
    assert one.told == other.told
    assert one.told == [
        ("begin", 0, 5),
        ("report", 2),
        ("checkpoint", 3),
        ("report", 4),
        ("validation", 4),
        ("report", 5),
        ("checkpoint", 5),
        ("validation", 5),
        ("end",),
    ]


def test_a_callback_can_stop_a_run_that_resumes_to_the_same_bits(data, whole, tmp_path):
    stopping = Recorder(stop_at=4)
    result = train(recipe(data), tmp_path / "stopped", callbacks=[stopping])
    assert (result.step, result.finished) == (4, False)
    assert stopping.told[-2:] == [("checkpoint", 4), ("end",)]
    resumed = Recorder()
    assert train(recipe(data), tmp_path / "stopped", callbacks=[resumed]).finished
    assert resumed.told[0] == ("begin", 4, 9)
    a, b = (saved_steps(run)[-1] for run in (whole()[0], tmp_path / "stopped"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize(
    ("event", "steps_taken"),
    [("on_begin", 0), ("on_metrics", 2), ("on_checkpoint", 3), ("on_end", 5)],
)
def test_a_callback_can_stop_a_run_in_any_event(data, whole, tmp_path, event, steps_taken):
    """The run ends with a checkpoint, and what it leaves, with another run, is that of one run."""

    def stop(self, *args):
        raise StopTraining

    options = {"steps": 5, "validate_every": 2}
    settings, (expected, _) = (
        recipe(data, "transformer", **options),
        whole("transformer", **options),
    )
    stopping, others = type("Stopping", (Callback,), {event: stop})(), [Recorder(), Recorder()]
    callbacks = [others[0], stopping, others[1]]
    result = train(settings, tmp_path / "stopped", callbacks=callbacks)
    assert (result.step, result.finished) == (steps_taken, steps_taken == 5)
    assert saved_steps(tmp_path / "stopped")[-1].name == f"step-{steps_taken:08d}"
    assert others[0].told == others[1].told
    assert others[0].told[-1] == ("end",)
    assert train(settings, tmp_path / "stopped").finished
    assert metrics(tmp_path / "stopped") == metrics(expected)
    a, b = (saved_steps(run)[-1] for run in (expected, tmp_path / "stopped"))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.parametrize("event", ["on_begin", "on_metrics", "on_checkpoint", "on_end"])
def test_errors_of_callbacks_are_not_taken_for_ours(data, tmp_path, event):
    def fail(self, *args):
        raise ConnectionError("a server is down")

    failing = type("Failing", (Callback,), {event: fail})()
    with pytest.raises(ConnectionError, match="a server is down"):
        train(recipe(data, "transformer", steps=3), tmp_path / "r", callbacks=[failing])


def test_errors_of_writing_metrics_are_explained(data, tmp_path, monkeypatch):
    def full(self, step, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(JsonlMetrics, "on_metrics", full)
    with pytest.raises(CheckpointError, match=r"cannot write.*free some space and run the same"):
        train(recipe(data, "transformer", steps=3), tmp_path / "r")


def test_a_failed_run_ends_too(data, tmp_path):
    class Broken(Callback):
        def on_metrics(self, step, metrics):
            raise ZeroDivisionError

    watching = Recorder()
    with pytest.raises(ZeroDivisionError):
        train(recipe(data), tmp_path / "r", callbacks=[watching, Broken()])
    assert watching.told == [("begin", 0, 9), ("report", 2), ("end",)]


def test_parameters_without_gradients_do_not_keep_a_run_from_resuming(
    data, tmp_path, monkeypatch, patient
):
    """A rule that is learned by other means, say, or a layer that is frozen."""
    build = setup.build_lm

    def frozen(*args, **kwargs):
        lm = build(*args, **kwargs)
        lm.trained.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        return lm

    monkeypatch.setattr(setup, "build_lm", frozen)
    settings = recipe(data, "transformer", steps=4)
    train(settings, tmp_path / "r", time_limit=0.0)
    one = Trainer(settings)
    state.load_step(saved_steps(tmp_path / "r")[-1], one.lm.trained, one.optimizer, one.device)
    assert one.lm.trained.unused not in one.optimizer.state


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blt", "transformer"])
def test_compiled_training_is_the_same_training(data, tmp_path, kind):
    # More steps than torch compiles a function again for: the documents of rows differ.
    options = {"steps": 12, "log_every": 1, "validate_every": 6}
    train(recipe(data, kind, compile=False, **options), tmp_path / "False")
    path = tmp_path / "compiled.yaml"
    path.write_text(dump_yaml(recipe(data, kind, compile=True, **options)))
    command = [sys.executable, "-m", "bytelm", "train", path, "--out", tmp_path / "True"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "recompile" not in ended.stderr
    for mine, theirs in zip(metrics(tmp_path / "True"), metrics(tmp_path / "False"), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name


@pytest.fixture(scope="module")
def long_command(data, tmp_path_factory):
    """A command that trains for seconds into the folder that is added, and its whole run."""
    folder = tmp_path_factory.mktemp("long")
    settings = recipe(data, steps=200, checkpoint_every=10, log_every=20, validate_every=200)
    (folder / "recipe.yaml").write_text(dump_yaml(settings))
    command = [sys.executable, "-m", "bytelm", "train", str(folder / "recipe.yaml"), "--out"]
    subprocess.run([*command, str(folder / "run")], check=True, stdout=subprocess.DEVNULL)
    return command, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_end_a_run_that_resumes_to_the_same_bits(long_command, tmp_path, number):
    (command, whole), run = long_command, tmp_path / "stopped"
    process = subprocess.Popen([*command, str(run)], stdout=subprocess.PIPE)
    while len(saved_steps(run)) < 2:
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate()
    assert saved_steps(run)[-1].name < saved_steps(whole)[-1].name
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert b"the same command resumes" in printed
    subprocess.run([*command, str(run)], check=True, stdout=subprocess.DEVNULL)
    a, b = (saved_steps(folder)[-1] for folder in (whole, run))
    assert a.name == b.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


# Kinds of other packages ------------------------------------------------------------------------


class LearnedPatching(PatchingConfig):
    kind: Literal["learned"] = "learned"


class WeightedPatching(PatchingConfig):
    kind: Literal["weighted"] = "weighted"


class WeightedRule(torch.nn.Module):
    """A pointwise rule with a weight for every byte."""

    needs_entropies: ClassVar[bool] = False

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(260))

    def forward(self, seen):
        return self.weights[seen.ids] > 0


class DroppingConfig(ModelConfig):
    kind: Literal["dropping"] = "dropping"


class Dropping(torch.nn.Module):
    """Logits from the last byte alone, without ``init_weights``."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Embedding(260, 260)
        self.dropout = torch.nn.Dropout(0.5)


class DroppingLM(CausalLM):
    def __init__(self):
        super().__init__()
        self.inner, self.units = Dropping(), ByteUnits()

    @property
    def trained(self):
        return self.inner

    def forward(self, ids, documents=None):
        return self.inner.dropout(self.inner.logits(ids))


@pytest.fixture(scope="module")
def foreign():
    before = {registry: dict(registry._nodes) for registry in (RULES, MODELS)}
    register_rule(LearnedPatching, lambda config: LearnedRule(32))
    register_rule(WeightedPatching, lambda config: WeightedRule())
    register_model(DroppingConfig, lambda config, parts: DroppingLM())
    register_parts(DroppingConfig, lambda config: {"logits": Part(other_parameters=260 * 260)})
    yield
    for registry, nodes in before.items():
        registry._nodes.clear()
        registry._nodes.update(nodes)
    for user in Kinds._users:
        user.model_rebuild(force=True)


def foreign_recipe(data, kind, **train_options):
    if kind == "dropping":
        settings = recipe(data, "transformer", **train_options)
        return settings.model_copy(update={"model": DroppingConfig()})
    rule = LearnedPatching() if kind == "learned" else WeightedPatching()
    return recipe(data, **train_options).model_copy(update={"patching": rule})


@pytest.mark.parametrize("kind", ["learned", "weighted"])
def test_learned_rules_train_from_a_recipe_and_patch_as_they_were_trained(
    data, tmp_path, foreign, kind
):
    result = train(foreign_recipe(data, kind, steps=3), tmp_path / "r")
    assert result.finished
    assert math.isfinite(result.validation["x"].bits_per_byte)
    lm = load(tmp_path / "r", device="cpu")
    # The loader has no part in patches that the model decides, with weights on its device.
    assert not lm.module.units.has_budget
    text = "the patch of bytes is cut where entropy rises"
    ids = torch.from_numpy(codec.encode(text))[None]
    lengths = lm.module.segment(ids).patches.lengths[0]
    ends = lengths[lengths > 0].cumsum(0).tolist()
    # The last byte of ``ids`` is the last of the text; BOS is a patch by itself.
    expected = tuple(end - 1 for end in ends[:-1])
    for rule in (None, lm.config.patching):
        assert lm.patch(text, rule).boundaries == expected
    assert 1 < len(expected) < len(text)
    limited = lm.patch(text, lm.config.patching.model_copy(update={"max_length": 1}))
    assert limited.boundaries == tuple(range(len(text)))


def test_a_learned_rule_that_is_not_the_models_own_is_refused(data, tmp_path, foreign):
    train(recipe(data, "transformer", steps=1), tmp_path / "r")
    lm = load(tmp_path / "r", device="cpu")
    for rule in (LearnedPatching(), WeightedPatching()):
        with pytest.raises(ConfigError, match=f"the {rule.kind} rule is learned.*load a model"):
            lm.patch("some text", rule)


@pytest.mark.parametrize("kind", ["learned", "weighted", "dropping"])
def test_the_seed_alone_decides_how_foreign_kinds_begin(data, foreign, kind):
    def weights(seed, noise):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        lm = Trainer(foreign_recipe(data, kind, seed=seed)).lm
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.detach().flatten() for p in lm.trained.parameters()])

    assert torch.equal(weights(5, noise=1), weights(5, noise=2))
    assert not torch.equal(weights(5, noise=1), weights(6, noise=1))


def test_validation_is_in_evaluation_mode(data, foreign):
    one = Trainer(foreign_recipe(data, "dropping"))
    assert one.evaluate()["x"].nats == one.evaluate()["x"].nats
    assert all(module.training for module in one.lm.modules())
    one = Trainer(recipe(data))
    modes = [module.training for module in one.lm.modules()]
    one.evaluate()
    assert [module.training for module in one.lm.modules()] == modes
    assert set(modes) == {True, False}  # the scorer is not trained


def test_a_resumed_run_keeps_its_room_for_patches(data, tmp_path, monkeypatch, patient):
    settings = recipe(data, steps=4, checkpoint_every=2)
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "r", time_limit=0.0)
    # Measured now, patches would be longer.
    monkeypatch.setattr(PatchUnits, "mean_bytes", lambda self, documents: 9.0)
    assert train(settings, tmp_path / "r").finished
    a, b = (load_file(saved_steps(tmp_path / n)[-1] / "model.safetensors") for n in ("whole", "r"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "r")
