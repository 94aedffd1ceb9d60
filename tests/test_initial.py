"""Training on from the weights of a checkpoint, all or parts of it, and freezing parts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from builders import BASE_BLT, merged, random_byte_lm, random_ids
from bytelm.checkpoint import fingerprint, load_model, read_config, save_model, saved_steps
from bytelm.config import (
    BLTConfig,
    ModelDescription,
    Recipe,
    TransformerConfig,
    load_recipe,
    parse,
)
from bytelm.data import Dataset, PrepareOptions, prepare
from bytelm.errors import CheckpointError, ConfigError, DataError, PatchingError
from bytelm.training import Trainer, train
from bytelm.training.parts import parts_by_parameter
from bytelm.training.run import Run

WORDS = ["the", "patch", "of", "bytes", "is", "cut", "where", "entropy", "rises", "\n"]
SCORER = {"kind": "transformer", "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48}
SCORER["window"] = 6
BLT = {"kind": "blt", **BASE_BLT}

PARTS = [part for part in BLTConfig.named_parts if part != "vocabulary"]


def prepare_text(folder, seed, scorer):
    rng = np.random.default_rng(seed)
    lines = [
        json.dumps({"text": " ".join(rng.choice(WORDS, rng.integers(5, 60)))}) for _ in range(150)
    ]
    folder.mkdir()
    (folder / "x.jsonl").write_text("\n".join(lines))
    options = PrepareOptions(scorer=scorer, workers=1, validation_share=0.1)
    prepare([str(folder / "x.jsonl")], folder / "d", options)
    return str(folder / "d")


def recipe(data, model=BLT, **sections):
    base = {
        "model": model,
        "data": {"path": data, "row_bytes": 96, "rows_per_step": 4},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {
            "steps": 4,
            "log_every": 2,
            "validate_every": 4,
            "checkpoint_every": 2,
            "validation_bytes": 1000,
        },
    }
    if model["kind"] == "blt":
        base["patching"] = {"kind": "entropy", "patch_size": 3.0}
    return parse(Recipe, merged(base, sections), "test")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text scored by one scorer, other text scored by it and by another one, and trained runs."""
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("scorer", 0), ("other", 5)):
        lm = random_byte_lm(seed, num_layers=1, window=6)
        save_model(folder / name, lm, ModelDescription(model=parse(TransformerConfig, SCORER, "")))
    prepare_text(folder / "old", 0, folder / "scorer")
    prepare_text(folder / "new", 1, folder / "scorer")
    prepare_text(folder / "foreign", 1, folder / "other")
    train(recipe(str(folder / "old/d")), folder / "blt")
    train(recipe(str(folder / "old/d"), SCORER), folder / "byte")
    return folder


def from_run(place, name="blt", data="new", overrides=(), **sections):
    """A recipe that says nothing of its model, loaded as a user's file would be."""
    text = {
        "init": {"from": str(place / name)},
        "data": {"path": str(place / data / "d"), "row_bytes": 96, "rows_per_step": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "train": {"steps": 4, "log_every": 1, "validate_every": 4, "checkpoint_every": 2,
                  "validation_bytes": 1000, "seed": 7},
    }  # fmt: skip
    path = place / "recipe.json"
    path.write_text(json.dumps(merged(text, sections)))  # JSON is YAML.
    return load_recipe(str(path), overrides)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    return {name for name in a if torch.equal(a[name], b[name])}


@pytest.mark.parametrize("name", ["blt", "byte"])
def test_all_parts_give_the_logits_of_the_checkpoint_before_the_first_step(place, name):
    trainer = Trainer(from_run(place, name))
    lm, config = load_model(place / name)
    ids = random_ids(80)[None]
    with torch.no_grad():
        assert torch.equal(trainer.lm.eval()(ids), lm(ids))
    assert trainer.recipe.model == config.model
    assert trainer.recipe.patching == config.patching


@settings(max_examples=4, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=1, unique=True),
    seed=st.integers(0, 3),
)
def test_named_parts_are_the_checkpoints_and_others_as_the_seed_makes_them(place, parts, seed):
    options = {"train": {"seed": seed}}
    mine = Trainer(from_run(place, init={"parts": parts}, **options)).lm.trained
    fresh = Trainer(recipe(str(place / "new/d"), **options)).lm.trained
    saved = load_file(saved_steps(place / "blt")[-1] / "model.safetensors")
    for name, belongs in parts_by_parameter(mine).items():
        expected = saved if set(belongs) & set(parts) else weights(fresh)
        assert torch.equal(mine.state_dict()[name], expected[name]), name


