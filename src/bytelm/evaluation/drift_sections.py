"""Tables and figures of entropy drift, and of other thresholds at inference."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from bytelm.config import PatchingConfig
from bytelm.evaluation.drift import PERIOD, Curve, Drift
from bytelm.evaluation.section import Section
from bytelm.evaluation.thresholds import ThresholdPoint, ThresholdScore
from bytelm.figures import new_figure, save_figure

COLOURS = {
    "entropy": "#0072b2",
    "monotonic": "#d55e00",
    "combined": "#009e73",
    "space": "#8c8c8c",
}
TITLES = {"as it is": "documents as they are", "repeated": "their first line, repeated"}
SIZES = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Ticks of the axis of bytes per patch."""


def drift_section(drift: Drift) -> Section:
    """Return the mean bytes per patch of each rule by position, and the figure."""
    ranges = [f"{begin:,}-{end:,}" for begin, end in pairwise(drift.edges)]
    rows = []
    for curve in drift.curves:
        growth = curve.sizes[-1].value / curve.sizes[0].value
        cells = [one.text(2) for one in curve.sizes]
        rows.append((curve.text, _name(curve.rule), _reset(curve), *cells, f"{growth:.2f}"))
    left_out = f". Left out: {'; '.join(drift.left_out)}" if drift.left_out else ""
    return Section(
        title="entropy drift: bytes per patch by position",
        note=f"the first {drift.edges[-1]:,} bytes of {drift.num_documents:,} documents, and their "
        f"first {PERIOD - 1} bytes repeated as lines; rules calibrated to {drift.patch_size:.2f} "
        f"bytes per patch on the documents as they are{left_out}",
        columns=("text", "rule", "reset", *ranges, "last/first"),
        rows=tuple(rows),
        record={
            "edges": list(drift.edges),
            "documents": drift.num_documents,
            "patch_size": drift.patch_size,
            "left_out": list(drift.left_out),
            "curves": [
                {
                    "text": curve.text,
                    "rule": curve.rule.model_dump(exclude_none=True),
                    "reset_at_newline": curve.reset,
                    "sizes": [one.record() for one in curve.sizes],
                }
                for curve in drift.curves
            ],
        },
        figures={"drift": lambda path: draw_drift(drift, path)},
    )


def _name(rule: PatchingConfig) -> str:
    values = rule.model_dump(exclude={"kind", "patch_size"}, exclude_none=True)
    return " ".join([rule.kind, *(f"{value:.3g}" for value in values.values())])


def _reset(curve: Curve) -> str:
    return {None: "-", False: "no", True: "yes"}[curve.reset]


