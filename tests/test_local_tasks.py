"""Tasks that read local files, with a model whose scores are known."""

import json
import lzma
import math

import numpy as np
import pytest

from bytelm.errors import DataError
from bytelm.evaluation.harness import FOLDER, TASKS, HarnessLM, local
from test_robustness import bigram_model, bits

HELLASWAG = [
    {"ctx": "Boats: A man rows. he", "label": 1, "endings": ["sinks.", "rows on", "a", "b"]},
    {"ctx": "Dogs: One barks.", "label": 0, "endings": ["It runs.", "It is a ï", "cc", "dd"]},
]
ARC = [
    {
        "question": {
            "stem": "What is wet?",
            "choices": [{"text": "fire", "label": "A"}, {"text": "water", "label": "C"}],
        },
        "answerKey": "C",
    }
]
PIQA = [{"goal": "Open it", "sol1": "push", "sol2": "pull hard"}] * 2
LAMBADA = [{"text": "the cat sat on the mat"}, {"text": "one two"}]
BLIMP = [
    {"sentence_good": f"{name} is {n}", "sentence_bad": f"{name} are {n}", "UID": name}
    for name in ("first", "second")
    for n in range(3)
]


def lines(records):
    return "".join(json.dumps(one) + "\n" for one in records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "piqa").mkdir()
    (folder / "blimp").mkdir()
    (folder / "hellaswag_val.jsonl").write_text(lines(HELLASWAG))
    with lzma.open(folder / "arc_easy_test.jsonl.xz", "wt") as file:
        file.write(lines(ARC))
    (folder / "piqa/valid.jsonl").write_text(lines(PIQA))
    (folder / "piqa/valid-labels.lst").write_text("0\n1\n")
    (folder / "lambada_test.jsonl").write_text(lines(LAMBADA))
    (folder / "blimp/blimp.jsonl").write_text(lines(BLIMP))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """The harness's results of all tasks, and the table of the model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lm, table = bigram_model()
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"data": str(folder)}
    )
    found = simple_evaluate(
        HarnessLM(lm, show_progress=False),
        tasks=manager.all_tasks,
        task_manager=manager,
        bootstrap_iters=0,
    )
    return found["results"], table


def chosen(table, context, choices):
    """Return the likeliest choice: as it is, by character and by byte."""
    nats = np.array([-bits(table, context.encode(), f" {one}".encode()) for one in choices])
    sizes = [np.ones(len(choices)), list(map(len, choices)), [len(c.encode()) for c in choices]]
    return [int((nats / np.array(size)).argmax()) for size in sizes]


def check_choices(found, table, documents):
    """Compare accuracies with those of (context, choices, label) documents."""
    right = np.mean(
        [
            np.array(chosen(table, context, choices)) == label
            for context, choices, label in documents
        ],
        axis=0,
    )
    assert [found[f"{name},none"] for name in ("acc", "acc_norm", "acc_bytes")] == list(right)


def test_scores_of_multiple_choice_are_those_by_hand(results):
    results, table = results
    contexts = ["Boats: A man rows. He", "Dogs: One barks."]
    documents = [
        (context, one["endings"], one["label"])
        for context, one in zip(contexts, HELLASWAG, strict=True)
    ]
    check_choices(results["hellaswag_local"], table, documents)
    question = "Question: What is wet?\nAnswer:"
    check_choices(results["arc_easy_local"], table, [(question, ["fire", "water"], 1)])
    documents = [("Question: Open it\nAnswer:", ["push", "pull hard"], label) for label in (0, 1)]
    check_choices(results["piqa_local"], table, documents)
    documents = [("", [one["sentence_good"], one["sentence_bad"]], 0) for one in BLIMP]
    check_choices(results["blimp_local"], table, documents)


def test_scores_of_last_words_are_those_by_hand(results):
    results, table = results
    last = [("the cat sat on the", " mat"), ("one", " two")]
    nats = [bits(table, a.encode(), b.encode()) * math.log(2) for a, b in last]
    found = results["lambada_local"]
    assert found["perplexity,none"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)


def test_a_limit_of_minimal_pairs_takes_as_many_of_each_paradigm(folder):
    order = [one["UID"] for one in local.blimp(data=str(folder))["test"]]
    assert order == ["first", "second"] * 3


@pytest.mark.parametrize("name", ["hellaswag", "arc_easy", "piqa", "lambada", "blimp"])
def test_data_that_is_missing_is_named(name, tmp_path, monkeypatch):
    read = getattr(local, name)
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(DataError, match=f"--data or the environment variable {FOLDER}"):
        read()
    with pytest.raises(DataError, match="there is no folder"):
        read(data=str(tmp_path / "no"))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(DataError, match=rf"there is no {tmp_path}/.*jsonl"):
        read()


def test_damaged_files_are_named(folder, tmp_path):
    path = tmp_path / "lambada_test.jsonl"
    path.write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(DataError, match=f"line 2 of {path} has no 'text'"):
        local.lambada(data=str(tmp_path))
    path.write_text("text\n")
    with pytest.raises(DataError, match=f"line 1 of {path} is no JSON"):
        local.lambada(data=str(tmp_path))
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/valid.jsonl").write_text(lines(PIQA))
    (tmp_path / "piqa/valid-labels.lst").write_text("1\n")
    with pytest.raises(DataError, match="1 labels for 2 questions"):
        local.piqa(data=str(tmp_path))
