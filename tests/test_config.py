"""Configuration: recipes as YAML, overrides, mistakes, names of earlier versions, new kinds."""

from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from builders import BASE_BLT, merged
from bytelm.config import (
    MODELS,
    RULES,
    BlockConfig,
    BLTConfig,
    CalibratedPatching,
    CombinedPatching,
    DataConfig,
    HashEmbeddingConfig,
    Kinds,
    ModelConfig,
    ModelDescription,
    NgramConfig,
    NgramDataConfig,
    NgramRecipe,
    Node,
    PatchingConfig,
    Recipe,
    SpacePatching,
    TransformerConfig,
    differences,
    dump_yaml,
    kinds,
    load_recipe,
    nearest,
    open_node,
    parse,
    read_mapping,
    recipe_names,
    shipped_text,
)
from bytelm.errors import ConfigError

RECIPE = {
    "model": {"kind": "blt", **BASE_BLT},
    "patching": {"kind": "entropy", "patch_size": 4.5},
    "train": {"steps": 10},
}
PATCHING = [
    {"kind": "entropy", "threshold": 1.3354},
    {"kind": "monotonic", "increase": -1e-7, "max_length": 8},
    {"kind": "combined", "patch_size": 4.5, "increase": 1e22},
    {"kind": "static", "length": 4},
    {"kind": "space"},
    {"kind": "byte"},
]
TRANSFORMER = {"kind": "transformer", "dim": 8, "num_layers": 1, "num_heads": 1, "ffn_dim": 8}

sizes = st.integers(2, 32)
positive = st.integers(1, 10**6)
rates = st.floats(1e-9, 1e3)
words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=8)


@st.composite
def recipes(draw):
    """Recipes with the options in which YAML, types and names are most likely to go wrong."""
    model = merged(
        RECIPE["model"],
        {
            "hash_embeddings": {"num_buckets": draw(positive), "sizes": draw(st.lists(sizes))},
            "local": {"num_kv_heads": draw(st.sampled_from([None, 1, 2]))},
            "global_model": {"norm_eps": draw(rates), "qk_norm": draw(st.booleans())},
        },
    )
    parts = st.dictionaries(st.sampled_from(BLTConfig.named_parts), rates, max_size=3)
    return Recipe.model_validate(
        {
            "model": model,
            "patching": draw(st.sampled_from(PATCHING)),
            "data": {
                "path": draw(words),
                "mixture": draw(st.none() | st.dictionaries(words, rates, min_size=1)),
            },
            "optimizer": {"learning_rate": draw(rates), "lr_multipliers": draw(parts)},
            "train": {"steps": draw(positive), "compile": draw(st.sampled_from([None, True]))},
        }
    )


def earlier(recipe):
    """Return a recipe as plain data in the names of earlier versions."""
    data = recipe.model_dump()
    ngrams = data["model"]["ngrams"] = data["model"].pop("hash_embeddings")
    ngrams["rows"] = ngrams.pop("num_buckets")
    data["optimizer"]["rates"] = data["optimizer"].pop("lr_multipliers")
    return data


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "recipe.yaml"
    target.write_text(dump_yaml(Recipe.model_validate(RECIPE)))
    return str(target)


