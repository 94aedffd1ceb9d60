"""Tasks of the evaluation harness, asked of one or several models."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.harness.local import TASKS
from bytelm.evaluation.scores import AGGREGATIONS, Scores

__all__ = ["Answers", "run_tasks"]

GROUP_KEY = "UID"
"""Field of a document with the part of the task that it belongs to: the paradigms of BLiMP."""


class Answers(NamedTuple):
    """What one model scored on some tasks."""

    scores: tuple[Scores, ...]
    versions: dict[str, Any]
    """Version of each task."""
    num_fewshot: dict[str, int]
    """Examples before each question, by task."""
    results: dict[str, Any]
    """Scores as the harness computes them."""


def run_tasks(
    lm: LM,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    data: Path | None = None,
    include_path: Path | None = None,
    seed: int = 1234,
) -> Answers:
    """Run tasks of the harness on a model.

    Args:
        lm: model, such as :class:`bytelm.evaluation.harness.HarnessLM`.
        tasks: names of tasks or groups: the harness's own, those of :mod:`~.local`, and those of
            ``include_path``.
        limit: the first documents of each task; ``None`` for all.
        num_fewshot: examples before each question; ``None`` for what the task says, usually none.
        data: folder of the local tasks; ``None`` for the environment variable.
        include_path: folder of tasks in YAML.
        seed: seed of the choice of examples.

    Raises:
        ConfigError: a task is unknown.
        DataError: its data is missing, or cannot be downloaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _find_tasks(tasks, data, include_path)
    run: Any = simple_evaluate  # its decorator has no types
    try:
        found = run(
            lm,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, OSError) as error:
        raise DataError(
            f"cannot read the data of {', '.join(tasks)}: {error}. These tasks read data sets of "
            "the Hugging Face Hub: download them once where there is a network, copy its cache "
            "(HF_HOME) and set HF_DATASETS_OFFLINE=1; or choose tasks that read local files "
            "(*_local, with --data)"
        ) from None
    assert found is not None
    return Answers(
        scores=tuple(_scores(found)),
        versions=dict(found["versions"]),
        num_fewshot=dict(found["n-shot"]),
        results={name: _plain(one) for name, one in found["results"].items()},
    )


def _find_tasks(tasks: Sequence[str], data: Path | None, include_path: Path | None) -> TaskManager:
    """Return a manager that knows the tasks.

    Raises:
        ConfigError: a task is unknown.
    """
    folders: list[str | Path] = [TASKS, *([include_path] if include_path is not None else [])]
    metadata: dict[str, Any] = {"data": str(data)} if data is not None else {}
    unknown: list[str] = []
    # The harness's own tasks are thousands of files, which take seconds to read.
    for has_defaults in (False, True):
        manager = TaskManager(
            include_path=folders, include_defaults=has_defaults, metadata=metadata
        )
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    local = ", ".join(sorted(path.stem for path in TASKS.glob("*.yaml")))
    raise ConfigError(
        f"there is no task {unknown[0]!r}; of local files: {local}; all: `lm_eval ls tasks`"
    )


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and texts of a result."""
    return {
        key: float(value) if isinstance(value, np.number) else value
        for key, value in result.items()
        if isinstance(value, int | float | str | np.number)
    }


def _scores(found: Mapping[str, Any]) -> Iterator[Scores]:
    """Yield the scores of each metric whose values add up over documents."""
    for task, samples in found["samples"].items():
        metrics = {
            one["metric"]: one.get("aggregation", "mean")
            for one in found["configs"][task]["metric_list"]
        }
        for name in dict.fromkeys(one["filter"] for one in samples):
            own = [one for one in samples if one["filter"] == name]
            for metric, aggregation in metrics.items():
                if aggregation in AGGREGATIONS and metric in own[0]:
                    shown = metric if name == "none" else f"{metric} ({name})"
                    yield _metric_scores(task, metric, shown, aggregation, own)


def _metric_scores(
    task: str, metric: str, shown: str, aggregation: str, samples: Sequence[Mapping[str, Any]]
) -> Scores:
    # Sums over bytes or words come as (log-likelihood, bytes or words).
    pairs = [one[metric] if isinstance(one[metric], tuple) else (one[metric], 1) for one in samples]
    has_groups = all(GROUP_KEY in one["doc"] for one in samples)
    return Scores(
        task=task,
        metric=shown,
        aggregation=aggregation,
        values=np.array([value for value, _ in pairs], float),
        weights=np.array([weight for _, weight in pairs], float),
        documents=tuple(f"{one['doc_id']} {one['doc_hash']}" for one in samples),
        groups=tuple(one["doc"][GROUP_KEY] for one in samples) if has_groups else (),
    )