def test_parts_need_equal_shapes_only_where_they_are_named(place):
    deeper = from_run(
        place, init={"parts": ["encoder", "embeddings"]}, model={"global_model": {"num_layers": 3}}
    )
    assert Trainer(deeper).recipe.model.global_model.num_layers == 3
    assert deeper.model.local == read_config(saved_steps(place / "blt")[-1]).model.local
    larger = {"global_model": {"dim": 64}}
    with pytest.raises(
        ConfigError, match=r"init.parts: global_model.blocks.0.*\[48, 48\].*\[64, 64\]"
    ):
        Trainer(from_run(place, init={"parts": ["global"]}, model=larger))
    with pytest.raises(ConfigError, match=r"init.parts names 'hash_embeddings', but the model has"):
        Trainer(from_run(place, "byte", init={"parts": ["hash_embeddings"]}))
    with pytest.raises(ConfigError, match=r"init.parts names 'globe'; of a blt .* encoder, global"):
        from_run(place, init={"parts": ["globe"]})


def test_another_model_is_refused_by_the_keys_that_differ(place):
    with pytest.raises(ConfigError, match=r"model.local.ffn_dim: 48 -> 64\): leave these settings"):
        Trainer(from_run(place, model={"local": {"ffn_dim": 64}}))
    with pytest.raises(ConfigError, match="holds a blt model, the recipe a transformer"):
        Trainer(recipe(str(place / "new/d"), SCORER, init={"from": str(place / "blt")}))
    with pytest.raises(ConfigError, match=r"unknown key 'init.fro'; did you mean 'from'"):
        recipe(str(place / "new/d"), init={"fro": "x"})


def test_the_rule_and_rows_are_the_checkpoints_unless_the_recipe_says_otherwise(place):
    own = read_config(saved_steps(place / "blt")[-1])
    assert from_run(place).patching == own.patching
    given = from_run(place, overrides=["patching.max_length=9"]).patching
    assert given == own.patching.model_copy(update={"max_length": 9})
    assert from_run(place, overrides=["patching.patch_size=3.0"]).patching == own.patching
    assert from_run(place, overrides=["patching.patch_size=4.0"]).patching.threshold is None
    assert from_run(place, overrides=["patching.threshold=null"]).patching.threshold is None
    assert from_run(place, overrides=["patching={kind: space}"]).patching.kind == "space"
    assert from_run(place, overrides=["data={path: x}"]).data.row_bytes == own.context_bytes
    with pytest.raises(PatchingError, match=r"patching.patch_size to calibrate"):
        Trainer(from_run(place, overrides=["patching={threshold: null, patch_size: null}"]))


def test_a_threshold_is_not_applied_to_entropies_of_another_scorer(place):
    with pytest.raises(DataError, match=r"scored by another scorer .*--scorer .*threshold=null"):
        Trainer(from_run(place, data="foreign"))
    calibrated = from_run(place, data="foreign", overrides=["patching.threshold=null"])
    assert Trainer(calibrated).recipe.patching.threshold is not None
    Trainer(from_run(place, data="foreign", overrides=["patching={kind: space}"]))


def test_data_can_be_scored_by_the_scorer_of_a_model(place, tmp_path):
    options = PrepareOptions(scorer=place / "blt", workers=1, validation_share=0.1)
    prepare([str(place / "new" / "x.jsonl")], tmp_path / "d", options)
    ours, theirs = (Dataset(folder, "train") for folder in (tmp_path / "d", place / "new/d"))
    assert ours.manifest.scorer.fingerprint == fingerprint(tmp_path / "d" / "scorer")
    for n in range(len(ours)):
        assert ours.lengths[n] == theirs.lengths[n]
        spans = (data.entropies(n, 0, int(data.lengths[n]) + 1) for data in (ours, theirs))
        assert np.array_equal(*spans)
    Trainer(from_run(place, overrides=[f"data.path={tmp_path / 'd'}"]))
    # What the model was trained with is kept, and not to be contradicted.
    with pytest.raises(DataError, match="leave out --reset-at-newline"):
        prepare(
            [str(place / "new" / "x.jsonl")],
            tmp_path / "e",
            replace(options, reset_at_newline=True),
        )


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(["global"], marks=pytest.mark.slow),
        pytest.param(["embeddings"], marks=pytest.mark.slow),
        ["hash_embeddings", "output"],
    ],
)
def test_frozen_parts_keep_their_bits_and_have_no_state(place, tmp_path, parts):
    settings = from_run(place, optimizer={"freeze": parts, "lr_multipliers": {"encoder": 0.5}})
    before = weights(Trainer(settings).lm.trained)
    train(settings, tmp_path / "r")
    newest = saved_steps(tmp_path / "r")[-1]
    after = load_file(newest / "model.safetensors")
    belongs = parts_by_parameter(Trainer(settings).lm.trained)
    frozen = {name for name in before if set(belongs[name]) & set(parts)}
    assert frozen
    assert same(before, after) == frozen
    moments = load_file(newest / "optimizer.safetensors")
    assert {name.partition("/")[0] for name in moments} == set(before) - frozen


