"""Plans: what they hold, what their runs cost, and mistakes in them."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.errors import ConfigError
from bytelm.study import (
    Resolver,
    load_plan,
    parse_plan,
    plan_names,
    plan_runs,
    run_costs,
)
from bytelm.study.inheritance import merge
from bytelm.study.loading import run_recipe
from bytelm.study.results import run_folder
from study_plan import PLAN, changed, plan

RECIPES = {
    "cpu-ablations": "54879cb45b640b9e",
    "cpu-inference": "301944465edf75da",
    "cpu-study": "88002659adc2fadd",
    "cpu-tuning": "65ee14ed84bf9753",
    "gpu-study": "a1a3d5a9c007cf92",
    "paper-grid": "074087fc2ce94eb0",
    "paper-inference": "3d02475582654757",
}
"""Digest of the recipes of each shipped plan's runs: of what the plan sets, without defaults."""


@pytest.mark.parametrize("name", plan_names())
def test_the_recipes_of_a_shipped_plan_are_those_that_were_recorded(name):
    one = load_plan(name)
    recipes = {
        run.name: run_recipe(one, run).model_dump(mode="json", exclude_unset=True)
        for run in plan_runs(one)
    }
    text = json.dumps(recipes, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == RECIPES[name]


@pytest.mark.parametrize("name", plan_names())
def test_a_shipped_plan_is_costed_without_data(name, tmp_path):
    one = load_plan(name)
    runs = plan_runs(one)
    costs = run_costs(one, runs, tmp_path, 1e10)
    for run, cost in zip(runs, costs, strict=True):
        assert cost.deviation is None or abs(cost.deviation) <= 0.01
        assert (cost.deviation is None) == (run.flops is None)
        assert cost.seconds == pytest.approx(cost.flops / 1e10)


def test_the_papers_inference_classes_cost_the_same():
    one = load_plan("paper-inference")
    for size, published in (("small", 3.1e8), ("large", 2.1e9)):
        runs = [run for run in plan_runs(one) if run.size == size]
        for cost in run_costs(one, runs, Path("/no"), 1.0):
            assert cost.inference_flops == pytest.approx(published, rel=0.07)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("families.tokens.like", "bytes", r"not one of byte, .*did you mean 'byte'"),
        ("families.byte.like", "tokens", "leads back to itself: byte -> tokens -> byte"),
        ("families.entropy.scorer", "tables", "did you mean 'table'"),
        ("comparisons.training.families", ["byte", "spice"], "did you mean 'space'"),
        ("comparisons.inference.families", ["byte/m"], "'m' is not one of s"),
        ("comparisons.training.baseline", "other", "baseline"),
        ("comparisons.inference.families", ["byte"], "must name a size too, as byte/s"),
        ("comparisons.inference.baseline", None, "needs one"),
        ("families.by/te", {"label": "x"}, "families"),
        ("runs.0.families", ["blt"], "not one of"),
        ("runs.0.bytes", [1e6], "either flops or bytes"),
        ("tytle", "x", "unknown key 'tytle'; did you mean 'title'"),
    ],
)
def test_mistakes_in_a_plan_are_named(path, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_plan(changed(path, value), "test")


def test_mistakes_in_runs_are_named(tmp_path):
    with pytest.raises(ConfigError, match="has no size 'xl': it has s"):
        plan_runs(plan(runs=[{"sizes": ["xl"], "flops": [1e9]}]))
    with pytest.raises(ConfigError, match="make the same run 'byte_s_1e09flops_s0'"):
        plan_runs(plan(runs=[{"families": ["byte"], "sizes": ["s", "s"], "flops": [1e9]}]))
    one = plan(families={"byte": {"recipe": {"model": {"dimm": 3}}}})
    with pytest.raises(ConfigError, match=r"run 'byte_s_6.2e08flops_s0' .*model\.dimm"):
        run_recipe(one, plan_runs(one)[0])
    one = plan(families={"entropy": {"scorer": None}})
    with pytest.raises(ConfigError, match=r"need entropies; add families\.entropy\.scorer"):
        run_recipe(one, plan_runs(one)[5])
    one = plan(families={"tokens": {"unit_bytes": None}})
    with pytest.raises(ConfigError, match=r"add families\.tokens\.unit_bytes"):
        Resolver(one, tmp_path).resolve(plan_runs(one)[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"train": {"steps": 3}}}, r"train\.steps follows from the plan's runs"),
        ({"base": {"data": {"path": "x"}}}, r"data\.path follows from the plan's text"),
        ({"base": {"data": {"tokenizer": "x"}}}, r"data\.tokenizer .* vocab_size of a family"),
        ({"scorers": {"table": {"recipe": "entropy"}}}, r"scorers\.table: no recipe 'entropy'"),
        ({"families": {"byte": {"sizes": {"s": {"like": "blt-9b"}}}}}, "run 'byte.*'blt-9b'"),
        ({"families": {"byte": {"label": "tokens"}}}, "family has the label 'tokens' too"),
        ({"like": "cpu-tunig"}, "no plan 'cpu-tunig': .* did you mean 'cpu-tuning'"),
    ],
)
def test_mistakes_say_where_in_the_plan_they_stand(changes, message, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(merge(PLAN, changes)))
    with pytest.raises(ConfigError, match=message):
        load_plan(str(path))


