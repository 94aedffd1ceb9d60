"""Figures of a study, drawn from its tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.figures import new_figure, save_figure
from bytelm.study.bootstrap import Difference
from bytelm.study.comparison import Comparison
from bytelm.study.palette import AHEAD, BEHIND, NEITHER, Look
from bytelm.study.table import budget

Looks = Mapping[str, Look]
"""How each family is drawn, by its label."""
SIDE_STEP = 1.03
"""Factor between the budgets at which differences of neighbouring families are drawn."""
DIFFERENCES = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Ticks of the axis of differences from a baseline, on both sides of 0."""
WEIGHT_BYTES = 4
"""Bytes of a weight in fp32."""


def draw_comparison(comparison: Comparison, looks: Looks, path: Path, x_label: str) -> None:
    """Draw bits per byte against budgets, and the differences from the baseline.

    The first panel has points with 95% intervals and fitted laws with their bands; the second has
    the differences, whose intervals are narrower.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    baseline = comparison.baseline
    figure = new_figure(7.2 if baseline is None else 11.0, 4.2)
    panels = np.atleast_1d(figure.subplots(1, 1 if baseline is None else 2))
    for number, curve in enumerate(comparison.curves):
        look = looks[curve.name]
        style = _points(look)
        errors = np.abs([curve.bpb - curve.low, curve.high - curve.bpb])
        panels[0].errorbar(curve.x, curve.bpb, errors, label=curve.name, **style)
        if curve.law is not None:
            x = np.geomspace(curve.x[0], curve.x[-1], 100)
            panels[0].plot(x, curve.law(x), color=look.colour, ls=look.line, lw=1.2)
            panels[0].fill_between(x, *curve.band(x), color=look.colour, alpha=0.12, lw=0)
        differences = comparison.differences.get(curve.name)
        if differences:
            x = np.array([one.budget for one in differences])
            # Shift each family a little, so that equal differences do not hide each other.
            x = x * SIDE_STEP ** (number - len(comparison.curves) / 2)
            errors = [
                [d.value - d.low for d in differences],
                [d.high - d.value for d in differences],
            ]
            panels[1].errorbar(
                x, [d.value for d in differences], np.abs(errors), **{**style, "lw": 0.8}
            )
    for crossover in comparison.crossovers:
        if crossover.x is not None:
            panels[0].axvline(crossover.x, color="0.6", lw=0.8, ls=":")
    # Runs of one budget differ in the last digits of what they spent; do not zoom in on these.
    budgets = np.concatenate([curve.x for curve in comparison.curves])
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlim(budgets.min() / 1.5, budgets.max() * 1.5)
        panel.set_xlabel(x_label)
        _plain(panel)
    panels[0].set_ylabel("held-out bits per byte")
    panels[0].set_title(comparison.config.title, fontsize=10, loc="left")
    _add_legend(figure, panels[0])
    if baseline is not None:
        panels[1].axhline(0, color="0.3", lw=1)
        low, high = panels[1].get_ylim()
        _scale_differences(panels[1], "y")
        panels[1].set_ylim(low, high)
        panels[1].set_ylabel("difference in bits per byte")
        panels[1].set_title(f"minus {baseline.name}", fontsize=10, loc="left")
    save_figure(figure, path)


def draw_differences(groups: Mapping[str, Sequence[Difference]], path: Path) -> None:
    """Draw differences from a baseline with their 95% intervals, a line for each (a forest plot).

    Args:
        groups: differences by the title of their group; each group has a baseline.
        path: the file.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(9.6, 0.9 + sum(0.45 + 0.23 * len(some) for some in groups.values()))
    heights = [len(some) + 1 for some in groups.values()]
    panels = figure.subplots(len(groups), 1, sharex=True, height_ratios=heights, squeeze=False)
    every = [one for some in groups.values() for one in some]
    for panel, (title, some) in zip(panels[:, 0], groups.items(), strict=True):
        has_budgets = len({one.budget for one in some}) > 1
        for at, one in enumerate(some):
            colour = AHEAD if one.high < 0 else BEHIND if one.low > 0 else NEITHER
            errors = [[one.value - one.low], [one.high - one.value]]
            panel.errorbar(
                one.value, at, xerr=np.abs(errors), fmt="o", ms=5, color=colour, capsize=2
            )
        names = [f"{d.name} at {d.budget:.3g}" if has_budgets else d.name for d in some]
        panel.set_yticks(range(len(some)), names, fontsize=8)
        panel.set_ylim(len(some) - 0.4, -0.6)
        panel.axvline(0, color="0.3", lw=1)
        panel.set_title(f"{title}: minus {some[0].baseline}", fontsize=9, loc="left")
        _plain(panel, axis="x")
        panel.tick_params(axis="y", length=0)
    last = panels[-1, 0]
    _scale_differences(last, "x")
    last.set_xlim(
        1.15 * min(d.low for d in every) - 0.005, 1.15 * max(d.high for d in every) + 0.005
    )
    last.set_xlabel("difference in bits per byte, with 95% intervals (left of 0: ahead)")
    save_figure(figure, path)


