"""Scores of tasks with other thresholds at inference."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bytelm.config import CalibratedPatching
from bytelm.evaluation.drift_sections import task_thresholds_section
from bytelm.evaluation.scores import Scores
from bytelm.evaluation.thresholds import measure_task_thresholds, with_threshold
from bytelm.language_model import LanguageModel
from serving_clients import tiny_lm
from test_drift import patched
from test_local_tasks import folder
from test_report import checkpoints

__all__ = ["checkpoints", "folder"]

Run = Callable[..., tuple[int, str, str]]


def test_scores_are_by_threshold_and_changes_from_the_own_one():
    own = 1.5
    lm = patched(own)

    def run(model: LanguageModel) -> list[Scores]:
        rule = model.config.patching
        assert isinstance(rule, CalibratedPatching)
        # Right where the threshold is below 1, 2, 3 and 4.
        right = np.arange(1, 5) > getattr(rule, "threshold", 0)
        return [Scores("t", "acc", "mean", right.astype(float), np.ones(4), tuple("abcd"))]

    found = measure_task_thresholds(run, lm, run(lm), [3.5, own, 0.5])
    assert [(one.threshold, one.is_own) for one in found] == [
        (0.5, False),
        (own, True),
        (3.5, False),
    ]
    assert [one.value.value for one in found] == [1.0, 0.75, 0.25]
    assert [one.change.estimate.value for one in found] == [0.25, 0.0, -0.5]
    section = task_thresholds_section(found)
    assert section.rows[1][2:] == ("1.5 (own)", "0.7500 ±0.3269", "+0.0000 ±0.0000")
    assert section.record["scores"][2]["change"]["p"] == 0.5


def test_the_command_reads_tasks_with_each_threshold(
    folder: Path, tmp_path: Path, run: Run, checkpoints: Path
):
    lm = tiny_lm()
    lm.save(tmp_path / "own")
    with_threshold(lm, 1.0).save(tmp_path / "other")
    asked = ["--tasks", "lambada_local", "--data", folder, "--json", "--thresholds"]
    found = []
    for name, thresholds in (("own", "1.0"), ("other", "1.0")):
        status, output, errors = run("eval", tmp_path / name, *asked, thresholds)
        assert status == 0, errors
        found.append(json.loads(output))
    expected = [one["value"] for one in found[1]["tasks"]["scores"]]
    by_threshold = found[0]["tasks by threshold"]["scores"]
    assert [one["value"] for one in by_threshold if not one["own"]] == expected
    assert [one["own"] for one in found[1]["tasks by threshold"]["scores"]] == [True, True]
    status, _, errors = run("eval", checkpoints / "one", *asked, "1.0")
    assert (status, "no patches, and no threshold" in errors) == (1, True)
