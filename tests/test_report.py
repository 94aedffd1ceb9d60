"""Tasks of several models side by side, and reports of evaluations."""

import json
import re
from html.parser import HTMLParser

import pytest

from builders import random_byte_lm
from bytelm.checkpoint import save_model
from bytelm.config import ModelDescription, TransformerConfig
from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.harness import HarnessLM
from bytelm.evaluation.harness.running import run_tasks
from bytelm.evaluation.report import write_report
from bytelm.evaluation.section import Section
from test_local_tasks import folder
from test_robustness import bigram_model

__all__ = ["folder"]

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The text of a page; checks that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.ids, self.links = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.found.append(data)


def checked(path):
    text = path.read_text()
    page = Page(text)
    # Nothing outside the page is needed, and no link leads nowhere.
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.search(r"<(script|link|img)|@import|src=", text)
    return text, page


def drawn(path):
    from bytelm.figures import new_figure, save_figure

    figure = new_figure(2.0, 2.0)
    figure.subplots().plot([1, 2])
    save_figure(figure, path)


def test_a_report_is_complete_by_itself_and_escapes_text(tmp_path):
    rows = (("<b>&", 0.123456789, None), ("b", 2.0, 1234))
    one = Section("A <title>", "", ("name", "x", "n"), rows, {"x": 0.123456789}, {"f": drawn})
    other = one._replace(title="other", note="a & b")
    path = write_report(
        tmp_path / "r", [one, other], title="T<", facts={"command": "a <b>"}, settings={"k": 1}
    )
    text, page = checked(path)
    assert text.count("<svg") == 2
    assert {"<b>&", "0.1235", "-", "1,234", "a <b>", "a & b"} <= set(page.found)
    record = json.loads((tmp_path / "r/report.json").read_text())
    assert record["sections"]["A <title>"] == {"note": "", "x": 0.123456789}
    assert record["command"] == "a <b>"
    assert set(record["versions"]) >= {"bytelm", "torch", "lm_eval"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    parent = tmp_path_factory.mktemp("models")
    for name in ("one", "other"):
        options = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "window": 8}
        module = random_byte_lm(seed=len(name), **options)
        description = ModelDescription(model=TransformerConfig(**options))
        save_model(parent / name, module, description)
    return parent


def test_two_models_side_by_side(checkpoints, folder, tmp_path, run):
    """Scores are the harness's, differences those of the documents."""
    arguments = ["eval", checkpoints / "one", "--against", checkpoints / "other", "--data", folder]
    arguments += ["--tasks", "blimp_local,lambada_local", "--limit", 5]
    status, output, errors = run(*arguments, "--report", tmp_path / "r", "--json")
    assert status == 0, errors
    _, page = checked(tmp_path / "r/report.html")
    assert {"tasks", "blimp_local by part", "minus one", "first", "second"} <= set(page.found)
    record = json.loads((tmp_path / "r/report.json").read_text())["sections"]["tasks"]
    assert record["limit"] == 5
    scores = {(one["task"], one["metric"], one["model"]): one for one in record["scores"]}
    for (task, metric, name), one in scores.items():
        harness = record["harness_results"][name][task][f"{metric},none"]
        assert one["value"] == pytest.approx(harness)
        assert one["low"] <= one["value"] <= one["high"]
    acc = [scores["blimp_local", "acc", name] for name in ("one", "other")]
    assert acc[1]["difference"]["value"] == pytest.approx(acc[1]["value"] - acc[0]["value"])
    assert json.loads(output)["tasks"]["scores"] == record["scores"]


def test_mistakes_are_explained(checkpoints, folder, tmp_path, monkeypatch, run):
    from lm_eval import tasks as lm_tasks

    lm = HarnessLM(bigram_model()[0], show_progress=False)
    real = lm_tasks.TaskManager
    # Without the thousands of tasks of the harness, which take long to read.
    monkeypatch.setattr(
        "bytelm.evaluation.harness.running.TaskManager",
        lambda **options: real(**options | {"include_defaults": False}),
    )
    with pytest.raises(ConfigError, match=r"no task 'blimp_locl'; of local files: arc_easy_local"):
        run_tasks(lm, ["blimp_locl"], data=folder)
    monkeypatch.delenv("BYTELM_EVALUATION", raising=False)
    with pytest.raises(DataError, match="--data or the environment"):
        run_tasks(lm, ["blimp_local"])
    (tmp_path / "t.yaml").write_text(
        "task: remote\ndataset_path: nobody/nothing-here\noutput_type: loglikelihood\n"
        'test_split: test\ndoc_to_text: ""\ndoc_to_target: text\n'
    )

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"no network.*HF_DATASETS_OFFLINE=1.*\*_local"):
        run_tasks(lm, ["remote"], include_path=tmp_path)
    text = folder / "lambada_test.jsonl"
    status, _, errors = run("eval", checkpoints / "one", text, "--hf", "x")
    assert status == 1
    assert "--hf belongs to --tasks" in errors


def test_tasks_under_noise(checkpoints, folder, run):
    """Prompts, completions and both are noised in runs of their own, and paired with clean ones."""
    arguments = ["--tasks", "blimp_local", "--data", folder, "--limit", 3, "--noise", "uppercase"]
    status, output, errors = run("eval", checkpoints / "one", *arguments, "--json")
    assert status == 0, errors
    found = json.loads(output)
    clean = {one["metric"]: one["value"] for one in found["tasks"]["scores"]}
    noisy = found["tasks under noise: one"]["scores"]
    parts = {(one["noise"], one["part"]) for one in noisy}
    noised = {("uppercase", part) for part in ("prompt", "completion", "both", "mean")}
    assert parts == {("clean", ""), *noised}
    for one in noisy:
        assert one["value"] - one["change"]["value"] == pytest.approx(clean[one["metric"]])
