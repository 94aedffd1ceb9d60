"""Scores of tasks as sections: tables of one or several models, and figures."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bytelm.evaluation.bootstrap import Estimate
from bytelm.evaluation.scores import Scores, by_group, difference, score
from bytelm.evaluation.section import Cell, Section
from bytelm.figures import new_figure, save_figure

__all__ = ["group_sections", "scores_section"]

COLOURS = ("#1f5a99", "#c2410c", "#4d7c0f", "#7e3ba8", "#8a6d1f", "#0f766e")
"""Colours of models, in order."""

Models = Mapping[str, Sequence[Scores]]
"""The scores of each model: the same metrics of the same tasks."""


def scores_section(models: Models, settings: str, record: dict[str, Any]) -> Section:
    """Return the scores of all models, and their differences from the first.

    Args:
        models: scores by the name of the model.
        settings: how the tasks were asked, in a few words.
        record: what else the section records, such as versions of tasks.

    Raises:
        DataError: models answered other documents.
    """
    first = next(iter(models))
    several = len(models) > 1
    columns = ["task", "metric", *(["model"] if several else []), "score", "95% interval"]
    columns += [f"minus {first}", "95% of it", "p"] if several else []
    rows: list[tuple[Cell, ...]] = []
    records = []
    for index, base in enumerate(models[first]):
        for name, scores in models.items():
            row, one = _row(name, scores[index], None if name == first else base)
            rows.append((*row[:2], *row[2 if several else 3 :], len(base.values)))
            records.append(one)
    note = (
        f"{settings} acc: the likeliest answer is right; acc_norm: by likelihood per character; "
        "acc_bytes: per byte of UTF-8. Intervals are Wilson's for right and wrong answers, "
        "bootstrap ones over documents otherwise."
    )
    if several:
        note += (
            " Differences are paired, on the same documents: bootstrap intervals, and p of "
            "McNemar's exact test."
        )
    return Section(
        title="tasks",
        note=note,
        columns=(*columns, "documents"),
        rows=tuple(row if several else (*row[:4], row[-1]) for row in rows),
        record={"scores": records, **record},
        figures={"tasks": partial(draw_scores, models)},
    )


def _row(name: str, scores: Scores, base: Scores | None) -> tuple[list[Cell], dict[str, Any]]:
    """Return the cells of a model's score, and its record."""
    estimate = score(scores)
    cells: list[Cell] = [scores.task, scores.metric, name, estimate.value, _ends(estimate)]
    record: dict[str, Any] = {
        "task": scores.task,
        "metric": scores.metric,
        "model": name,
        "documents": len(scores.values),
        **estimate._asdict(),
    }
    if base is None:
        return [*cells, None, None, None], record
    found = difference(scores, base)
    record["difference"] = {**found.estimate._asdict(), "p": found.p}
    return [*cells, found.estimate.value, _ends(found.estimate), found.p], record


def _ends(estimate: Estimate) -> str:
    return f"{estimate.low:.4g} to {estimate.high:.4g}"


def group_sections(models: Models) -> list[Section]:
    """Return a section with the parts of each task that has any, such as BLiMP's paradigms.

    Args:
        models: scores by the name of the model.
    """
    sections = []
    for index, base in enumerate(next(iter(models.values()))):
        if not base.groups or base.metric != "acc":
            continue
        parts = {name: by_group(scores[index]) for name, scores in models.items()}
        found = {
            name: {part: score(one) for part, one in each.items()} for name, each in parts.items()
        }
        counts = {part: len(one.values) for part, one in by_group(base).items()}
        sections.append(
            Section(
                title=f"{base.task} by part",
                note=f"{base.metric} of each part.",
                columns=("part", *models, "documents"),
                rows=tuple(
                    (part, *(each[part].value for each in found.values()), count)
                    for part, count in counts.items()
                ),
                record={
                    name: {part: one._asdict() for part, one in each.items()}
                    for name, each in found.items()
                },
                figures={},
            )
        )
    return sections


def draw_scores(models: Models, path: Path) -> None:
    """Draw the scores between 0 and 1: a line for each metric of a task, a dot for each model.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    first = next(iter(models.values()))
    shown = [index for index, one in enumerate(first) if one.aggregation == "mean"]
    figure = new_figure(7.0, 1.2 + (0.28 + 0.1 * len(models)) * max(len(shown), 1))
    axis = figure.subplots()
    step = 0.5 / len(models)
    for number, (name, scores) in enumerate(models.items()):
        found = [score(scores[index]) for index in shown]
        axis.errorbar(
            [one.value for one in found],
            [place + step * (number - (len(models) - 1) / 2) for place in range(len(shown))],
            xerr=[
                [max(one.value - one.low, 0.0) for one in found],
                [max(one.high - one.value, 0.0) for one in found],
            ],
            fmt="o",
            ms=4,
            lw=1.2,
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    labels = [f"{first[index].task}, {first[index].metric}" for index in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("score, with 95% interval", fontsize=8)
    axis.grid(axis="x", lw=0.4, color="0.8")
    axis.spines[["top", "right"]].set_visible(False)
    if len(models) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, path)