def test_freezing_everything_or_nothing_that_exists_is_refused(place):
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        Trainer(from_run(place, optimizer={"freeze": PARTS}))
    with pytest.raises(ConfigError, match=r"optimizer.freeze names 'glob'; of a blt model"):
        from_run(place, optimizer={"freeze": ["glob"]})
    with pytest.raises(
        ConfigError, match=r"optimizer.freeze names 'hash_embeddings', but the model"
    ):
        Trainer(from_run(place, "byte", optimizer={"freeze": ["hash_embeddings"]}))


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3])
def test_a_killed_run_resumes_to_the_same_bits(place, tmp_path, monkeypatch, stop):
    """Also without the checkpoint it began with, once it has one of its own."""
    settings = from_run(place, optimizer={"freeze": ["decoder"]})
    train(settings, tmp_path / "whole")
    step, taken = Run._step, []

    def kill(self):
        if len(taken) == stop:
            raise Killed
        taken.append(0)
        step(self)

    monkeypatch.setattr(Run, "_step", kill)
    with pytest.raises(Killed):
        train(settings, tmp_path / "killed")
    monkeypatch.undo()
    origin = settings.init.checkpoint
    if stop > 2:
        (place / "blt").rename(place / "away")
    try:
        train(load_recipe(str(tmp_path / "killed/recipe.yaml")), tmp_path / "killed")
    finally:
        if stop > 2:
            (place / "away").rename(origin)
    pair = [saved_steps(tmp_path / name)[-1] for name in ("whole", "killed")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(folder / name) for folder in pair)
        assert same(a, b) == set(a)
    assert read_config(pair[0]).training == read_config(pair[1]).training


def test_a_run_records_what_it_began_with(place, tmp_path):
    train(from_run(place, init={"parts": ["encoder"]}), tmp_path / "r")
    newest = saved_steps(place / "blt")[-1]
    record = json.loads((tmp_path / "r" / "init.json").read_text())
    assert record["from"] == str(newest)
    assert record["step"] == 4
    assert record["parts"] == ["encoder"]
    saved = saved_steps(tmp_path / "r")[-1]
    assert read_config(saved).training["init"] == record
    # It can be trained on from in turn, and another checkpoint is another run.
    again = from_run(place, str(saved))
    assert Trainer(again).setup.origin["fingerprint"] != record["fingerprint"]
    with pytest.raises(ConfigError, match=r"holds a run of another recipe \(init.from: "):
        train(again, tmp_path / "r")
    train(recipe(str(place / "new/d")), tmp_path / "random")
    assert not (tmp_path / "random" / "init.json").exists()


def test_what_is_no_checkpoint_of_ours_is_explained(place, tmp_path):
    def start(name):
        Trainer(recipe(str(place / "new/d"), init={"from": name}))

    with pytest.raises(CheckpointError, match="no such folder; for a repository of the Hugging"):
        start("facebook/blt-1b")
    with pytest.raises(CheckpointError, match=r"no such folder .*init=null"):
        start(str(tmp_path / "nothing"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "blt"}')
    with pytest.raises(CheckpointError, match=r"`bytelm import hf .*/hf --out OUT`, and set init"):
        start(str(tmp_path / "hf"))
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"`bytelm import official --blt .*/off --entropy"):
        start(str(tmp_path / "off"))
    # Without a model of its own, a recipe cannot even be read.
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        from_run(tmp_path, "nothing")
