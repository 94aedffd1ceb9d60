"""Figures of a study, drawn from its table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.figures import new_figure, save_figure
from bytelm.study.comparison import Comparison
from bytelm.study.table import budget

COLOURS = (*(f"C{number}" for number in range(10)), "black")
MARKERS = "os^DvPX*<>"
"""One marker fewer than colours, so that 110 families differ in one or the other."""
SIDE_STEP = 1.03
"""Factor between the budgets at which differences of neighbouring families are drawn."""
DIFFERENCES = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Ticks of the axis of differences from a baseline, on both sides of 0."""


def draw_comparison(comparison: Comparison, path: Path, x_label: str) -> None:
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
        colour, marker = _look(number)
        style = {"fmt": marker, "ms": 5, "color": colour, "capsize": 2}
        errors = np.abs([curve.bpb - curve.low, curve.high - curve.bpb])
        panels[0].errorbar(curve.x, curve.bpb, errors, label=curve.name, **style)
        if curve.law is not None:
            x = np.geomspace(curve.x[0], curve.x[-1], 100)
            panels[0].plot(x, curve.law(x), color=colour, lw=1.2)
            panels[0].fill_between(x, *curve.band(x), color=colour, alpha=0.12, lw=0)
        differences = comparison.differences.get(curve.name)
        if differences:
            x = np.array([one.budget for one in differences])
            # Shift each family a little, so that equal differences do not hide each other.
            x = x * SIDE_STEP ** (number - len(comparison.curves) / 2)
            errors = [
                [d.value - d.low for d in differences],
                [d.high - d.value for d in differences],
            ]
            panels[1].errorbar(x, [d.value for d in differences], np.abs(errors), lw=0.8, **style)
    for crossover in comparison.crossovers:
        if crossover.x is not None:
            panels[0].axvline(crossover.x, color="0.6", lw=0.8, ls=":")
    # Runs of one budget differ in the last digits of what they spent; do not zoom in on these.
    budgets = np.concatenate([curve.x for curve in comparison.curves])
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlim(budgets.min() / 1.5, budgets.max() * 1.5)
        panel.set_xlabel(x_label)
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out bits per byte")
    panels[0].set_title(comparison.config.title, fontsize=10, loc="left")
    _add_legend(figure, panels[0])
    if baseline is not None:
        panels[1].axhline(0, color="0.3", lw=1)
        # Linear near 0, logarithmic further away.
        panels[1].set_yscale("symlog", linthresh=DIFFERENCES[-3])
        low, high = panels[1].get_ylim()
        ticks = [-one for one in DIFFERENCES[::-1]] + [0.0, *DIFFERENCES]
        panels[1].set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks], minor=False)
        panels[1].set_yticks([], minor=True)
        panels[1].set_ylim(low, high)
        panels[1].set_ylabel("difference in bits per byte")
        panels[1].set_title(f"minus {baseline.name}", fontsize=10, loc="left")
    save_figure(figure, path)


def draw_units(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw quality against bytes per patch or token, darker for larger budgets.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(9.6, 4.4)
    axis = figure.subplots()
    labels = list(dict.fromkeys(row["label"] for row in rows))
    budgets = sorted({budget(row) for row in rows})
    for row in rows:
        colour, marker = _look(labels.index(row["label"]))
        shade = 0.3 + 0.7 * (budgets.index(budget(row)) + 1) / len(budgets)
        unit = row["unit_bytes"] or 1.0
        axis.scatter(unit, row["bpb"], color=colour, marker=marker, alpha=shade, s=30)
    for number, label in enumerate(labels):
        colour, marker = _look(number)
        axis.scatter([], [], color=colour, marker=marker, label=label)
    axis.set_xlabel("bytes per patch or token of held-out text (1 for a model of bytes)")
    axis.set_ylabel("held-out bits per byte")
    axis.set_title("Darker: larger training budgets", fontsize=9, loc="left")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    _add_legend(figure, axis)
    save_figure(figure, path)


def draw_costs(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw wall-clock seconds and peak memory against training FLOPs.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(9.6, 4.2)
    panels = figure.subplots(1, 2)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for number, label in enumerate(labels):
        mine = sorted((r for r in rows if r["label"] == label), key=lambda r: r["flops"])
        flops = [row["flops"] for row in mine]
        colour, marker = _look(number)
        style = {"color": colour, "marker": marker, "ms": 4}
        panels[0].plot(flops, [r["seconds"] for r in mine], lw=0, label=label, **style)
        panels[1].plot(flops, [r["peak_bytes"] / 1e9 for r in mine], lw=0, **style)
    for panel, name in zip(panels, ("training seconds", "peak memory, GB"), strict=True):
        panel.set_xscale("log")
        panel.set_xlabel("training FLOPs")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    _add_legend(figure, panels[0])
    save_figure(figure, path)


def _look(number: int) -> tuple[str, str]:
    """Return the colour and marker of a family."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _add_legend(figure: Any, axis: Any) -> None:
    """Add a legend below the panels, and make the figure taller by its height."""
    handles, labels = axis.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    columns = max(int(width / (0.5 + 0.065 * max(map(len, labels)))), 1)
    figure.set_size_inches(width, height + 0.19 * (len(labels) // columns + 1))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