def error(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# YAML -------------------------------------------------------------------------------------------


@given(recipes())
def test_recipes_survive_being_written_and_read(recipe):
    assert parse(Recipe, read_mapping(dump_yaml(recipe), "test"), "test") == recipe


@given(recipes())
def test_recipes_of_earlier_versions_are_read(recipe):
    assert parse(Recipe, earlier(recipe), "test") == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("1e-3", 0.001),
        ("1_000", 1000),
        ("0x10", 16),
        ("+08", 8),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("2026-11-01", "2026-11-01"),
        ("12:30:00", "12:30:00"),
        ("[1, 2]", [1, 2]),
    ],
)
def test_values_are_those_of_yaml_1_2_without_dates(text, value):
    found = read_mapping(f"a: {text}", "test")["a"]
    assert (found, type(found)) == (value, type(value))
    assert read_mapping("a: 0", "test", [f"a={text}"]) == {"a": value}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("- a\n", "must hold a mapping, not list"),
        ("", "NoneType"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", 'found duplicate key "train"'),
        ("model: !!python/object:os.system {}", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe_are_named(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    assert message in error(str(tmp_path / "r.yaml"))


def test_sections_that_share_an_anchor_are_overridden_apart():
    text = "a: &shared {x: {y: 1}}\nb: *shared\n"
    assert read_mapping(text, "test", ["a.x.y=2"]) == {"a": {"x": {"y": 2}}, "b": {"x": {"y": 1}}}


# Overrides --------------------------------------------------------------------------------------


def test_overrides_reach_any_depth_and_are_read_as_yaml(path):
    recipe = load_recipe(
        path,
        [
            "model.hash_embeddings.sizes=[2, 3]",
            "train.micro_rows=2",
            "optimizer.learning_rate=1e-3",
            "train.compile=true",
            "data.path=a/b",
            "patching.max_length=null",
        ],
    )
    assert isinstance(recipe.model, BLTConfig)
    assert recipe.model.hash_embeddings.sizes == (2, 3)
    assert recipe.optimizer.learning_rate == 0.001
    assert recipe.train.compile is True
    assert recipe.data.path == "a/b"


@pytest.mark.parametrize(
    ("text", "steps"),
    [("010", 10), ("0x10", 16), ("1_000", 1000), ("1e3", 1000), ("1.5e3", 1500), ("2.0", 2)],
)
def test_whole_numbers_may_be_written_in_any_way(path, text, steps):
    found = load_recipe(path, [f"train.steps={text}"]).train.steps
    assert (found, type(found)) == (steps, int)


@pytest.mark.parametrize("text", ["a#b", "#'", "'a #b'", '"#"', "[a, '#']"])
def test_only_comments_are_refused_as_comments(text):
    if text == "#'":
        with pytest.raises(ConfigError, match="comment"):
            read_mapping("{}", "test", [f"a={text}"])
    else:
        value = read_mapping("{}", "test", [f"a={text}"])["a"]
        assert "#" in value or "#" in value[1]


@given(st.text(st.sampled_from("a10-_.:'\" \\\n!#&*[]{}|>%@`,?~")))
@example("!!int")
@example("!!binary a")
@example("!!omap [1]")
def test_an_override_is_applied_or_refused(text):
    with suppress(ConfigError):
        load_recipe("blt-1m", [f"data.path={text}", f"train.steps={text}"])


@pytest.mark.parametrize(
    ("old", "present"),
    [
        ("model.ngrams.rows=53", "model.hash_embeddings.num_buckets=53"),
        ("model.ngrams={rows: 53}", "model.hash_embeddings={num_buckets: 53}"),
        ("model.hash_embeddings={rows: 53}", "model.hash_embeddings={num_buckets: 53}"),
        ("optimizer.rates.global=0.1", "optimizer.lr_multipliers.global=0.1"),
        ("optimizer.rates={global: 0.1}", "optimizer.lr_multipliers={global: 0.1}"),
    ],
)
def test_overrides_may_use_names_of_earlier_versions(path, old, present):
    assert load_recipe(path, [old]) == load_recipe(path, [present]) != load_recipe(path)


def test_an_old_override_wins_over_the_recipes_own_value(path):
    recipe = load_recipe(path, ["model.hash_embeddings.num_buckets=7", "model.ngrams.rows=9"])
    assert recipe.model.hash_embeddings.num_buckets == 9


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean 'steps'?; valid here: steps,"),
        ("model.local.windw=3", "'model.local.windw'; did you mean 'window'?"),
        ("patching.treshold=3", "'patching.treshold'; did you mean 'threshold'?"),
        ("patching.kind=space", "if it belongs to another kind, set all: 'patching={kind: ...}'"),
        ("optimiser.learning_rate=3", "'optimiser'; did you mean 'optimizer'?"),
        ("train.steps=many", "train.steps: Input should be a valid integer, not 'many'"),
        ("train.steps=1.5", "train.steps: Input should be a valid integer, not 1.5"),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1, not 0"),
        ("patching.patch_size=1", "patching.patch_size: Input should be greater than 1"),
        ("model.local.num_heads=3", "dim 32 must be num_heads 3 times an even head dimension"),
        ("model.local.num_kv_heads=3", "num_heads 2 must be a multiple of num_kv_heads 3"),
        ("model.kind=mamba", "model.kind: 'mamba' is not one of transformer, blt"),
        ("model.kind=blts", "is not one of transformer, blt; did you mean 'blt'?"),
        ("model.kind=null", "model.kind: None is not one of transformer, blt"),
        ("patching={}", "'patching.kind' is missing: one of byte, static, space, entropy,"),
        ("patching=null", "a blt model needs a patching section"),
        ("data.path=007", "data.path: Input should be a valid string, not 7: write it in quotes"),
        ("data.tokenizer=t.json", "a blt model reads bytes: remove data.tokenizer"),
        ("optimizer.lr_multipliers.head=2", "lr_multipliers names 'head'; of a blt model it can"),
        ("train", "must have the form key.path=value"),
        ("=3", "must have the form key.path=value"),
        ("train.steps.more=3", "'steps' holds a value, not a section"),
        ("train.steps=[", "'[' is not a YAML value"),
        ("data.path=-_", "'-_' is not a YAML value"),
        ("data.path=._", "'._' is not a YAML value"),
        ("data.path=*.txt", "'*.txt' is not a YAML value; to set it to this text, write it in"),
        ("data.path=!!int", "'!!int' is not a YAML value"),
        ("data.path=a #1", "# begins a comment in YAML; to set it to this text, write it in"),
        ("data.path=#1", "# begins a comment in YAML"),
        ("data.path=a: b", "a valid string, not {'a': 'b'}: write it in quotes"),
        ("train.compile=on", "train.compile: must be true or false, not 'on'"),
        ("train.steps=1e2.5", "train.steps: Input should be a valid integer, not '1e2.5'"),
        ("train.steps=1:30", "train.steps: Input should be a valid integer, not '1:30'"),
        ("train.steps=1e30", "train.steps: Input should be less than 922337203685477"),
        ("train.seed=18446744073709551616", "train.seed: Input should be less than 92233720368"),
        ("train.seed=-1", "train.seed: Input should be greater than or equal to 0, not -1"),
        ("patching={knd: space}", "'patching.kind' is missing: one of byte, static, space, en"),
        ("patching={knd: space}", "; is that the key 'knd'?"),
        ("train=null", "train: Input should be a valid dictionary"),
        ("optimizer.beta2=1.0", "optimizer.beta2: Input should be less than 1"),
        ("patching.threshold=.nan", "patching.threshold: Input should be a finite number"),
    ],
)
def test_mistakes_are_named_with_the_path_and_the_nearest_name(path, override, message):
    assert message in error(path, override)


@given(st.text(st.sampled_from("a0-_.:'\" \\\n\0\u00e9\x85\u2028\u2029\ufeff~")))
@example("a\x85b")
def test_every_string_survives_yaml(text):
    data = DataConfig(path=text)
    assert parse(DataConfig, read_mapping(dump_yaml(data), "test"), "test") == data


def test_missing_keys_are_named_unless_another_is_misspelt(path, tmp_path):
    (tmp_path / "r.yaml").write_text("model: {kind: transformer}\n")
    assert "'model.dim' is missing" in error(str(tmp_path / "r.yaml"))
    message = error(str(tmp_path / "r.yaml"), "model.dmi=3")
    assert "unknown key 'model.dmi'; did you mean 'dim'?" in message


def test_mistakes_in_lists_and_mappings_of_sections_are_located():
    class Item(Node):
        size: int

    class Box(Node):
        items: dict[str, Item] = Field(default_factory=dict)
        rows: Annotated[tuple[Item, ...], "metadata"] = ()

    for data, where in (
        ({"items": {"first": {"size": 1}, "second": {"sise": 1}}}, "items.second.sise"),
        ({"rows": [{"size": 1}, {"sise": 2}]}, "rows.1.sise"),
    ):
        with pytest.raises(ConfigError, match=f"'{where}'; did you mean 'size'"):
            parse(Box, merged({}, data) | {"rows": tuple(data.get("rows", ()))}, "test")


def test_an_ngram_scorer_takes_no_training_options(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {kind: ngram}\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["seed=3", "data.path=d"])
    assert recipe == NgramRecipe(model=NgramConfig(), data=NgramDataConfig(path="d"), seed=3)
    message = error(str(tmp_path / "r.yaml"), "optimizer.learning_rate=9.0")
    assert "unknown key 'optimizer'" in message
    assert "valid here: model, data, seed" in message


def test_unknown_recipes_are_named_with_the_nearest(tmp_path):
    assert "did you mean 'blt-1b'?" in error("blt-1bb")
    assert nearest("nothing", ["like", "it"]) == ""


def test_what_is_no_recipe_is_named_with_what_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    run.mkdir()
    assert error("run") == "'run' is a folder, not a recipe: run holds no YAML file"
    (run / "mine.yaml").touch()
    (run / "other.yml").touch()
    assert error("run").endswith("YAML files in run: mine.yaml, other.yml")
    (run / "recipe.yaml").touch()
    assert error("run").endswith("is a folder, not a recipe: did you mean 'run/recipe.yaml'?")
    assert error("run/mime.yaml").endswith("no such file; did you mean 'run/mine.yaml'?")
    assert error("rum/mine.yaml").endswith("no recipe 'rum/mine.yaml': there is no folder rum")
    assert error("run/mine.yaml/x.yaml").endswith("there is no folder run/mine.yaml")
    assert "no recipe 'cpu-study': it is a plan; see `bytelm study" in error("cpu-study")
    with pytest.raises(ConfigError, match="no plan 'blt-1m': it is a recipe; see `bytelm train"):
        shipped_text("plans", "blt-1m")


def test_a_home_folder_is_expanded_in_the_path_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("model: {kind: ngram}\n")
    assert load_recipe("~/r.yaml") == NgramRecipe(model=NgramConfig())
    assert "no recipe '~nobody-here/r.yaml'" in error("~nobody-here/r.yaml")


def test_a_transformer_takes_no_patching(path):
    assert "a transformer model has no patches: remove patching" in error(
        path, f"model={TRANSFORMER}".replace("'", "")
    )


def test_differences_are_listed_by_path():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert differences(old, {"a": {"b": 1, "c": 5}, "e": 4}) == [
        "a.c: 2 -> 5",
        "d: 3 -> None",
        "e: None -> 4",
    ]


@given(recipes(), recipes())
def test_recipes_are_equal_if_they_have_no_differences(one, other):
    assert (one == other) == (not differences(one.model_dump(), other.model_dump()))


def test_the_combined_rule_needs_its_increase():
    with pytest.raises(ConfigError, match="'increase' is missing"):
        parse(CombinedPatching, {"threshold": 1.0}, "test")


def test_learned_queries_need_encoder_cross_attention():
    cross = {"slots": 2, "num_heads": 2, "queries": "learned", "encoder": "none"}
    with pytest.raises(ConfigError, match="learned queries need encoder cross-attention"):
        parse(BLTConfig, {**BASE_BLT, "cross_attention": cross}, "test")


def test_recipes_are_listed():
    assert {"blt-8b", "entropy-100m", "entropy-ngram"} <= set(recipe_names())


# Blocks and rules -------------------------------------------------------------------------------


def test_a_block_has_the_heads_that_its_options_say():
    block = BlockConfig(dim=64, num_heads=8, ffn_dim=96)
    assert (block.kv_heads, block.head_width) == (8, 8)
    block = BlockConfig(dim=64, num_heads=8, num_kv_heads=2, head_dim=12, ffn_dim=96)
    assert (block.kv_heads, block.head_width) == (2, 12)
    with pytest.raises(ValueError, match="even head dimension"):
        BlockConfig(dim=64, num_heads=8, head_dim=7, ffn_dim=96)


def test_no_hash_embeddings_are_the_same_as_none_of_any_size():
    config = parse(TransformerConfig, {**TRANSFORMER, "hash_embeddings": {"sizes": []}}, "test")
    assert config.hash_embeddings is None
    config = parse(TransformerConfig, {**TRANSFORMER, "hash_embeddings": {"sizes": [3]}}, "test")
    assert config.hash_embeddings == HashEmbeddingConfig(sizes=(3,))


@pytest.mark.parametrize("data", PATCHING)
def test_rules_say_whether_they_need_calibration_and_how_long_patches_will_be(data):
    rule = parse(ModelDescription, {"model": RECIPE["model"], "patching": data}, "test").patching
    planned = {"static": 4.0, "byte": 1.0, "combined": 4.5}
    assert rule.planned_size == planned.get(data["kind"])
    assert rule.needs_calibration == (data["kind"] == "combined")
    if isinstance(rule, CalibratedPatching):
        calibrated = rule.with_threshold(0.25)
        assert getattr(calibrated, rule.threshold_name) == 0.25
        assert not calibrated.needs_calibration


# Kinds ------------------------------------------------------------------------------------------


@pytest.fixture
def registries():
    """Leave the registries as they were."""
    before = {registry: dict(registry._nodes) for registry in (RULES, MODELS)}
    yield
    for registry, nodes in before.items():
        registry._nodes.clear()
        registry._nodes.update(nodes)
    for user in Kinds._users:
        user.model_rebuild(force=True)


class EveryOther(PatchingConfig):
    kind: Literal["every_other"] = "every_other"
    phase: int = 0


ADDED = {"patching": {"kind": "every_other", "phase": 1}}


def test_a_kind_that_is_added_is_known_to_recipes_and_checkpoints(registries):
    with pytest.raises(ConfigError, match="'every_other' is not one of byte, static"):
        parse(Recipe, {**RECIPE, **ADDED}, "test")
    assert RULES.add(EveryOther) is EveryOther
    recipe = parse(Recipe, {**RECIPE, **ADDED}, "test")
    assert recipe.patching == EveryOther(phase=1)
    assert parse(Recipe, read_mapping(dump_yaml(recipe), "test"), "test") == recipe
    description = parse(ModelDescription, {"model": RECIPE["model"], **ADDED}, "test")
    assert description.patching == EveryOther(phase=1)
    with pytest.raises(ConfigError, match=r"'patching\.phse'; did you mean 'phase'"):
        parse(Recipe, {**RECIPE, "patching": {"kind": "every_other", "phse": 1}}, "test")


def test_a_kind_cannot_be_taken_twice_or_have_no_name(registries):
    RULES.add(EveryOther)
    RULES.add(EveryOther)  # the same module may be imported twice

    class Another(PatchingConfig):
        kind: Literal["every_other"] = "every_other"

    with pytest.raises(
        ConfigError, match=r"'every_other' exists already, as test_config\.EveryOther"
    ):
        RULES.add(Another)

    class Nameless(Node):
        size: int = 1

    with pytest.raises(ConfigError, match="Nameless has no kind: declare"):
        Kinds("thing").add(Nameless)

    class Undefined(PatchingConfig):
        kind: Literal["undefined"]

    with pytest.raises(ConfigError, match="Undefined has a kind without a default: declare"):
        RULES.add(Undefined)
    assert kinds.kind_of(Undefined) is None


def test_a_class_of_the_same_name_does_not_replace_one_of_ours(registries):
    foreign = type(
        "SpacePatching",
        (PatchingConfig,),
        {
            "__module__": "elsewhere",
            "__annotations__": {"kind": Literal["space"]},
            "kind": "space",
        },
    )
    assert foreign.__qualname__ == SpacePatching.__qualname__
    with pytest.raises(ConfigError, match=r"as bytelm\.config\.patching\.SpacePatching"):
        RULES.add(foreign)
    assert RULES.nodes["space"] is SpacePatching


def test_kinds_of_other_packages_are_imported_when_one_is_not_known(registries, monkeypatch):
    asked = []

    def found(group):
        asked.append(group)
        return [EntryPoint("mine", "test_config:add_every_other", group)]

    monkeypatch.setattr(kinds, "entry_points", found)
    monkeypatch.setattr(EntryPoint, "load", lambda _: RULES.add(EveryOther))
    assert parse(Recipe, {**RECIPE, "train": {"steps": 3}}, "test")
    assert not asked  # a recipe of known kinds imports nothing
    assert parse(Recipe, {**RECIPE, **ADDED}, "test").patching == EveryOther(phase=1)
    assert asked == ["bytelm.kinds"]


def entry(name, load):
    """An entry point of a made-up package that does something when it is loaded."""

    class Loading(EntryPoint):
        dist = SimpleNamespace(name="their-package")

        def load(self):
            return load()

    return Loading(name, f"{name}.kinds", kinds.ENTRY_POINTS)


def test_an_entry_point_that_cannot_be_imported_is_named_and_hides_no_other(
    registries, monkeypatch
):
    def broken():
        raise ModuleNotFoundError("No module named 'theirs'")

    found = [entry("broken", broken)]
    monkeypatch.setattr(kinds, "entry_points", lambda group: found)
    with pytest.raises(ConfigError) as caught:
        parse(Recipe, {**RECIPE, **ADDED}, "test")
    for part in ("'every_other' is not one of", "'broken'", "'their-package'", "named 'theirs'"):
        assert part in str(caught.value)
    found.append(entry("whole", lambda: RULES.add(EveryOther)))
    assert parse(Recipe, {**RECIPE, **ADDED}, "test").patching == EveryOther(phase=1)


def test_mistakes_in_a_kind_that_was_just_imported_are_explained(registries, monkeypatch):
    late = entry("late", lambda: RULES.add(EveryOther))
    monkeypatch.setattr(kinds, "entry_points", lambda group: [late])
    with pytest.raises(ConfigError) as caught:
        parse(Recipe, {**RECIPE, "patching": {"kind": "every_other", "phase": "x"}}, "test")
    assert str(caught.value) == "test: patching.phase: Input should be a valid integer, not 'x'"


class Theirs(ModelConfig):
    """A kind of model with fields that are named as ours were in earlier versions."""

    kind: Literal["theirs"] = "theirs"
    ngrams: int = 3
    hash_embeddings: dict[str, int] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Theirs(ngrams=5, hash_embeddings={"rows": 7})),
        (["model.ngrams=6"], Theirs(ngrams=6, hash_embeddings={"rows": 7})),
        (["model.hash_embeddings.rows=8"], Theirs(ngrams=5, hash_embeddings={"rows": 8})),
        (["model.hash_embeddings={rows: 9}"], Theirs(ngrams=5, hash_embeddings={"rows": 9})),
        (["model={kind: theirs, ngrams: 4}"], Theirs(ngrams=4)),
    ],
)
def test_fields_of_other_packages_keep_their_names(registries, overrides, expected):
    text = "model: {kind: theirs, ngrams: 5, hash_embeddings: {rows: 7}}\ntrain: {steps: 1}\n"
    MODELS.add(Theirs)
    assert parse(Recipe, read_mapping(text, "test", overrides), "test").model == expected


def test_open_fields_of_nodes_made_elsewhere_follow_too(registries):
    things: Kinds[Node] = Kinds("thing")

    class First(Node):
        kind: Literal["first"] = "first"

    class Second(Node):
        kind: Literal["second"] = "second"

    things.add(First)

    @open_node
    class Holder(Node):
        thing: Annotated[Node, things]

    assert parse(Holder, {"thing": {"kind": "first"}}, "test").thing == First()
    with pytest.raises(ConfigError, match=r"thing\.kind: 'second' is not one of first"):
        parse(Holder, {"thing": {"kind": "second"}}, "test")
    things.add(Second)
    assert parse(Holder, {"thing": {"kind": "second"}}, "test").thing == Second()


def test_a_home_folder_is_expanded_in_overrides(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe("blt-1m", ["data.path=~/x"])
    assert recipe.data.path == "/home/someone/x"
    assert load_recipe("blt-1m", ["data.path=a~/x"]).data.path == "a~/x"
