import re

import pytest
import yaml

from builders import BASE_BLT
from bytelm.config import (
    BLTConfig,
    CombinedPatching,
    NgramConfig,
    TableDataConfig,
    TableRecipe,
    differences,
    dump_yaml,
    load_recipe,
    parse,
    recipe_names,
)
from bytelm.errors import ConfigError

RECIPE = {
    "model": {"kind": "blt", **BASE_BLT},
    "patching": {"kind": "entropy", "patch_size": 4.5},
    "train": {"steps": 10},
}


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "recipe.yaml"
    target.write_text(yaml.safe_dump(RECIPE))
    return str(target)


def error(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_recipes_survive_being_written_and_read(path, tmp_path):
    recipe = load_recipe(path, ["data.mixture={a: 1.0, b: 2.5}", "optimizer.learning_rate=1e-3"])
    (tmp_path / "copy.yaml").write_text(dump_yaml(recipe))
    assert load_recipe(str(tmp_path / "copy.yaml")) == recipe


def test_overrides_reach_any_depth_and_are_read_as_yaml(path):
    recipe = load_recipe(
        path,
        [
            "model.ngrams.sizes=[2, 3]",
            "train.micro_rows=2",
            "optimizer.learning_rate=1e-3",
            "train.compile=true",
            "data.path=a/b",
            "patching.max_length=null",
        ],
    )
    assert isinstance(recipe.model, BLTConfig)
    assert recipe.model.ngrams.sizes == (2, 3)
    assert recipe.optimizer.learning_rate == 0.001
    assert recipe.train.compile is True
    assert recipe.data.path == "a/b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean 'steps'?; valid here: steps,"),
        ("model.local.windw=3", "'model.local.windw'; did you mean 'window'?"),
        ("patching.treshold=3", "'patching.treshold'; did you mean 'threshold'?"),
        ("optimiser.learning_rate=3", "'optimiser'; did you mean 'optimizer'?"),
        ("train.steps=many", "train.steps: Input should be a valid integer, not 'many'"),
        ("train.steps=1.5", "train.steps: Input should be a valid integer, not 1.5"),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1, not 0"),
        ("patching.patch_size=1", "patching.patch_size: Input should be greater than 1"),
        ("model.local.num_heads=3", "dim 32 must be num_heads 3 times an even head dimension"),
        ("model.kind=mamba", "Input tag 'mamba' found using 'kind' does not match any of"),
        ("patching=null", "a blt model needs a patching section"),
        ("train", "must have the form key.path=value"),
        ("=3", "must have the form key.path=value"),
        ("train.steps.more=3", "'steps' holds a value, not a section"),
        ("train.steps=[", "'[' is not a YAML value"),
        ("train=null", "train: Input should be a valid dictionary"),
        ("optimizer.beta2=1.0", "optimizer.beta2: Input should be less than 1"),
        ("patching.threshold=.nan", "patching.threshold: Input should be a finite number"),
    ],
)
def test_mistakes_are_named_with_the_path_and_the_nearest_name(path, override, message):
    assert message in error(path, override)


def test_missing_keys_are_named(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {kind: transformer}\n")
    assert "'model.dim' is missing" in error(str(tmp_path / "r.yaml"))


def test_a_table_takes_no_training_options(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {kind: ngram}\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["seed=3", "data.path=d"])
    assert recipe == TableRecipe(model=NgramConfig(), data=TableDataConfig(path="d"), seed=3)
    message = error(str(tmp_path / "r.yaml"), "optimizer.learning_rate=9.0")
    assert "unknown key 'optimizer'" in message
    assert "valid here: model, data, seed" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("- a\n", "must hold a mapping, not list"),
        ("", "NoneType"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "key 'train' is given twice"),
    ],
)
def test_files_that_are_no_recipe_are_named(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    assert message in error(str(tmp_path / "r.yaml"))


def test_unknown_recipes_are_named_with_the_nearest(tmp_path):
    assert "did you mean 'blt-1b'?" in error("blt-1bb")
    assert re.search("cannot read recipe .*: .*directory", error(str(tmp_path)))


def test_a_transformer_takes_no_patching(path):
    message = error(
        path, "model={kind: transformer, dim: 8, num_layers: 1, num_heads: 1, ffn_dim: 8}"
    )
    assert "a transformer model has no patches: remove patching" in message


def test_differences_are_listed_by_path():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert differences(old, {"a": {"b": 1, "c": 5}, "e": 4}) == [
        "a.c: 2 -> 5",
        "d: 3 -> None",
        "e: None -> 4",
    ]


def test_the_combined_rule_needs_its_increase():
    with pytest.raises(ConfigError, match="'increase' is missing"):
        parse(CombinedPatching, {"threshold": 1.0}, "test")


def test_learned_queries_need_encoder_cross_attention():
    cross = {"slots": 2, "num_heads": 2, "queries": "learned", "encoder": "none"}
    with pytest.raises(ConfigError, match="learned queries need encoder cross-attention"):
        parse(BLTConfig, {**BASE_BLT, "cross_attention": cross}, "test")


def test_recipes_are_listed():
    assert {"blt-8b", "entropy-100m", "entropy-ngram"} <= set(recipe_names())
