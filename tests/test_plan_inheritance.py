"""Inheritance: `like` of plans, families and recipes is one merge."""

import json
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.config import read_mapping, recipe_text
from bytelm.errors import ConfigError
from bytelm.study import load_plan, parse_plan, plan_runs
from bytelm.study.inheritance import inherit, merge
from bytelm.study.loading import run_recipe
from study_plan import PLAN, plan

KEYS = st.sampled_from(["a", "b", "c"])
SECTIONS = st.recursive(
    st.integers(0, 3), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3)
)
MAPPINGS = st.dictionaries(KEYS, SECTIONS, max_size=3)
KINDS = st.dictionaries(st.sampled_from(["a", "kind"]), st.integers(0, 1), max_size=2)


def values(mapping, prefix=()):
    """Every value that is not a section, by its path."""
    found = {}
    for key, value in mapping.items():
        path = (*prefix, key)
        found |= values(value, path) if isinstance(value, dict) else {path: value}
    return found


@given(MAPPINGS, MAPPINGS)
def test_what_is_laid_over_wins_and_the_rest_stays(base, over):
    above = values(over)
    below = {
        path: value
        for path, value in values(base).items()
        if not any(path[: len(other)] == other or other[: len(path)] == path for other in above)
    }
    assert values(merge(base, over)) == {**below, **above}


@given(KINDS, KINDS)
def test_a_section_of_another_kind_replaces_the_one_below(base, over):
    is_other = {"kind"} <= base.keys() & over.keys() and base["kind"] != over["kind"]
    assert merge({"x": base}, {"x": over}) == {"x": over if is_other else {**base, **over}}


@given(st.lists(MAPPINGS, min_size=1, max_size=4))
def test_a_chain_is_an_explicit_merge(layers):
    """Each layer is like the next one; the last is at the bottom."""
    named = {str(n): {**layer, "like": str(n + 1)} for n, layer in enumerate(layers)}
    del named[str(len(layers) - 1)]["like"]
    found = inherit(named["0"], named.__getitem__, "test", ("0",))
    assert found == reduce(lambda below, over: merge(below, over), reversed(layers))


@given(st.integers(1, 4), st.integers(0, 3))
def test_a_cycle_is_refused_with_its_names(length, before):
    """Of ``before`` names that lead to a cycle of ``length``."""
    total = before + length
    named = {str(n): {"like": str(n + 1 if n + 1 < total else before)} for n in range(total)}
    chain = " -> ".join([*named, str(before)])
    with pytest.raises(ConfigError, match=rf"^here: like leads back to itself: {chain}$"):
        inherit(named["0"], named.__getitem__, "here", ("0",))


def write(folder, name, data):
    (folder / name).write_text(json.dumps(data))
    return str(folder / name)


def test_plans_may_be_in_a_chain_but_not_in_a_cycle(tmp_path):
    grandparent = write(tmp_path, "c", merge(PLAN, {"warmup_share": 0.2}))
    parent = write(tmp_path, "b", {"like": grandparent, "title": "B", "warmup_share": 0.3})
    one = load_plan(write(tmp_path, "a", {"like": parent, "name": "a"}))
    assert (one.name, one.title, one.warmup_share) == ("a", "B", 0.3)
    assert one == plan(name="a", title="B", warmup_share=0.3)
    write(tmp_path, "c", {"like": parent})
    with pytest.raises(ConfigError, match=f"to itself: {parent} -> {grandparent} -> {parent}"):
        load_plan(parent)


def test_families_may_be_in_a_chain_but_not_in_a_cycle():
    small = {"label": "small", "like": "entropy", "sizes": {"s": {"data": {"rows_per_step": 1}}}}
    smaller = {"label": "smaller", "like": "small", "scorer": None, "recipe": PLAN["families"]}
    one = plan(families={"small": small, "smaller": smaller})
    entropy, found = one.families["entropy"], one.families["small"]
    assert (
        found.recipe
        == entropy.recipe
        == merge(PLAN["families"]["space"]["recipe"], PLAN["families"]["entropy"]["recipe"])
    )
    assert found.sizes == merge(entropy.sizes, small["sizes"])
    assert (found.scorer, found.unit_bytes, found.label) == ("table", 5, "small")
    last = one.families["smaller"]
    assert (last.scorer, last.unit_bytes, last.sizes) == (None, 5, found.sizes)
    assert last.recipe == merge(found.recipe, PLAN["families"])
    chain = "entropy -> small -> entropy"
    with pytest.raises(ConfigError, match=rf"families\.entropy: like leads .* itself: {chain}$"):
        plan(families={"small": small, "entropy": {"like": "small"}})


def test_recipes_may_be_in_a_chain_but_not_in_a_cycle(tmp_path):
    shipped = read_mapping(recipe_text("blt-1m"), "blt-1m")
    below = write(tmp_path, "b", {"like": "blt-1m", "model": {"local": {"window": 9}}})
    like = write(tmp_path, "a", {"like": below, "optimizer": {"beta2": 0.9, "warmup_steps": 3}})
    runs = [{"families": ["byte"], "sizes": ["s"], "flops": [1e12]}]
    byte = {"label": "x", "unit_bytes": 4, "scorer": "table", "sizes": {"s": {"like": like}}}
    one = parse_plan({**PLAN, "families": {"byte": byte}, "runs": runs, "comparisons": {}}, "test")
    recipe = run_recipe(one, plan_runs(one)[0])
    assert recipe.model.local.window == 9
    assert recipe.model.global_model.dim == shipped["model"]["global_model"]["dim"]
    assert recipe.optimizer.beta2 == 0.9
    # The base of the plan lies over it, and the length of a run is the plan's alone.
    assert recipe.data.row_bytes == PLAN["base"]["data"]["row_bytes"]
    assert "warmup_steps" not in recipe.optimizer.model_fields_set
    write(tmp_path, "b", {"like": like})
    with pytest.raises(ConfigError, match=f"to itself: {like} -> {below} -> {like}"):
        run_recipe(one, plan_runs(one)[0])


def test_a_plan_inherits_what_it_does_not_set(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        json.dumps(
            {
                "name": "mine",
                "title": "Mine",
                "like": "cpu-study",
                "families": {"byte": {"recipe": {"optimizer": {"learning_rate": 0.5}}}},
                "runs": [{"families": ["byte", "bpe-4096"], "sizes": ["s"], "flops": [1e12]}],
            }
        )
    )
    mine, other = load_plan(str(path), ["text.evaluated_bytes=7"]), load_plan("cpu-study")
    assert (mine.text.train, mine.text.evaluated_bytes) == (other.text.train, 7)
    assert len(plan_runs(mine)) == 2
    assert mine.comparisons == other.comparisons
    one, same = (run_recipe(mine, run).optimizer.learning_rate for run in plan_runs(mine))
    assert (one, same) == (0.5, 8e-3)


def test_a_plan_drops_what_is_null():
    inherited = {"all": None, "inference": None}
    one = plan(families={"more": None}, comparisons=inherited)
    assert list(one.comparisons) == ["training"]
    assert one.families == plan().families
