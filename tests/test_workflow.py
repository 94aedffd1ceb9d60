"""``bytelm.prepare``, ``bytelm.train`` and ``bytelm.build``."""

import json

import pytest
import torch

import bytelm
from bytelm.config import Recipe, dump_yaml, load_recipe, parse
from bytelm.data import PrepareOptions, ReadOptions, prepare
from bytelm.errors import ConfigError, PatchingError
from bytelm.progress import Callback
from bytelm.training import Trainer

MODEL = {"kind": "transformer", "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
BLT = {
    "kind": "blt",
    "local": {"dim": 16, "num_heads": 2, "ffn_dim": 16, "decoder_layers": 1, "window": 8},
    "global_model": {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16},
    "cross_attention": {"num_heads": 2},
    "hash_embeddings": {"sizes": [3], "num_buckets": 50},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    lines = [json.dumps({"words": f"document {n}, the cat sat on the mat"}) for n in range(80)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    bytelm.prepare(folder / "text.jsonl", folder / "data", field="words", validation_share=0.2)
    bytelm.train("entropy-ngram", folder / "entropy", overrides={"data.path": folder / "data"})
    bytelm.prepare(
        folder / "data", folder / "scored", scorer=folder / "entropy", patch_size=3.0, workers=1
    )
    return folder


def recipe(world, **changes):
    data = {"path": str(world / "scored"), "row_bytes": 64, "rows_per_step": 2}
    return {"model": MODEL, "data": data, "train": {"steps": 2}, **changes}


def test_prepared_data_is_that_of_the_library_and_kept(world, tmp_path):
    read = ReadOptions(field="words")
    options = PrepareOptions(read=read, validation_share=0.2)
    expected = prepare([str(world / "text.jsonl")], tmp_path / "data", options)
    states = []
    found = bytelm.prepare(
        [world / "text.jsonl"],
        tmp_path / "mine",
        field="words",
        validation_share=0.2,
        progress=states.append,
    )
    assert found.fingerprint == expected.fingerprint
    assert states
    assert states[-1].documents == 80
    written = (tmp_path / "mine" / "manifest.json").stat().st_mtime_ns
    again = bytelm.prepare(
        world / "text.jsonl", tmp_path / "mine", field="words", validation_share=0.2
    )
    assert again == found
    assert (tmp_path / "mine" / "manifest.json").stat().st_mtime_ns == written


def test_a_scorer_brings_entropies_and_a_threshold(world, tmp_path):
    options = {"scorer": str(world / "entropy"), "workers": 1}
    manifest = bytelm.prepare(world / "data", tmp_path / "scored", patch_size=3.0, **options)
    assert manifest.calibration.patch_size == pytest.approx(3.0, rel=0.2)
    with pytest.warns(UserWarning, match="is prepared, but not calibrated: "):
        manifest = bytelm.prepare(world / "data", tmp_path / "other", patch_size=1e6, **options)
    assert manifest.calibration is None


def test_unknown_options_of_a_preparation_are_named(world, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown option 'feild'.*'field'"):
        bytelm.prepare(world / "text.jsonl", tmp_path / "x", feild="words")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("form", ["mapping", "file", "recipe"])
def test_every_form_of_a_recipe_trains_the_same(world, tmp_path, form, capsys):
    data, overrides = recipe(world), {"train.steps": 3, "optimizer.learning_rate": 1e-3}
    strings = [f"{key}={value}" for key, value in overrides.items()]
    given = data
    if form == "file":
        given = tmp_path / "recipe.yaml"
        given.write_text(dump_yaml(parse(Recipe, data, "test")))
    elif form == "recipe":
        given = parse(Recipe, data, "test")
    result = bytelm.train(given, tmp_path / "run", overrides=overrides)
    assert (result.step, result.finished) == (3, True)
    trainer = Trainer(load_recipe(data, strings))
    for _ in range(3):
        trainer.step()
    trained = bytelm.load(tmp_path / "run").module.trained.state_dict()
    for name, weight in trainer.lm.trained.state_dict().items():
        assert torch.equal(trained[name], weight), name
    # The data that was given is not changed, and nothing is printed.
    assert data == recipe(world)
    assert "".join(capsys.readouterr()) == ""


def test_callbacks_and_time_limits_are_passed_on(world, tmp_path, monkeypatch):
    # The step in progress is completed, however slow the machine is.
    monkeypatch.setattr("bytelm.stopping.OVERTIME", 3600.0)
    steps = []

    class Watch(Callback):
        def on_metrics(self, step, metrics):
            steps.append(step)

    result = bytelm.train(
        recipe(world, train={"steps": 9999, "log_every": 1}),
        tmp_path / "run",
        callbacks=[Watch()],
        time_limit=0.0,
    )
    assert not result.finished
    assert steps
    assert steps[-1] == result.step


def test_a_built_model_is_the_one_that_training_begins_with(world):
    patched = recipe(world, model=BLT, patching={"kind": "entropy", "patch_size": 3.0})
    lm = bytelm.build(patched)
    trainer = Trainer(parse(Recipe, patched, "test"))
    assert lm.config.patching == trainer.setup.description.patching
    assert lm.config.patching.threshold is not None
    for name, weight in trainer.lm.trained.state_dict().items():
        assert torch.equal(lm.module.trained.state_dict()[name], weight), name
    assert lm.module.training
    assert all(weight.requires_grad for weight in lm.module.trained.parameters())
    assert lm.context_bytes == 64


def test_models_are_built_without_data(world, tmp_path):
    lm = bytelm.build({"model": MODEL})
    lm.save(tmp_path / "plain")
    assert bytelm.load(tmp_path / "plain").bits_per_byte("x") == lm.bits_per_byte("x")
    rule = {"kind": "entropy", "threshold": 1.0}
    lm = bytelm.build({"model": BLT, "patching": rule}, scorer=world / "entropy")
    lm.save(tmp_path / "patched")
    assert bytelm.load(tmp_path / "patched").patch("a cat").patches == lm.patch("a cat").patches
    begun = bytelm.build({"init": {"from": str(tmp_path / "plain")}})
    for name, weight in bytelm.load(tmp_path / "plain").module.trained.state_dict().items():
        assert torch.equal(begun.module.trained.state_dict()[name], weight), name


def test_what_a_built_model_lacks_is_said(world):
    rule = {"kind": "entropy", "threshold": 1.0}
    with pytest.raises(ConfigError, match="name a scorer, or data that was prepared with one"):
        bytelm.build({"model": BLT, "patching": rule})
    with pytest.raises(PatchingError, match="no threshold yet"):
        bytelm.build({"model": BLT, "patching": {"kind": "entropy"}}, scorer=world / "entropy")
    with pytest.raises(ConfigError, match="counted, not trained"):
        bytelm.build("entropy-ngram")
    with pytest.raises(ConfigError, match="leave out one of the two"):
        bytelm.build(recipe(world), scorer=world / "entropy")
    with pytest.raises(ConfigError, match=r"'model\.dmi'"):
        bytelm.build({"model": {**MODEL, "dmi": 3}})