@pytest.mark.parametrize(
    ("path", "misspelt", "named"),
    [
        ("families.byte.sizes.s.model.dim", "dmi", r"'model\.dmi'; did you mean 'dim'"),
        ("families.byte.sizes.s.model", "modle", r"'modle'; did you mean 'model'"),
        ("families.byte.recipe.model", "modle", r"'modle'; did you mean 'model'"),
        ("families.byte.label", "lable", r"'families\.byte\.lable'; did you mean 'label'"),
        ("runs.0.sizes", "size", r"'runs\.0\.size'; did you mean 'sizes'"),
        ("base.data.row_bytes", "row_byts", r"'data\.row_byts'; did you mean 'row_bytes'"),
        ("title", "tytle", r"'tytle'; did you mean 'title'"),
    ],
)
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(path, misspelt, named):
    data = json.loads(json.dumps(PLAN))
    *parents, last = path.split(".")
    section = data
    for parent in parents:
        section = section[int(parent) if parent.isdigit() else parent]
    section[misspelt] = section.pop(last)

    def recipe():
        one = parse_plan(data, "test")
        return run_recipe(one, plan_runs(one)[0])

    with pytest.raises(ConfigError, match=f"unknown key {named}"):
        recipe()


def test_an_override_changes_one_family_alone():
    """Sizes that several families share in YAML are one object when they are read."""
    one = load_plan("cpu-study", ["families.megabyte.sizes.xs.model.global_model.dim=32"])
    dims = {
        f: one.families[f].sizes["xs"]["model"]["global_model"]["dim"]
        for f in ("megabyte", "blt-space")
    }
    assert dims == {"megabyte": 32, "blt-space": 64}


def test_shipped_recipes_bring_no_warm_up_of_their_own(tmp_path):
    one = load_plan("paper-grid")
    runs = [run for run in plan_runs(one) if run.size == "400m"]
    found = {Resolver(one, tmp_path).resolve(run).recipe.optimizer.warmup_steps for run in runs}
    assert len(found) == 1


def test_a_plan_whose_scorer_cannot_score_is_refused(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        json.dumps(merge(PLAN, {"scorers": {"table": {"recipe": "byte-1m", "overrides": []}}}))
    )
    with pytest.raises(ConfigError, match=r"scorers\.table: byte-1m is not an entropy model"):
        load_plan(str(path))


def test_what_a_plan_says_of_the_warm_up_stands(tmp_path):
    grid = {"families": ["byte"], "sizes": ["s"], "flops": [3e9]}
    one = plan(runs=[{**grid, "settings": {"optimizer.warmup_steps": [0, 7]}}, grid])
    found = [Resolver(one, tmp_path).resolve(run) for run in plan_runs(one)]
    assert [s.recipe.optimizer.warmup_steps for s in found[:2]] == [0, 7]
    assert found[2].recipe.optimizer.warmup_steps == round(0.05 * found[2].steps)


