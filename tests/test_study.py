"""Studies: text, runs in slices, tables and pages."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bytelm import cli
from bytelm.accounting import training_flops
from bytelm.config import Recipe, parse
from bytelm.data import OPEN_SPANS, Dataset
from bytelm.errors import ConfigError, DataError
from bytelm.kernels.masks import Mask
from bytelm.progress import Progress
from bytelm.study import (
    Plan,
    Resolver,
    check_text,
    find_table,
    plan_runs,
    prepare_text,
    run_all,
    run_costs,
    write_page,
    write_table,
)
from bytelm.study.bootstrap import Bootstrap
from bytelm.study.comparison import compare
from bytelm.study.inheritance import merge
from bytelm.study.measuring import read_slices
from bytelm.study.results import RESULT, finished_result, run_folder
from bytelm.study.runs import run_slice
from bytelm.study.table import read_table
from bytelm.training import Trainer, train
from commands import invoke
from earlier import StopAt, forget_packing
from study_plan import link_prepared, plan, write_text


@pytest.fixture(scope="module")
def study(tmp_path_factory, whole_samples):
    """A whole study of made-up sentences, finished."""
    folder = tmp_path_factory.mktemp("study")
    one = plan(text=write_text(folder))
    out = folder / "out"
    assert prepare_text(one, plan_runs(one), out, Progress())
    # In this process, which saves the start of seven; `test_the_command` starts some.
    resolver = Resolver(one, out)
    for run in plan_runs(one):
        assert run_slice(one, resolver.resolve(run), out)
    assert write_table(one, out) == (7, 7)
    return one, out


def attended_flops(recipe, batch):
    """Training FLOPs of rows of a transformer, from the dense mask."""
    model, (rows, length) = recipe.model, batch.documents.shape
    pairs = int(Mask(batch.documents, model.window).allowed(0, length).sum())
    attention = 4 * model.num_layers * model.num_heads * model.head_width * pairs
    full = 4 * model.num_layers * model.num_heads * model.head_width * length * (length + 1) // 2
    return rows * (training_flops(model, length) - 3 * full) + 3 * attention


def test_only_what_is_asked_for_is_made(study, tmp_path):
    one, out = study
    (tmp_path / "text").symlink_to(out / "text")
    runs = [run for run in plan_runs(one) if run.family == "byte"]
    assert prepare_text(one, runs, tmp_path, Progress())
    assert not (tmp_path / "scored").exists()
    assert not (tmp_path / "tokenizers").exists()
    # A run of tokens can still be costed, by the mean length that the plan gives.
    tokens = plan_runs(one)[2]
    assert tokens.family == "tokens"
    assert run_costs(one, [tokens], tmp_path, 1.0)[0].deviation is not None


def test_the_table_says_what_each_run_was(study):
    _, out = study
    rows = read_table(out / "test").rows
    assert len(rows) == 7
    for row in rows:
        # What the rows hold is estimated beforehand; these are very few.
        assert abs(row["flops"] / row["budget_flops"] - 1) <= 0.03
        assert row["attention"] == "documents"
        recipe = json.loads(row["recipe"])
        assert recipe["data"]["row_bytes"] == 64
        if row["family"] == "tokens":
            # The table's FLOPs are those of the rows of the recipe that is recorded with them.
            trainer = Trainer(parse(Recipe, recipe, "test"))
            batches = [trainer.loader.next_batch() for _ in range(row["steps"])]
            assert row["flops"] == sum(attended_flops(trainer.recipe, b) for b in batches)
            assert row["unit_bytes"] > 1
            # Rows close on tokens, so hardly any room for them is wasted.
            assert row["padded_patches"] < 0.01
    assert len({row["evaluated_bytes"] for row in rows}) == 1


def test_all_families_read_the_same_text_in_nearly_the_same_order(study):
    """Rows hold more or less of it, but stretch after stretch comes from the same place.

    Rows of patches are balanced: what other families have read, they have read or in progress.
    """
    one, out = study
    read = {}
    for number in (0, 2, 4, 5):
        run = plan_runs(one)[number]
        trainer = Trainer(Resolver(one, out).resolve(run).recipe)
        found = []
        for _ in range(40):
            row = trainer.loader._fill(0)
            found += [(s.document, s.begin + n) for s in row.spans for n in range(s.num_positions)]
        documents = trainer.setup.dataset
        read[run.family] = [(documents.document(d), n) for d, n in found]
    assert len(read) == 4
    shortest = min(map(len, read.values()))
    assert shortest > 1000
    first, tokens, *patches = (places[:shortest] for places in read.values())
    assert tokens == first
    for places in patches:
        assert len(set(first) - set(places)) <= OPEN_SPANS * 64


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


@pytest.mark.slow
def test_a_run_in_slices_reaches_the_same_numbers(study, tmp_path):
    one, out = study
    run = plan_runs(one)[-2]
    assert run.family == "entropy"
    link_prepared(out, tmp_path)
    slices, resolved = 0, Resolver(one, tmp_path).resolve(run)
    while not run_slice(one, resolved, tmp_path, time_limit=0.2):
        slices += 1
    assert slices > 0
    whole, sliced = (
        json.loads((folder / "runs" / run.name / RESULT).read_text()) for folder in (out, tmp_path)
    )
    assert sliced["slices"] == slices + 1
    varying = {"seconds", "cpu_seconds", "peak_bytes", "slices", "machines", "recipe"}
    assert {k: v for k, v in whole.items() if k not in varying} == {
        k: v for k, v in sliced.items() if k not in varying
    }


def test_a_finished_study_trains_nothing(study, monkeypatch):
    one, out = study
    before = sorted(path.stat().st_mtime_ns for path in (out / "runs").rglob("*"))
    assert not run_all(one, plan_runs(one), out, workers=1, progress=Progress())
    assert sorted(path.stat().st_mtime_ns for path in (out / "runs").rglob("*")) == before


def test_a_run_of_another_plan_is_not_taken_for_this_ones(study):
    one, out = study
    faster = parse(
        Plan,
        merge(one.model_dump(mode="json"), {"base": {"optimizer": {"learning_rate": 0.1}}}),
        "t",
    )
    with pytest.raises(ConfigError, match=r"another plan or .* \(optimizer.learning_rate"):
        write_table(faster, out)
    with pytest.raises(ConfigError, match="was made by another plan"):
        run_all(faster, plan_runs(faster), out, workers=1, progress=Progress())


def test_a_study_goes_on_without_its_inputs(study):
    one, out = study
    moved = [Path(path) for path in (*one.text.train, *one.text.validation)]
    for path in moved:
        path.rename(path.with_suffix(".away"))
    try:
        assert prepare_text(one, plan_runs(one), out, Progress())
    finally:
        for path in moved:
            path.with_suffix(".away").rename(path)
    other = parse(Plan, merge(one.model_dump(mode="json"), {"text": {"train": ["y"]}}), "t")
    with pytest.raises(ConfigError, match="holds another study's text"):
        prepare_text(other, plan_runs(other), out, Progress())


def test_a_study_that_holds_nothing_out_says_so_and_can_be_mended(study, tmp_path):
    one, _ = study
    nothing = {**one.text.model_dump(mode="json"), "validation": [], "validation_share": 1e-6}
    runs = [run for run in plan_runs(one) if run.family == "byte"]
    with pytest.raises(DataError, match=r"none of 2\d\d documents is held out"):
        prepare_text(plan(text=nothing), runs, tmp_path / "out", Progress())
    mended = plan(text={**nothing, "validation_share": 0.1, "skipped_bytes": 10**6})
    with pytest.raises(ConfigError, match=r"leaves out 1,000,000 of [\d,]+ held-out bytes"):
        prepare_text(mended, runs, tmp_path / "out", Progress())
    mended = plan(text={**nothing, "validation_share": 0.1})
    assert prepare_text(mended, runs, tmp_path / "out", Progress())


def test_a_run_of_other_data_is_not_taken_for_this_ones(study, tmp_path):
    one, out = study
    run = plan_runs(one)[2]
    link_prepared(out, tmp_path)
    result = json.loads((out / "runs" / run.name / RESULT).read_text())
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    for key in ("data", "tokenizer"):
        (folder / RESULT).write_text(json.dumps({**result, key: "other"}))
        with pytest.raises(ConfigError, match=rf"from other data \({key}: 'other' -> "):
            finished_result(one, run, tmp_path)
    (folder / RESULT).write_text(json.dumps(result))
    assert finished_result(one, run, tmp_path) == result


def test_a_run_that_diverges_is_reported(study, tmp_path):
    one, out = study
    link_prepared(out, tmp_path)
    grid = [{"families": ["byte"], "sizes": ["s"], "flops": [6.2e8]}]
    fast = {"optimizer": {"learning_rate": 1e30, "warmup_steps": 0}}
    wild = parse(Plan, {**merge(one.model_dump(mode="json"), {"base": fast}), "runs": grid}, "t")
    resolved = Resolver(wild, tmp_path).resolve(plan_runs(wild)[0])
    assert run_slice(wild, resolved, tmp_path)
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
    link_prepared(out, tmp_path)
    runs = plan_runs(one)[:2]
    (tmp_path / "runs" / runs[0].name).mkdir(parents=True)
    (tmp_path / "runs" / runs[0].name / "notes.txt").write_text("mine")
    problems = run_all(one, runs, tmp_path, workers=1, progress=Progress())
    assert len(problems) == 1
    assert "is not empty and holds no run" in problems[0]
    assert (tmp_path / "runs" / runs[1].name / RESULT).exists()


@pytest.mark.slow
def test_runs_that_began_with_full_rows_go_on_and_are_told_from_others(study, tmp_path):
    """Runs of earlier versions: rows filled in order, and charged as if each were one document."""
    one, out = study
    link_prepared(out, tmp_path)
    run = next(run for run in plan_runs(one) if run.family == "space")
    folder = run_folder(tmp_path, run)
    resolved = Resolver(one, tmp_path).resolve(run)
    data = resolved.recipe.data.model_copy(update={"packing": "in-order", "row_patches": 30})
    old = resolved.recipe.model_copy(update={"data": data})
    train(old, folder, callbacks=[StopAt(3)])
    forget_packing(folder)
    again = Resolver(one, tmp_path).resolve(run)
    assert again.charges_full_rows
    assert again.steps == resolved.steps
    assert again.step_flops > resolved.step_flops
    assert run_slice(one, again, tmp_path)
    result = finished_result(one, run, tmp_path)
    assert result["attention"] == "full rows"
    assert result["flops"] == again.steps * again.step_flops
    assert result["padded_patches"] > 0.1
    others = [other for other in plan_runs(one) if other.family == "byte"]
    (tmp_path / "runs" / others[0].name).symlink_to(out / "runs" / others[0].name)
    write_table(one, tmp_path)
    page = write_page(one, tmp_path / "test", tmp_path / "page").read_text()
    assert "**Budgets differ in what they count:** the attention of 1 runs is counted as if" in page


def test_the_page_is_drawn_from_the_table_alone(study, tmp_path):
    one, out = study
    for name in ("results.parquet", "documents.parquet"):
        (tmp_path / name).write_bytes((out / "test" / name).read_bytes())
    page = write_page(one, tmp_path, tmp_path / "page").read_text()
    for name in ("training.svg", "inference.svg", "units.svg", "frontiers.svg", "costs.svg"):
        assert (tmp_path / "page" / name).stat().st_size > 1000
        assert f"({name})" in page
    assert "7 runs" in page
    assert "left out: tokens/s costs" in page
    assert "too few budgets" in page
    assert "Attention is counted within the documents of each row." in page
    write_page(one, tmp_path, tmp_path / "again")
    drawn = sorted((tmp_path / "page").iterdir())
    assert [path.read_bytes() for path in drawn] == [
        (tmp_path / "again" / path.name).read_bytes() for path in drawn
    ]


def test_the_table_is_found_in_the_folder_of_the_study(study, tmp_path):
    one, out = study
    assert find_table(one, out) == find_table(one, out / "test") == out / "test"
    with pytest.raises(DataError, match=r"neither results\.parquet nor test/results\.parquet$"):
        find_table(one, tmp_path)
    other = one.model_copy(update={"name": "other"})
    with pytest.raises(DataError, match=r"nor other/.*; there are tables in .*/test$"):
        find_table(other, out)


def test_a_dry_run_of_other_text_does_not_take_runs_for_done(study):
    one, out = study
    check_text(one, out)
    other = merge(one.model_dump(mode="json"), {"text": {"train": ["other.txt"]}})
    with pytest.raises(ConfigError, match=r"another study's text \(text\.train: .*other\.txt"):
        check_text(parse(Plan, other, "test"), out)
    assert invoke("study", "cpu-study", "--dry-run", "--out", out) == 1


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
    grid = [{"families": ["byte"], "sizes": ["s"], "flops": [6.2e8, 1.2e9]}]
    path, out = tmp_path / "plan.json", tmp_path / "out"
    path.write_text(json.dumps({**one.model_dump(mode="json"), "runs": grid}))
    status, shown = bytelm(path, "--dry-run", "--out", out)
    assert status == 0
    assert "byte_s_6.2e08flops_s0" in shown
    assert "2 runs, 0 done; left: 1.82e+09 FLOPs" in shown
    assert not out.exists()
    status, shown = bytelm(path, "--out", out, "--only", "6.2e08")
    assert status == 0
    assert "1 of 2 runs finished; the same command resumes" in shown
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
    assert bytelm(path, "--redraw", out, "--out", tmp_path / "page")[0] == 0
    status, shown = bytelm(path, "--dry-run", "--only", "6.2e08", "--only", "1.2e09", "--out", out)
    assert "2 runs, 2 done" in shown
    status, shown = bytelm(path, "--only", "byte", "--only", "blt", "--out", out)
    assert status == 1
    assert "--only blt: no run name contains it" in shown
    status, shown = bytelm("cpu-studie")
    assert status == 1
    assert "no plan 'cpu-studie'" in shown
    assert "did you mean 'cpu-study'" in shown
