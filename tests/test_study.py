"""Studies: plans, equal FLOPs, runs in slices, and what is read from the table."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bytelm import cli
from bytelm.accounting import training_flops
from bytelm.config import TransformerConfig, parse
from bytelm.data import Dataset
from bytelm.errors import ConfigError, DataError
from bytelm.study import (
    Plan,
    load_plan,
    plan_names,
    plan_runs,
    prepare_text,
    run_all,
    run_cost,
    settle_run,
    write_page,
    write_table,
)
from bytelm.study.comparison import compare
from bytelm.study.fit import (
    Bootstrap,
    PowerLaw,
    find_crossover,
    fit_power_law,
    seed_spread,
    through,
)
from bytelm.study.measuring import read_slices
from bytelm.study.plan import merge, run_recipe
from bytelm.study.runs import RESULT, finished_result, run_slice
from bytelm.study.table import Results, read_table
from bytelm.training import Trainer

WORDS = ["the", "patch", "of", "bytes", "is", "cut", "where", "entropy", "rises", "\n"]
TINY = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24}
PLAN = {
    "name": "test",
    "title": "A test",
    "text": {"train": ["x.jsonl"], "validation": ["held.jsonl"], "evaluated_bytes": 3000},
    "scorers": {"table": {"recipe": "entropy-ngram", "overrides": ["model.min_count=1"]}},
    "base": {
        "data": {"row_bytes": 64, "rows_per_step": 2},
        "train": {"validation_bytes": 500, "validate_every": 1000, "checkpoint_every": 1000},
    },
    "families": {
        "byte": {
            "label": "bytes",
            "recipe": {"model": {"kind": "transformer"}},
            "sizes": {"s": {"model": {**TINY, "dim": 32, "ffn_dim": 48}}},
        },
        "tokens": {"label": "tokens", "like": "byte", "vocab_size": 270, "unit_bytes": 2},
        "space": {
            "label": "space patches",
            "unit_bytes": 5,
            "recipe": {
                "model": {
                    "kind": "blt",
                    "cross_attention": {"num_heads": 2},
                    "ngrams": {"rows": 53},
                },
                "patching": {"kind": "space"},
            },
            "sizes": {
                "s": {
                    "model": {
                        "local": {**TINY, "num_layers": None, "decoder_layers": 1, "window": 8},
                        "global_model": TINY,
                    }
                }
            },
        },
        "entropy": {
            "label": "entropy patches",
            "like": "space",
            "scorer": "table",
            "recipe": {"patching": {"kind": "entropy", "patch_size": 3.0}},
        },
    },
    "runs": [
        {"families": ["byte", "tokens"], "sizes": ["s"], "flops": [6.0e8, 8.0e8]},
        {"families": ["space", "entropy"], "sizes": ["s"], "flops": [6.0e8]},
        {"families": ["byte"], "sizes": ["s"], "flops": [6.0e8], "seeds": [1]},
    ],
    "comparisons": {
        "training": {
            "kind": "training",
            "title": "At equal FLOPs",
            "families": ["byte", "tokens", "space", "entropy"],
            "baseline": "byte",
        },
        "inference": {
            "kind": "inference",
            "title": "At equal inference",
            "families": ["byte/s", "tokens/s"],
            "baseline": "byte/s",
        },
        "all": {"kind": "table", "title": "All", "families": ["byte", "space"]},
    },
}
del PLAN["families"]["space"]["sizes"]["s"]["model"]["local"]["num_layers"]


def plan(**changes) -> Plan:
    return parse(Plan, merge(PLAN, changes), "test")


def changed(path, value):
    *parents, last = path.split(".")
    data = json.loads(json.dumps(PLAN))
    at = data
    for parent in parents:
        at = at[int(parent) if parent.isdigit() else parent]
    at[last] = value
    return data


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A whole study of made-up sentences, finished."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 60))) for _ in range(300)]
    write = lambda name, some: (folder / name).write_text(  # noqa: E731
        "\n".join(json.dumps({"text": text}) for text in some)
    )
    write("x.jsonl", texts[:260])
    write("held.jsonl", [*texts[260:], texts[3], texts[7]])
    paths = {"train": [str(folder / "x.jsonl")], "validation": [str(folder / "held.jsonl")]}
    one = plan(text=paths)
    out = folder / "out"
    assert prepare_text(one, plan_runs(one), out, Console(quiet=True))
    # Here, which saves the start of as many processes; `test_the_command` starts some.
    for run in plan_runs(one):
        assert run_slice(one, run, out)
    assert write_table(one, out) == (7, 7)
    return one, out


@pytest.mark.parametrize("name", plan_names())
def test_a_shipped_plan_is_costed_without_data(name, tmp_path):
    one = load_plan(name)
    runs = plan_runs(one)
    costs = [run_cost(one, run, tmp_path, 1e10) for run in runs]
    for run, cost in zip(runs, costs, strict=True):
        assert cost.deviation is None or abs(cost.deviation) <= 0.01
        assert (cost.deviation is None) == (run.flops is None)
        assert cost.seconds == pytest.approx(cost.flops / 1e10)


def test_the_papers_inference_classes_cost_the_same():
    one = load_plan("paper-inference")
    for size, published in (("small", 3.1e8), ("large", 2.1e9)):
        runs = [run for run in plan_runs(one) if run.size == size]
        for run in runs:
            cost = run_cost(one, run, Path("/no"), 1.0)
            assert cost.inference_flops == pytest.approx(published, rel=0.07)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("families.tokens.like", "bytes", r"none of byte, .*did you mean 'byte'"),
        ("families.byte.like", "tokens", "is itself like others"),
        ("families.entropy.scorer", "tables", "did you mean 'table'"),
        ("comparisons.training.families", ["byte", "spice"], "did you mean 'space'"),
        ("comparisons.inference.families", ["byte/m"], "'m' is none of s"),
        ("comparisons.training.baseline", "other", "baseline"),
        ("comparisons.inference.families", ["byte"], "must name a size too, as byte/s"),
        ("comparisons.inference.baseline", None, "needs one"),
        ("families.by/te", {"label": "x"}, "families"),
        ("runs.0.families", ["blt"], "none of"),
        ("runs.0.bytes", [1e6], "either flops or bytes"),
        ("tytle", "x", "unknown key 'tytle'; did you mean 'title'"),
    ],
)
def test_mistakes_in_a_plan_are_named(path, value, message):
    with pytest.raises(ConfigError, match=message):
        parse(Plan, changed(path, value), "test")


def test_mistakes_in_runs_are_named(tmp_path):
    with pytest.raises(ConfigError, match="has no size 'xl': it has s"):
        plan_runs(plan(runs=[{"sizes": ["xl"], "flops": [1e9]}]))
    with pytest.raises(ConfigError, match="make the same run 'byte_s_1e09flops_s0'"):
        plan_runs(plan(runs=[{"families": ["byte"], "sizes": ["s", "s"], "flops": [1e9]}]))
    one = plan(families={"byte": {"recipe": {"model": {"dimm": 3}}}})
    with pytest.raises(ConfigError, match=r"run 'byte_s_6e08flops_s0' .*model\.dimm"):
        run_recipe(one, plan_runs(one)[0])
    one = plan(families={"entropy": {"scorer": None}})
    with pytest.raises(ConfigError, match=r"need entropies; add families\.entropy\.scorer"):
        run_recipe(one, plan_runs(one)[5])
    one = plan(families={"tokens": {"unit_bytes": None}})
    with pytest.raises(ConfigError, match=r"add families\.tokens\.unit_bytes"):
        settle_run(one, plan_runs(one)[2], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"train": {"steps": 3}}}, r"train\.steps follows from the plan's runs"),
        ({"base": {"data": {"path": "x"}}}, r"data\.path follows from the plan's text"),
        ({"base": {"data": {"tokenizer": "x"}}}, r"data\.tokenizer .* vocab_size of a family"),
        ({"scorers": {"table": {"recipe": "entropy"}}}, r"scorers\.table: no recipe 'entropy'"),
        ({"families": {"byte": {"sizes": {"s": {"recipe": "blt-9b"}}}}}, "run 'byte.*'blt-9b'"),
        ({"families": {"byte": {"label": "tokens"}}}, r"label: 'tokens' is another's too"),
        ({"like": "cpu-tuning"}, "'cpu-tuning' is itself like another plan"),
    ],
)
def test_mistakes_say_where_in_the_plan_they_stand(changes, message, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps(merge(PLAN, changes)))
    with pytest.raises(ConfigError, match=message):
        load_plan(str(path))


def test_a_plan_goes_over_another(tmp_path):
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
    assert not mine.comparisons
    one, same = (run_recipe(mine, run).optimizer.learning_rate for run in plan_runs(mine))
    assert (one, same) == (0.5, 8e-3)


def test_an_override_changes_one_family_alone():
    """Sizes that several families share in YAML are one object when they are read."""
    one = load_plan("cpu-study", ["families.megabyte.sizes.xs.model.global_model.dim=32"])
    dims = {
        f: one.sizes(f)["xs"]["model"]["global_model"]["dim"] for f in ("megabyte", "blt-space")
    }
    assert dims == {"megabyte": 32, "blt-space": 64}


def test_shipped_recipes_bring_no_warm_up_of_their_own(tmp_path):
    one = load_plan("paper-grid")
    runs = [run for run in plan_runs(one) if run.size == "400m"]
    found = {settle_run(one, run, tmp_path).recipe.optimizer.warmup_steps for run in runs}
    assert len(found) == 1


def test_only_what_is_asked_for_is_made(study, tmp_path):
    one, out = study
    (tmp_path / "text").symlink_to(out / "text")
    runs = [run for run in plan_runs(one) if run.family == "byte"]
    assert prepare_text(one, runs, tmp_path, Console(quiet=True))
    assert not (tmp_path / "scored").exists()
    assert not (tmp_path / "tokenizers").exists()
    # A run of tokens can still be costed, by the mean length that the plan gives.
    tokens = plan_runs(one)[2]
    assert tokens.family == "tokens"
    assert run_cost(one, tokens, tmp_path, 1.0).deviation is not None


def test_a_plan_whose_scorer_cannot_score_is_refused(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        json.dumps(merge(PLAN, {"scorers": {"table": {"recipe": "byte-1m", "overrides": []}}}))
    )
    with pytest.raises(ConfigError, match=r"scorers\.table: byte-1m is no entropy model"):
        load_plan(str(path))


def test_what_a_plan_says_of_the_warm_up_stands(tmp_path):
    grid = {"families": ["byte"], "sizes": ["s"], "flops": [3e9]}
    one = plan(runs=[{**grid, "settings": {"optimizer.warmup_steps": [0, 7]}}, grid])
    found = [settle_run(one, run, tmp_path) for run in plan_runs(one)]
    assert [s.recipe.optimizer.warmup_steps for s in found[:2]] == [0, 7]
    assert found[2].recipe.optimizer.warmup_steps == round(0.05 * found[2].steps)


def test_settings_make_runs_of_their_own():
    grid = {"families": ["byte"], "sizes": ["s"], "flops": [3e8]}
    one = plan(runs=[{**grid, "settings": {"optimizer.learning_rate": [0.1, 0.2]}}])
    runs = plan_runs(one)
    assert [run_recipe(one, run).optimizer.learning_rate for run in runs] == [0.1, 0.2]
    assert runs[1].name == "byte_s_3e08flops_optimizer.learning_rate=0.2_s0"


@given(st.floats(1e8, 1e11))
def test_a_run_meets_its_budget_or_is_refused(flops):
    one = plan(runs=[{"families": ["byte", "space"], "sizes": ["s"], "flops": [flops]}])
    for run in plan_runs(one):
        step = settle_run(plan(), plan_runs(plan())[0 if run.family == "byte" else 4], Path("/no"))
        steps = flops / step.step_flops
        if abs(round(steps) / steps - 1) > 0.01:
            with pytest.raises(ConfigError, match="raise the budget"):
                settle_run(one, run, Path("/no"))
        else:
            settled = settle_run(one, run, Path("/no"))
            assert abs(settled.flops / flops - 1) <= 0.01
            assert settled.flops == settled.steps * settled.step_flops


def test_the_scorer_counts_where_the_plan_says_so(tmp_path):
    scorer = {"recipe": "entropy-tiny", "overrides": []}
    grid = [{"families": ["entropy"], "sizes": ["s"], "flops": [1e11]}]
    free = plan(scorers={"table": scorer}, runs=grid)
    counted = plan(scorers={"table": scorer}, runs=grid, include_scorer=True)
    a, b = (settle_run(one, plan_runs(one)[0], tmp_path) for one in (free, counted))
    assert a.scorer_step_flops == b.scorer_step_flops > 0
    assert a.flops == pytest.approx(1e11, rel=0.01)
    assert b.flops == pytest.approx(1e11, rel=0.01)
    assert b.steps * (b.step_flops + b.scorer_step_flops) == b.flops
    assert b.steps < a.steps


def test_the_table_says_what_each_run_was(study):
    _, out = study
    rows = read_table(out / "test").rows
    assert len(rows) == 7
    for row in rows:
        assert abs(row["flops"] / row["budget_flops"] - 1) <= 0.01
        recipe = json.loads(row["recipe"])
        assert recipe["data"]["row_bytes"] == 64
        if row["family"] == "tokens":
            # The table's FLOPs are those of the recipe that is recorded beside them.
            config = parse(TransformerConfig, recipe["model"], "test")
            step = 2 * training_flops(config, recipe["data"]["row_patches"])
            assert row["flops"] == row["steps"] * step
            assert row["unit_bytes"] > 1
            # Rows close on tokens, so hardly any room for them is wasted.
            assert row["padded_patches"] < 0.01
    assert len({row["evaluated_bytes"] for row in rows}) == 1


def test_all_families_read_the_same_text_in_the_same_order(study):
    """Rows hold more or less of it, but stretch after stretch comes from the same place."""
    one, out = study
    read = {}
    for number in (0, 2, 4, 5):
        run = plan_runs(one)[number]
        settled = settle_run(one, run, out)
        trainer = Trainer(settled.recipe)
        found = []
        for _ in range(40):
            row = trainer.loader._fill(0)
            found += [
                (s.document, s.begin + n) for s in row.stretches for n in range(s.num_positions)
            ]
        documents = trainer.setup.dataset
        read[run.family] = [(documents.document(d), n) for d, n in found]
    assert len(read) == 4
    shortest = min(map(len, read.values()))
    assert shortest > 1000
    first, *others = (places[:shortest] for places in read.values())
    assert all(other == first for other in others)


def test_no_held_out_document_is_in_training(study):
    _, out = study
    train, held_out = (Dataset(out / "text", split) for split in ("train", "validation"))
    trained = {train.document(number) for number in range(len(train))}
    evaluated = {held_out.document(number) for number in range(len(held_out))}
    # Two documents stand in both inputs.
    assert len(train) == 258
    assert not trained & evaluated
    table = read_table(out / "test")
    assert table.num_bytes.sum() == table.rows[0]["evaluated_bytes"]


def test_the_table_holds_what_its_documents_say(study):
    _, out = study
    results = read_table(out / "test")
    found = results.bits_per_byte(np.ones(len(results.num_bytes)))
    assert found == pytest.approx([row["bpb"] for row in results.rows])
    by_source = results.by_source(0)
    assert set(by_source) <= {"held", "x"}
    assert min(by_source.values()) <= found[0] <= max(by_source.values())


def test_a_run_in_slices_reaches_the_same_numbers(study, tmp_path):
    one, out = study
    run = plan_runs(one)[-2]
    assert run.family == "entropy"
    for part in ("text", "scored", "scorers", "tokenizers", "settled.json", "text.json"):
        (tmp_path / part).symlink_to(out / part)
    slices = 0
    while not run_slice(one, run, tmp_path, time_limit=0.2):
        slices += 1
    assert slices > 0
    whole, sliced = (
        json.loads((folder / "runs" / run.name / RESULT).read_text()) for folder in (out, tmp_path)
    )
    assert sliced["slices"] == slices + 1
    varying = {"seconds", "peak_bytes", "slices", "machines", "recipe"}
    assert {k: v for k, v in whole.items() if k not in varying} == {
        k: v for k, v in sliced.items() if k not in varying
    }


def test_a_finished_study_trains_nothing(study, monkeypatch):
    one, out = study
    before = sorted(path.stat().st_mtime_ns for path in (out / "runs").rglob("*"))
    assert not run_all(one, plan_runs(one), out, workers=1, console=Console(quiet=True))
    assert sorted(path.stat().st_mtime_ns for path in (out / "runs").rglob("*")) == before


def test_a_run_of_another_plan_is_not_taken_for_this_ones(study):
    one, out = study
    faster = parse(
        Plan,
        merge(one.model_dump(mode="json"), {"base": {"optimizer": {"learning_rate": 0.1}}}),
        "t",
    )
    with pytest.raises(ConfigError, match=r"another plan, .* \(optimizer.learning_rate"):
        write_table(faster, out)
    with pytest.raises(ConfigError, match="was made by another plan"):
        run_all(faster, plan_runs(faster), out, workers=1, console=Console(quiet=True))


def test_a_study_goes_on_without_its_inputs(study):
    one, out = study
    moved = [Path(path) for path in (*one.text.train, *one.text.validation)]
    for path in moved:
        path.rename(path.with_suffix(".away"))
    try:
        assert prepare_text(one, plan_runs(one), out, Console(quiet=True))
    finally:
        for path in moved:
            path.with_suffix(".away").rename(path)
    other = parse(Plan, merge(one.model_dump(mode="json"), {"text": {"train": ["y"]}}), "t")
    with pytest.raises(ConfigError, match="holds another study's text"):
        prepare_text(other, plan_runs(other), out, Console(quiet=True))


def test_a_study_that_holds_nothing_out_says_so_and_can_be_mended(study, tmp_path):
    one, _ = study
    nothing = {**one.text.model_dump(mode="json"), "validation": [], "validation_share": 1e-6}
    runs = [run for run in plan_runs(one) if run.family == "byte"]
    with pytest.raises(DataError, match=r"of 2\d\d documents none is held out"):
        prepare_text(plan(text=nothing), runs, tmp_path / "out", Console(quiet=True))
    mended = plan(text={**nothing, "validation_share": 0.1, "skipped_bytes": 10**6})
    with pytest.raises(ConfigError, match=r"leaves out 1,000,000 of [\d,]+ held-out bytes"):
        prepare_text(mended, runs, tmp_path / "out", Console(quiet=True))
    mended = plan(text={**nothing, "validation_share": 0.1})
    assert prepare_text(mended, runs, tmp_path / "out", Console(quiet=True))


def test_a_run_of_other_data_is_not_taken_for_this_ones(study, tmp_path):
    one, out = study
    run = plan_runs(one)[2]
    for part in ("text", "tokenizers", "settled.json", "text.json"):
        (tmp_path / part).symlink_to(out / part)
    result = json.loads((out / "runs" / run.name / RESULT).read_text())
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    for key in ("data", "tokenizer"):
        (folder / RESULT).write_text(json.dumps({**result, key: "other"}))
        with pytest.raises(ConfigError, match=rf"of other data \({key}: other -> "):
            finished_result(one, run, tmp_path)
    (folder / RESULT).write_text(json.dumps(result))
    assert finished_result(one, run, tmp_path) == result


def test_a_run_that_diverges_is_told(study, tmp_path):
    one, out = study
    for part in ("text", "scored", "scorers", "tokenizers", "settled.json", "text.json"):
        (tmp_path / part).symlink_to(out / part)
    grid = [{"families": ["byte"], "sizes": ["s"], "flops": [6e8]}]
    fast = {"optimizer": {"learning_rate": 1e30, "warmup_steps": 0}}
    wild = parse(Plan, {**merge(one.model_dump(mode="json"), {"base": fast}), "runs": grid}, "t")
    assert run_slice(wild, plan_runs(wild)[0], tmp_path)
    assert write_table(wild, tmp_path) == (1, 1)
    found = read_table(tmp_path / "test")
    assert not found.rows
    assert "no longer finite" in found.failures[0]
    with pytest.raises(DataError, match="no run that was trained to its end"):
        write_page(wild, tmp_path / "test", tmp_path / "page")


def test_a_line_cut_short_by_a_power_cut_is_dropped(tmp_path):
    path = tmp_path / "slices.jsonl"
    path.write_text('{"steps": 1}\n{"ste')
    assert read_slices(tmp_path) == [{"steps": 1}]
    with path.open("a") as file:
        file.write('{"steps": 2}\n')
    assert read_slices(tmp_path) == [{"steps": 1}, {"steps": 2}]


@pytest.mark.slow
def test_a_damaged_run_is_reported_and_the_others_go_on(study, tmp_path):
    one, out = study
    for part in ("text", "scored", "scorers", "tokenizers", "settled.json", "text.json"):
        (tmp_path / part).symlink_to(out / part)
    runs = plan_runs(one)[:2]
    (tmp_path / "runs" / runs[0].name).mkdir(parents=True)
    (tmp_path / "runs" / runs[0].name / "notes.txt").write_text("mine")
    problems = run_all(one, runs, tmp_path, workers=1, console=Console(quiet=True))
    assert len(problems) == 1
    assert "is not empty and holds no run" in problems[0]
    assert (tmp_path / "runs" / runs[1].name / RESULT).exists()


def test_the_page_is_drawn_from_the_table_alone(study, tmp_path):
    one, out = study
    for name in ("results.parquet", "documents.parquet"):
        (tmp_path / name).write_bytes((out / "test" / name).read_bytes())
    page = write_page(one, tmp_path, tmp_path / "page").read_text()
    for name in ("training.svg", "inference.svg", "units.svg", "costs.svg"):
        assert (tmp_path / "page" / name).stat().st_size > 1000
        assert f"({name})" in page
    assert "7 runs" in page
    assert "left out: tokens/s costs" in page
    assert "too few budgets" in page
    write_page(one, tmp_path, tmp_path / "again")
    drawn = sorted((tmp_path / "page").iterdir())
    assert [path.read_bytes() for path in drawn] == [
        (tmp_path / "again" / path.name).read_bytes() for path in drawn
    ]


def test_a_missing_or_mixed_table_is_refused(study, tmp_path):
    _, out = study
    with pytest.raises(DataError, match="holds no table"):
        read_table(tmp_path)
    rows = pq.read_table(out / "test" / "documents.parquet").to_pylist()
    for name in ("results.parquet", "documents.parquet"):
        (tmp_path / name).write_bytes((out / "test" / name).read_bytes())
    rows[-1]["bytes"] += 1
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "documents.parquet")
    with pytest.raises(DataError, match="measured on different text"):
        read_table(tmp_path)


# Fits -------------------------------------------------------------------------------------------


def made_up(laws, budgets, seeds=1, noise=0.0, documents=200, seed=0):
    """A table whose families follow known laws, with documents of uneven length and difficulty."""
    rng = np.random.default_rng(seed)
    num_bytes = rng.integers(200, 2000, documents).astype(float)
    hardness = rng.normal(1, 0.2, documents)
    hardness *= num_bytes.sum() / (hardness * num_bytes).sum()
    rows, nats = [], []
    for family, law in laws.items():
        for budget in budgets:
            for number in range(seeds):
                bpb = float(law(np.array([budget]))[0]) + rng.normal(0, noise)
                rows.append(
                    {
                        "family": family,
                        "size": "s",
                        "label": family,
                        "seed": number,
                        "flops": budget,
                        "budget_flops": budget,
                        "budget_bytes": None,
                        "settings": "{}",
                        "run": f"{family}{budget}{number}",
                    }
                )
                nats.append(bpb * np.log(2) * num_bytes * hardness)
    return Results(rows, np.array(nats), num_bytes, ("a",) * documents)


def curves_of(results, families):
    bootstrap = Bootstrap(results, replicates=300)
    curves = []
    for family in families:
        rows = [n for n, row in enumerate(results.rows) if row["family"] == family]
        budgets = sorted({results.rows[n]["flops"] for n in rows})
        groups = [[[n for n in rows if results.rows[n]["flops"] == b]] for b in budgets]
        curves.append(bootstrap.curve(family, groups, "flops"))
    return curves


@given(st.floats(0.02, 0.4), st.floats(0.5, 3))
def test_a_law_is_recovered(exponent, scale):
    law = PowerLaw(0.0, float(np.log(scale) + exponent * np.log(1e12)), exponent)
    x = np.geomspace(1e12, 3e13, 3)
    found = fit_power_law(x, law(x))
    assert found.exponent == pytest.approx(exponent, rel=1e-6)
    assert found(x) == pytest.approx(law(x))


def test_a_floor_is_found_where_there_are_budgets_enough():
    law = PowerLaw(0.8, float(np.log(2) + 0.3 * np.log(1e12)), 0.3)
    x = np.geomspace(1e12, 1e15, 7)
    found = fit_power_law(x, law(x))
    assert found.floor == pytest.approx(0.8, abs=0.1)
    assert found(x) == pytest.approx(law(x), rel=0.01)


def test_intervals_hold_the_truth_and_the_noise_of_seeds():
    law = PowerLaw(0.0, float(np.log(2.5) + 0.08 * np.log(1e12)), 0.08)
    results = made_up({"a": law}, [1e12, 5e12, 3e13], seeds=3, noise=0.02)
    spread = seed_spread(results, results.bits_per_byte(np.ones(200)))
    assert 0.003 < spread[0] < 0.02  # of about 2.2 bits
    assert spread[1] == 6
    (curve,) = curves_of(results, ["a"])
    low, high = curve.exponent_interval()
    assert low < 0.08 < high
    assert all(curve.low < curve.bpb)
    assert all(curve.bpb < curve.high)


def crossing_laws():
    one = PowerLaw(0.0, float(np.log(3.0) + 0.10 * np.log(1e12)), 0.10)
    # Worse at first and steeper: equal at 1e13.
    other = PowerLaw(0.0, float(np.log(one(np.array([1e13]))[0]) + 0.16 * np.log(1e13)), 0.16)
    return {"base": one, "new": other}


def test_a_crossover_is_found_with_its_interval():
    results = made_up(crossing_laws(), [1e12, 5e12, 3e13], seeds=2, noise=0.003)
    base, new = curves_of(results, ["base", "new"])
    found = find_crossover(new, base)
    assert found.verdict == "below from there on"
    assert found.low < found.x < found.high
    assert found.x == pytest.approx(1e13, rel=0.3)
    other = find_crossover(base, new)
    assert other.verdict == "below up to there"
    assert other.x == pytest.approx(found.x)


def test_only_budgets_that_both_were_run_at_are_compared():
    laws = crossing_laws()
    (low,) = curves_of(made_up({"a": laws["base"]}, [1e11, 2e11]), ["a"])
    (high,) = curves_of(made_up({"b": laws["new"]}, [2e11, 5e12]), ["b"])
    for one, other in ((low, high), (high, low)):
        assert "share fewer than two" in find_crossover(one, other).verdict
    far = through("far", low.budgets, low.x * 100, low.bpb, low.drawn)
    assert "does not overlap" in find_crossover(far, low).verdict
    # A budget that one of them has alone, whatever it says, changes nothing.
    (base,) = curves_of(made_up({"base": laws["base"]}, [1e12, 5e12, 3e13], noise=0.001), ["base"])
    (short,) = curves_of(made_up({"new": laws["new"]}, [1e12, 5e12], noise=0.001), ["new"])
    strange = replace(base, bpb=base.bpb * [1, 1, 2], drawn=base.drawn * [1, 1, 2])
    assert find_crossover(short, base) == find_crossover(short, strange)


def test_laws_alone_do_not_put_a_curve_below_another():
    """Three budgets in a line, of which one lies on the other side."""
    laws = {"base": crossing_laws()["base"]}
    (base,) = curves_of(made_up(laws, [1e12, 5e12, 3e13]), ["base"])
    lower = through("lower", base.budgets, base.x, base.bpb - 0.1, base.drawn - 0.1)
    assert "below at all budgets" in find_crossover(lower, base).verdict
    x, *differences = lower.minus(base)
    assert list(x) == [1e12, 5e12, 3e13]
    assert np.array(differences) == pytest.approx(-0.1)
    bump = np.array([-0.1, 0.01, -0.1])
    bumped = through("bumped", base.budgets, base.x, base.bpb + bump, base.drawn + bump)
    grid = np.geomspace(1e12, 3e13)
    assert (bumped.law(grid) < base.law(grid)).all()
    assert "cannot be bounded" in find_crossover(bumped, base).verdict


def test_where_the_runs_are_unsure_their_shares_are_told():
    laws = {"base": crossing_laws()["base"]}
    (base,) = curves_of(made_up(laws, [1e12, 5e12]), ["base"])
    noise = np.random.default_rng(0).normal(0, 0.05, base.drawn.shape)
    near = through("near", base.budgets, base.x, base.bpb - 0.02, base.drawn - 0.02 + noise)
    verdict = find_crossover(near, base).verdict
    assert "cannot be bounded by the runs" in verdict
    shares = [float(share) for share in re.findall(r"([\d.]+)% at", verdict)]
    assert shares == pytest.approx([65.5, 65.5], abs=10)  # of a normal above -0.4 deviations


def test_a_table_without_runs_is_refused():
    empty = Results([], np.zeros((0, 3)), np.ones(3), ("a",) * 3)
    with pytest.raises(DataError, match="no run"):
        Bootstrap(empty)


def test_a_crossover_far_beyond_the_budgets_is_refused():
    results = made_up(crossing_laws(), [1e10, 2e10, 4e10], seeds=2, noise=0.003)
    base, new = curves_of(results, ["base", "new"])
    found = find_crossover(new, base)
    assert found.x is None
    assert "above at all budgets" in found.verdict


def test_a_crossover_that_only_the_laws_have_is_refused():
    """Runs that approach each other and bend apart again: lines through them cross in between."""
    laws = {"base": crossing_laws()["base"]}
    (base,) = curves_of(made_up(laws, [1e12, 5e12, 3e13]), ["base"])
    ahead = np.array([0.3, -0.2, 0.02])
    bent = through("bent", base.budgets, base.x, base.bpb + ahead, base.drawn + ahead)
    ends = np.array([1e12, 3e13])
    assert list(bent.law(ends) > base.law(ends)) == [True, False]
    assert find_crossover(bent, base).x is None


def test_a_crossover_in_noise_is_refused():
    results = made_up(crossing_laws(), [5e12, 1e13, 2e13], seeds=2, noise=0.1)
    base, new = curves_of(results, ["base", "new"])
    found = find_crossover(new, base)
    assert found.x is None
    assert "cannot be bounded" in found.verdict


def test_one_budget_is_not_fitted():
    law = crossing_laws()["base"]
    results = made_up({"a": law, "b": law}, [1e12])
    a, b = curves_of(results, ["a", "b"])
    assert a.law is None
    assert "not fitted" in find_crossover(a, b).verdict


def test_the_best_size_of_each_budget_is_taken_anew_in_every_replicate():
    law = crossing_laws()["base"]
    results = made_up({"a": law}, [1e12], seeds=2, noise=0.05, seed=4)
    bootstrap = Bootstrap(results, replicates=50)
    curve = bootstrap.curve("a", [[[0], [1]]], "flops")
    assert curve.bpb[0] == min(bootstrap.bpb)
    best = bootstrap.replicates.min(1)
    assert curve.low[0] == pytest.approx(np.quantile(best, 0.025))
    assert curve.high[0] == pytest.approx(np.quantile(best, 0.975))


def test_the_same_draw_of_documents_serves_all_runs():
    """Two runs whose documents are equally hard differ by the same amount in every replicate."""
    laws = {"a": crossing_laws()["base"], "b": crossing_laws()["base"]}
    results = made_up(laws, [1e12])
    bootstrap = Bootstrap(results, replicates=50)
    assert bootstrap.replicates[:, 0] == pytest.approx(bootstrap.replicates[:, 1])
    assert np.ptp(bootstrap.replicates[:, 0]) > 0
    assert bootstrap.interval(0, [1]) == pytest.approx((0, 0), abs=1e-9)
    low, high = bootstrap.interval(0)
    assert low < high


def test_the_mix_of_sources_is_not_drawn():
    """Sources whose documents are alike within, however unlike each other, leave nothing open."""
    results = made_up({"a": crossing_laws()["base"]}, [1e12], documents=40)
    sources = np.array(["easy"] * 10 + ["hard"] * 30)
    nats = results.num_bytes * np.where(sources == "easy", 1.0, 3.0)
    alike = replace(results, nats=nats[None], sources=tuple(sources))
    drawn = Bootstrap(alike, replicates=50)
    assert drawn.replicates == pytest.approx(drawn.bpb[0])
    assert np.ptp(Bootstrap(replace(alike, sources=("one",) * 40), replicates=50).replicates) > 0


def test_comparisons_of_a_study(study):
    one, out = study
    bootstrap = Bootstrap(read_table(out / "test", one), replicates=50)
    training = compare("training", one, bootstrap)
    assert [curve.name for curve in training.curves] == [
        "bytes",
        "tokens",
        "space patches",
        "entropy patches",
    ]
    assert [len(curve.x) for curve in training.curves] == [2, 2, 1, 1]
    assert [curve.law is None for curve in training.curves] == [False, False, True, True]
    assert len(training.crossovers) == 3
    assert len(compare("all", one, bootstrap).rows) == 4


@pytest.mark.slow
def test_the_command(study, tmp_path, monkeypatch, capsys):
    """Dry run, slices until all is done, and the page again from the table alone."""

    def bytelm(*arguments):
        monkeypatch.setattr(sys, "argv", ["bytelm", "study", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    one, _ = study
    grid = [{"families": ["byte"], "sizes": ["s"], "flops": [6e8, 1.2e9]}]
    path, out = tmp_path / "plan.json", tmp_path / "out"
    path.write_text(json.dumps({**one.model_dump(mode="json"), "runs": grid}))
    status, shown = bytelm(path, "--dry-run", "--out", out)
    assert status == 0
    assert "byte_s_6e08flops_s0" in shown
    assert "2 runs, 0 done; left: 1.8e+09 FLOPs" in shown
    assert not out.exists()
    status, shown = bytelm(path, "--out", out, "--only", "6e08")
    assert status == 0
    assert "1 of 2 runs finished; the same command goes on" in shown
    status, shown = bytelm(path, "--out", out, "--time-limit", "0s")
    assert "1 of 2 runs finished" in shown
    status, shown = bytelm(path, "--out", out)
    assert "2 of 2 runs finished" in shown
    assert "the same command" not in shown
    status, shown = bytelm(path, "--dry-run", "--out", out)
    assert "2 runs, 2 done; left: 0 FLOPs" in shown
    status, shown = bytelm(path, "--redraw", out / "test", "--out", tmp_path / "page")
    assert status == 0
    page = (tmp_path / "page" / "results.md").read_text()
    assert page == (out / "test" / "results.md").read_text()
    status, shown = bytelm(path, "--dry-run", "--only", "6e08", "--only", "1.2e09", "--out", out)
    assert "2 runs, 2 done" in shown
    status, shown = bytelm(path, "--only", "byte", "--only", "blt", "--out", out)
    assert status == 1
    assert "--only blt: no run of the plan has a name" in shown
    status, shown = bytelm("cpu-studie")
    assert status == 1
    assert "no plan 'cpu-studie'" in shown
    assert "did you mean 'cpu-study'" in shown