def test_settings_make_runs_of_their_own():
    grid = {"families": ["byte"], "sizes": ["s"], "flops": [3e8]}
    one = plan(runs=[{**grid, "settings": {"optimizer.learning_rate": [0.1, 0.2]}}])
    runs = plan_runs(one)
    assert [run_recipe(one, run).optimizer.learning_rate for run in runs] == [0.1, 0.2]
    assert runs[1].name == "byte_s_3e08flops_optimizer.learning_rate=0.2_s0"


def test_a_size_may_name_its_recipe_under_the_earlier_key():
    small = {"model": {"global_model": {"num_layers": 3}}}
    found = []
    for key in ("recipe", "like"):
        one = plan(families={"space": {"recipe": {}, "sizes": {"s": {key: "blt-1m", **small}}}})
        run = next(run for run in plan_runs(one) if run.family == "space")
        found.append(run_recipe(one, run))
    assert found[0] == found[1]
    assert found[0].model.global_model.num_layers == 3


RENAMED_SETTINGS = [
    ("optimizer.rates.output", "optimizer.lr_multipliers.output"),
    ("model.ngrams.rows", "model.hash_embeddings.num_buckets"),
]


@pytest.mark.parametrize(("earlier", "present"), RENAMED_SETTINGS)
def test_a_run_is_found_under_the_earlier_and_the_present_names_of_its_settings(
    earlier, present, tmp_path
):
    grid = {"families": ["space"], "sizes": ["s"], "flops": [3e8]}
    runs = [
        plan_runs(plan(runs=[{**grid, "settings": {path: [4]}}]))[0] for path in (earlier, present)
    ]
    assert runs[0].name != runs[1].name
    for number, run in enumerate(runs):
        out = tmp_path / str(number)
        assert run_folder(out, run) == out / "runs" / run.name
        run_folder(out, run).mkdir(parents=True)
        assert {run_folder(out, other) for other in runs} == {out / "runs" / run.name}
    twice = plan(runs=[{**grid, "settings": {path: [4]}} for path in (earlier, present)])
    with pytest.raises(ConfigError, match="make the same run"):
        plan_runs(twice)


@given(st.floats(1e8, 1e11))
def test_a_run_meets_its_budget_or_is_refused(flops):
    one = plan(runs=[{"families": ["byte", "space"], "sizes": ["s"], "flops": [flops]}])
    for run in plan_runs(one):
        few = plan(runs=[{"families": [run.family], "sizes": ["s"], "bytes": [1e4]}])
        step = Resolver(few, Path("/no")).resolve(plan_runs(few)[0])
        steps = flops / step.step_flops
        if abs(round(steps) / steps - 1) > 0.01:
            with pytest.raises(ConfigError, match="raise the budget"):
                Resolver(one, Path("/no")).resolve(run)
        else:
            resolved = Resolver(one, Path("/no")).resolve(run)
            assert abs(resolved.flops / flops - 1) <= 0.01
            assert resolved.flops == resolved.steps * resolved.step_flops


def test_the_scorer_counts_where_the_plan_says_so(tmp_path):
    scorer = {"recipe": "entropy-tiny", "overrides": []}
    grid = [{"families": ["entropy"], "sizes": ["s"], "flops": [1e11]}]
    free = plan(scorers={"table": scorer}, runs=grid)
    counted = plan(scorers={"table": scorer}, runs=grid, include_scorer=True)
    a, b = (Resolver(one, tmp_path).resolve(plan_runs(one)[0]) for one in (free, counted))
    assert a.scorer_step_flops == b.scorer_step_flops > 0
    assert a.flops == pytest.approx(1e11, rel=0.01)
    assert b.flops == pytest.approx(1e11, rel=0.01)
    assert b.steps * (b.step_flops + b.scorer_step_flops) == b.flops
    assert b.steps < a.steps
