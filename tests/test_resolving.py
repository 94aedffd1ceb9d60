"""Resolving: once in an invocation, in the parent process, and not at all for finished runs."""

import json
import pickle
import signal
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bytelm.config import Recipe, parse
from bytelm.errors import ConfigError
from bytelm.progress import Progress
from bytelm.study import (
    Resolver,
    load_plan,
    plan_runs,
    prepare_text,
    resolving,
    results,
    run_all,
    run_costs,
    runs,
    write_page,
    write_table,
)
from bytelm.study.measuring import describe
from bytelm.study.results import RESULT, finished_result, recipe_changes, run_folder, write_result
from study_plan import link_prepared, plan, write_text

QUIET = Progress()
TABLES = Path(__file__).parents[1] / "docs" / "study"
GRID = [
    {"families": ["byte", "tokens"], "sizes": ["s"], "flops": [6.2e8], "seeds": [0, 1]},
    {"families": ["space", "entropy"], "sizes": ["s"], "flops": [6.2e8, 7.2e8]},
    {"families": ["coarse", "alike"], "sizes": ["s"], "flops": [6.2e8]},
]
FAMILIES = {
    "alike": {"label": "alike", "like": "entropy", "recipe": {"model": {"ngrams": {"rows": 59}}}},
    "coarse": {"label": "coarse", "like": "entropy", "recipe": {"patching": {"patch_size": 4.0}}},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A plan and the folder of its text, without runs."""
    folder = tmp_path_factory.mktemp("prepared")
    one = plan(text=write_text(folder), families=FAMILIES, runs=GRID)
    assert prepare_text(one, plan_runs(one), folder / "out", QUIET)
    return one, folder / "out"


@pytest.fixture
def counts(monkeypatch):
    """Count how often each run is resolved, and how often each question is put to the text."""
    runs, questions = Counter(), Counter()
    resolve, measure = Resolver._resolve, resolving.resolve_recipe

    def resolve_run(self, run):
        runs[run.name] += 1
        return resolve(self, run)

    def measure_text(recipe, dataset):
        data = recipe.data
        questions[recipe.patching, dataset.folder.name, data.row_bytes, data.tokenizer] += 1
        return measure(recipe, dataset)

    monkeypatch.setattr(Resolver, "_resolve", resolve_run)
    monkeypatch.setattr(resolving, "resolve_recipe", measure_text)
    return runs, questions


class Worker:
    """Stand-in for a worker process: it unpickles its arguments and works in this process."""

    is_inside = False
    pid = None

    def __init__(self, target, args, name):
        self.target, self.args, self.exitcode = target, pickle.dumps(args), None

    def start(self):
        Worker.is_inside = True
        handler = signal.getsignal(signal.SIGINT)
        try:
            self.target(*pickle.loads(self.args))
        finally:
            Worker.is_inside = False
            signal.signal(signal.SIGINT, handler)
        self.exitcode = 0

    def is_alive(self):
        return False


def test_each_run_is_resolved_once_and_each_question_measured_once(prepared, counts):
    one, out = prepared
    by_run, by_question = counts
    resolver = Resolver(one, out)
    for _ in range(2):
        for run in plan_runs(one):
            assert resolver.resolve(run) is resolver.resolve(run)
    assert by_run == {run.name: 1 for run in plan_runs(one)}
    # Bytes, tokens, spaces, and entropy patches of two sizes: `alike` asks what `entropy` asks.
    assert list(by_question.values()) == [1] * 5


@pytest.mark.slow
def test_each_run_gets_the_answer_to_its_own_question(prepared):
    one, out = prepared
    grid = {
        "families": ["tokens", "space", "entropy", "coarse"],
        "sizes": ["s"],
        "bytes": [1e5],
        "settings": {"data.row_bytes": [64, 128], "data.row_patches": [None, 30]},
    }
    text = one.text.model_dump(mode="json")
    one = plan(text=text, families=FAMILIES, runs=[grid])
    resolver = Resolver(one, out)
    for run in plan_runs(one):
        assert resolver.resolve(run) == Resolver(one, out).resolve(run)


def test_a_dry_run_resolves_each_run_once(prepared, counts):
    one, out = prepared
    assert len(run_costs(one, plan_runs(one), out, 1e10)) == 10
    assert set(counts[0].values()) == set(counts[1].values()) == {1}


@pytest.mark.slow
def test_an_invocation_resolves_each_run_once_and_its_workers_none(
    prepared, counts, tmp_path, monkeypatch
):
    one, out = prepared
    one = one.model_copy(update={"runs": one.runs[2:]})
    link_prepared(out, tmp_path)
    by_run, by_question = counts

    def parent_only(function):
        def call(*arguments):
            assert not Worker.is_inside
            return function(*arguments)

        return call

    for module in (resolving, results):
        monkeypatch.setattr(module, "run_recipe", parent_only(module.run_recipe))
    monkeypatch.setattr(resolving, "resolve_recipe", parent_only(resolving.resolve_recipe))
    context = type("Context", (), {"Process": Worker})
    monkeypatch.setattr(runs, "get_context", lambda method: context)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0)
    pending = plan_runs(one)
    assert not run_all(one, pending, tmp_path, workers=2, progress=QUIET)
    assert by_run == {run.name: 1 for run in pending}
    assert set(by_question.values()) == {1}
    # What is finished is recognised, tabled and drawn without any of this.
    by_run.clear()
    by_question.clear()
    assert not run_all(one, pending, tmp_path, workers=2, progress=QUIET)
    assert write_table(one, tmp_path) == (2, 2)
    write_page(one, tmp_path / "test", tmp_path / "page")
    assert not by_run
    assert not by_question


@pytest.mark.slow
def test_what_a_worker_is_given_leaves_nothing_to_measure(prepared):
    one, out = prepared
    for run in plan_runs(one):
        resolved = pickle.loads(pickle.dumps(Resolver(one, out).resolve(run)))
        assert resolved == Resolver(one, out).resolve(run)
        recipe = resolved.recipe
        assert (recipe.data.row_patches is None) == (run.family == "byte")
        if run.family in ("entropy", "coarse", "alike"):
            assert recipe.patching.threshold is not None


def test_thresholds_that_an_earlier_version_kept_are_ignored(prepared, tmp_path):
    one, out = prepared
    link_prepared(out, tmp_path)
    run = plan_runs(one)[-1]
    before = Resolver(one, out).resolve(run).recipe
    open_patching = one.families["entropy"].recipe["patching"]
    key = {
        "patching": {"max_length": None, "threshold": None, **open_patching},
        "text": "scored/table",
        "row_bytes": 64,
        "row_patches": None,
    }
    stale = {
        json.dumps(key, sort_keys=True): {
            "patching": {**open_patching, "threshold": 9.0},
            "row_patches": 1,
        }
    }
    (tmp_path / "settled.json").write_text(json.dumps(stale))
    after = Resolver(one, tmp_path).resolve(run).recipe
    assert after.patching == before.patching
    assert after.data.row_patches == before.data.row_patches
    assert json.loads((tmp_path / "settled.json").read_text()) == stale
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["settled.json", *(path.name for path in out.iterdir())]
    )


# Results ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(prepared):
    """The entropy run of a plan, and what its result would say."""
    one, out = prepared
    run = next(run for run in plan_runs(one) if run.family == "entropy")
    return run, describe(one, Resolver(one, out).resolve(run), out)


@pytest.fixture
def finished(prepared, described, tmp_path):
    """The entropy run of a plan as if it were finished: its result can be changed and read."""
    one, out = prepared
    run, description = described
    link_prepared(out, tmp_path)
    run_folder(tmp_path, run).mkdir(parents=True)
    write_result(tmp_path, run, {**description, "failure": "made up"})
    return one, run, tmp_path


def change_result(out, run, path, value):
    """Set a value of a result, or drop its key if the value is ``...``."""
    file = run_folder(out, run) / RESULT
    result = json.loads(file.read_text())
    *parents, last = path.split(".")
    section = result
    for parent in parents:
        section = section[parent]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    file.write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe.patching.threshold", 0.7),
        ("recipe.data.row_patches", 17),
        ("recipe.train.log_every", 5),
        ("recipe.data.path", "/elsewhere"),
        ("recipe.train.device", "cuda"),
        # Earlier versions did not have all the keys.
        ("recipe.model.cross_attention.queries", ...),
        ("recipe.data.mixture", ...),
        ("recipe.optimizer.final_ratio", ...),
    ],
)
def test_what_a_plan_leaves_open_is_taken_from_the_result(finished, path, value, monkeypatch):
    one, run, out = finished
    monkeypatch.setattr(resolving, "resolve_recipe", None)
    change_result(out, run, path, value)
    assert finished_result(one, run, out)["failure"] == "made up"


def test_a_result_keeps_its_number_of_steps_and_its_warm_up(finished):
    one, run, out = finished
    change_result(out, run, "recipe.train.steps", 200)
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps: \d+ -> 10"):
        finished_result(one, run, out)
    change_result(out, run, "recipe.optimizer.warmup_steps", 10)
    assert finished_result(one, run, out)["recipe"]["train"]["steps"] == 200


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("recipe.patching.patch_size", 5.0, r"patching\.patch_size: 5\.0 -> 3\.0"),
        ("recipe.patching.kind", "combined", "patching"),
        ("recipe.optimizer.learning_rate", 0.5, r"optimizer\.learning_rate: 0\.5 -> "),
        ("recipe.optimizer.warmup_steps", 7, r"optimizer\.warmup_steps: 7 -> "),
        ("recipe.train.seed", 5, r"train\.seed: 5 -> 0"),
        (
            "recipe.model.hash_embeddings.num_buckets",
            ...,
            r"model\.hash_embeddings\.num_buckets: 500002 -> 53",
        ),
        ("run.flops", 6.201e8, r"run\.flops: 620100000\.0 -> 620000000\.0"),
        ("counts_scorer", True, "counts_scorer: True -> False"),
        ("evaluated.evaluated_bytes", 7, r"evaluated\.evaluated_bytes: 7 -> 3000"),
        ("data", "other", "data: 'other' -> "),
        ("data", ..., "data: None -> "),
        ("tokenizer", "other", "tokenizer: 'other' -> None"),
    ],
)
def test_a_result_that_differs_from_the_plan_is_refused(finished, path, value, message):
    one, run, out = finished
    change_result(out, run, path, value)
    if path == "recipe.patching.kind":
        change_result(out, run, "recipe.patching.increase", 0.1)
    with pytest.raises(ConfigError, match=message):
        finished_result(one, run, out)


@pytest.mark.parametrize(
    ("setting", "value"), [("data.row_patches", 17), ("patching.threshold", 0.7)]
)
def test_what_a_plan_sets_must_be_in_the_result(finished, setting, value):
    one, run, out = finished
    section, key = setting.split(".")
    family = one.families["entropy"]
    recipe = {**family.recipe, section: {**family.recipe.get(section, {}), key: value}}
    families = {**one.families, "entropy": family.model_copy(update={"recipe": recipe})}
    exact = one.model_copy(update={"families": families})
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: .* -> {value}"):
        finished_result(exact, run, out)
    change_result(out, run, f"recipe.{setting}", value)
    assert finished_result(exact, run, out)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("cpu-study", "."),
        ("cpu-inference", "inference"),
        ("cpu-ablations", "ablations"),
        ("cpu-tuning", "tuning"),
    ],
)
def test_the_committed_results_are_those_of_the_shipped_plans(name, folder):
    """They were made by earlier versions, whose recipes lack some of today's keys."""
    one = load_plan(name)
    planned = {run.name: run for run in plan_runs(one)}
    rows = pq.read_table(TABLES / folder / "results.parquet").to_pylist()
    assert len(rows) > 10
    for row in rows:
        recorded = parse(Recipe, json.loads(row["recipe"]), row["run"])
        assert not recipe_changes(one, planned[row["run"]], recorded)