def draw_drift(drift: Drift, path: Path) -> None:
    """Draw the mean bytes per patch against the position, for each rule; dashed with resets.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    texts = list(dict.fromkeys(curve.text for curve in drift.curves))
    figure = new_figure(1.0 + 3.8 * len(texts), 3.4)
    axes = np.atleast_1d(figure.subplots(1, len(texts)))
    ranges = np.arange(len(drift.edges) - 1)
    for axis, text in zip(axes, texts, strict=True):
        for curve in drift.curves:
            if curve.text != text:
                continue
            label = curve.rule.kind + (", reset at newlines" if curve.reset else "")
            values = np.array([one.value for one in curve.sizes])
            low, high = (np.array([one[at] for one in curve.sizes]) for at in (1, 2))
            style = {"color": COLOURS[curve.rule.kind], "ls": "--" if curve.reset else "-"}
            axis.plot(ranges, values, "o", ms=3, label=label, **style, lw=1.3)
            axis.fill_between(ranges, low, high, color=style["color"], alpha=0.1, lw=0)
        axis.set_xticks(ranges, [f"to {end:,}" for end in drift.edges[1:]], fontsize=8)
        axis.set_yscale("log")
        axis.set_yticks(SIZES, [str(size) for size in SIZES], minor=False)
        axis.set_yticks([], minor=True)
        sizes = [value for curve in drift.curves for one in curve.sizes for value in one[:1]]
        axis.set_ylim(min(sizes) / 1.3, max(sizes) * 1.3)
        axis.set_xlabel("position (bytes), in ranges that double")
        axis.set_title(TITLES[text], fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("bytes per patch")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    save_figure(figure, path)


def _threshold(one: ThresholdPoint | ThresholdScore) -> str:
    return f"{one.threshold:.4g}{' (own)' if one.is_own else ''}"


def task_thresholds_section(found: Sequence[ThresholdScore]) -> Section:
    """Return the scores of tasks by threshold as a table."""
    return Section(
        title="tasks by threshold",
        note="the same weights with other patches; changes are from the model's own threshold, "
        "paired by document; ± is half of the 95% interval",
        columns=("task", "metric", "threshold", "score", "change"),
        rows=tuple(
            (
                one.scores.task,
                one.scores.metric,
                _threshold(one),
                one.value.text(4),
                one.change.estimate.text(4, signed=True),
            )
            for one in found
        ),
        record={
            "scores": [
                {
                    "task": one.scores.task,
                    "metric": one.scores.metric,
                    "threshold": one.threshold,
                    "own": one.is_own,
                    "documents": len(one.scores.documents),
                    **one.value.record(),
                    "change": {**one.change.estimate.record(), "p": one.change.p},
                }
                for one in found
            ]
        },
        figures={},
    )


def thresholds_section(points: Sequence[ThresholdPoint], context_bytes: int) -> Section:
    """Return bits per byte by threshold, and the figure.

    Args:
        points: the measurements.
        context_bytes: context that FLOPs are counted for.
    """
    rows = []
    for one in points:
        rows.append(
            (
                _threshold(one),
                one.patch_size.text(2),
                one.bits_per_byte.text(4),
                one.change.text(4, signed=True),
                f"{one.flops / 1e6:.2f}",
            )
        )
    return Section(
        title="thresholds at inference",
        note="the same weights with other patches; changes are from the model's own threshold, "
        "paired by document (± half of the 95% interval, documents resampled); forward FLOPs in "
        f"contexts of {context_bytes:,} bytes",
        columns=("threshold", "bytes/patch", "bits per byte", "change", "MFLOPs/byte"),
        rows=tuple(rows),
        record={
            "thresholds": [
                {
                    "threshold": one.threshold,
                    "own": one.is_own,
                    "bytes_per_patch": one.patch_size.record(),
                    "bits_per_byte": one.bits_per_byte.record(),
                    "change": one.change.record(),
                    "flops_per_byte": one.flops,
                }
                for one in points
            ]
        },
        figures={"thresholds": lambda path: draw_thresholds(points, path)},
    )


def draw_thresholds(points: Sequence[ThresholdPoint], path: Path) -> None:
    """Draw the change in bits per byte against bytes per patch, with the threshold at each point.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(5.4, 3.4)
    axis = figure.subplots()
    x = np.array([one.patch_size.value for one in points])
    y = np.array([one.change.value for one in points])
    margins = np.abs(
        [
            [one.change.value - one.change.low for one in points],
            [one.change.high - one.change.value for one in points],
        ]
    )
    order = np.argsort(x)
    axis.errorbar(x[order], y[order], np.nan_to_num(margins[:, order]), fmt="o-", ms=4, lw=1.2)
    for one in points:
        axis.annotate(
            f"{one.threshold:.3g}",
            (one.patch_size.value, one.change.value),
            xytext=(3, 5),
            textcoords="offset points",
            fontsize=7,
            fontweight="bold" if one.is_own else "normal",
        )
    axis.axhline(0, color="0.6", lw=0.8, ls=":")
    axis.set_xlabel("bytes per patch (thresholds at the points, the model's own in bold)")
    axis.set_ylabel("change in bits per byte")
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