def draw_frontiers(rows: Sequence[dict[str, Any]], looks: Looks, path: Path) -> None:
    """Draw quality against inference FLOPs per byte and bytes of weights.

    A line joins the runs of a budget that no other run of it beats in both.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(11.0, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    axes = {
        "inference FLOPs per byte": lambda row: float(row["inference_flops"]),
        "bytes of weights in fp32, embeddings included": lambda row: float(
            WEIGHT_BYTES * (row["parameters"] + row["table_parameters"])
        ),
    }
    for panel, (name, cost) in zip(panels, axes.items(), strict=True):
        _scatter(panel, rows, looks, cost)
        for at in sorted({budget(row) for row in rows}):
            points = sorted((cost(r), r["bpb"]) for r in rows if budget(r) == at)
            x, y = np.array(frontier(points)).T
            panel.step(x, y, where="post", color="0.6", lw=0.8, zorder=0)
        panel.set_xscale("log")
        panel.set_xlabel(name)
    panels[0].set_ylabel("held-out bits per byte")
    panels[0].set_title(
        "Darker: larger training budgets; lines: the best of each budget", fontsize=9, loc="left"
    )
    _add_legend(figure, panels[0])
    save_figure(figure, path)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, sorted by cost, that none of lower cost is as good as (a Pareto frontier).

    Args:
        points: cost and bits per byte, sorted.
    """
    best, found = np.inf, []
    for cost, bpb in points:
        if bpb < best:
            best = bpb
            found.append((cost, bpb))
    return found


def draw_units(rows: Sequence[dict[str, Any]], looks: Looks, path: Path) -> None:
    """Draw quality against bytes per patch or token, darker for larger budgets.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(9.6, 4.4)
    axis = figure.subplots()
    _scatter(axis, rows, looks, lambda row: row["unit_bytes"] or 1.0)
    axis.set_xlabel("bytes per patch or token of held-out text (1 for a model of bytes)")
    axis.set_ylabel("held-out bits per byte")
    axis.set_title("Darker: larger training budgets", fontsize=9, loc="left")
    _add_legend(figure, axis)
    save_figure(figure, path)


def draw_costs(rows: Sequence[dict[str, Any]], looks: Looks, path: Path) -> None:
    """Draw wall-clock seconds and peak memory against training FLOPs.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(9.6, 4.2)
    panels = figure.subplots(1, 2)
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = sorted((r for r in rows if r["label"] == label), key=lambda r: r["flops"])
        flops = [row["flops"] for row in mine]
        style = {**_points(looks[label]), "lw": 0}
        panels[0].errorbar(flops, [r["seconds"] for r in mine], label=label, **style)
        panels[1].errorbar(flops, [r["peak_bytes"] / 1e9 for r in mine], **style)
    for panel, name in zip(panels, ("training seconds", "peak memory, GB"), strict=True):
        panel.set_xscale("log")
        panel.set_xlabel("training FLOPs")
        panel.set_ylabel(name)
        _plain(panel)
    panels[0].set_yscale("log")
    _add_legend(figure, panels[0])
    save_figure(figure, path)


def _points(look: Look) -> dict[str, Any]:
    """Return the style of points with error bars."""
    face = {"color": look.colour, "mfc": look.face}
    return {"fmt": look.marker, "ms": 5, "capsize": 2, **face}


def _scatter(panel: Any, rows: Sequence[dict[str, Any]], looks: Looks, x: Any) -> None:
    """Draw bits per byte of runs, darker for larger budgets, with a legend of full colours."""
    budgets = sorted({budget(row) for row in rows})
    for row in rows:
        look = looks[row["label"]]
        shade = 0.3 + 0.7 * (budgets.index(budget(row)) + 1) / len(budgets)
        _mark(panel, look, [x(row)], [row["bpb"]], alpha=shade)
    for label in dict.fromkeys(row["label"] for row in rows):
        _mark(panel, looks[label], [], [], label=label)
    _plain(panel)


def _mark(panel: Any, look: Look, x: list[float], y: list[float], **style: Any) -> None:
    panel.scatter(
        x, y, marker=look.marker, edgecolors=look.colour, facecolors=look.face, s=30, **style
    )


def _plain(panel: Any, axis: str = "both") -> None:
    panel.grid(alpha=0.3, which="both", axis=axis)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _scale_differences(panel: Any, axis: str) -> None:
    """Make an axis of differences linear near 0, logarithmic further away."""
    getattr(panel, f"set_{axis}scale")("symlog", linthresh=DIFFERENCES[-3])
    ticks = [-one for one in DIFFERENCES[::-1]] + [0.0, *DIFFERENCES]
    names = [f"{tick:+g}" if tick else "0" for tick in ticks]
    getattr(panel, f"set_{axis}ticks")(ticks, names, minor=False)
    getattr(panel, f"set_{axis}ticks")([], minor=True)


def _add_legend(figure: Any, axis: Any) -> None:
    """Add a legend below the panels, and make the figure taller by its height."""
    handles, labels = axis.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    columns = max(int(width / (0.5 + 0.065 * max(map(len, labels)))), 1)
    figure.set_size_inches(width, height + 0.19 * (len(labels) // columns + 1))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
