"""Figures of a study, each drawn from its table alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.figures import new_figure, save_figure
from bytelm.study.comparison import Comparison
from bytelm.study.table import budget

MARKERS = "os^DvPX*<>"


def draw_comparison(comparison: Comparison, path: Path, x_label: str) -> None:
    """Bits per byte against budgets: points with 95% intervals, fitted laws with their bands.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(7.2, 4.6)
    axis = figure.subplots()
    for number, curve in enumerate(comparison.curves):
        colour, marker = f"C{number % 10}", MARKERS[number % len(MARKERS)]
        errors = np.abs([curve.bpb - curve.low, curve.high - curve.bpb])
        axis.errorbar(
            curve.x, curve.bpb, errors, fmt=marker, ms=5, color=colour, capsize=2, label=curve.name
        )
        if curve.law is not None:
            x = np.geomspace(curve.x[0], curve.x[-1], 100)
            axis.plot(x, curve.law(x), color=colour, lw=1.2)
            axis.fill_between(x, *curve.band(x), color=colour, alpha=0.12, lw=0)
    for crossover in comparison.crossovers:
        if crossover.x is not None:
            axis.axvline(crossover.x, color="0.6", lw=0.8, ls=":")
    axis.set_xscale("log")
    # Budgets of one size differ in their last digits: that is nothing to zoom into.
    budgets = np.concatenate([curve.x for curve in comparison.curves])
    axis.set_xlim(budgets.min() / 1.5, budgets.max() * 1.5)
    axis.set_xlabel(x_label)
    axis.set_ylabel("held-out bits per byte")
    axis.set_title(comparison.config.title, fontsize=10, loc="left")
    axis.grid(alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_units(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bytes per patch (or token) against quality, darker for larger budgets.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(6.6, 4.4)
    axis = figure.subplots()
    labels = list(dict.fromkeys(row["label"] for row in rows))
    budgets = sorted({budget(row) for row in rows})
    for row in rows:
        number = labels.index(row["label"])
        shade = 0.3 + 0.7 * (budgets.index(budget(row)) + 1) / len(budgets)
        axis.scatter(
            row["unit_bytes"] or 1.0,
            row["bpb"],
            color=f"C{number % 10}",
            marker=MARKERS[number % len(MARKERS)],
            alpha=shade,
            s=30,
        )
    for number, label in enumerate(labels):
        marker = MARKERS[number % len(MARKERS)]
        axis.scatter([], [], color=f"C{number % 10}", marker=marker, label=label)
    axis.set_xlabel("bytes per patch or token of held-out text (1 for a model of bytes)")
    axis.set_ylabel("held-out bits per byte")
    axis.set_title("Darker: larger training budgets", fontsize=9, loc="left")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_costs(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Wall-clock seconds and peak memory against training FLOPs.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(9.6, 4.2)
    panels = figure.subplots(1, 2)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for number, label in enumerate(labels):
        mine = sorted((r for r in rows if r["label"] == label), key=lambda r: r["flops"])
        flops = [row["flops"] for row in mine]
        style = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "ms": 4}
        panels[0].plot(flops, [r["seconds"] for r in mine], lw=0, label=label, **style)
        panels[1].plot(flops, [r["peak_bytes"] / 1e9 for r in mine], lw=0, **style)
    for panel, name in zip(panels, ("training seconds", "peak memory, GB"), strict=True):
        panel.set_xscale("log")
        panel.set_xlabel("training FLOPs")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=7)
    save_figure(figure, path)
