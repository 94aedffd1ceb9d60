"""Tables and the figure of what languages cost, for one or several models.

Ratios are to the reference, and ``±`` is half of the 95% interval, which resamples sentences.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.evaluation.languages import (
    BITS,
    BITS_PER_BYTE,
    BYTES,
    FLOPS,
    SPREADS,
    Languages,
)
from bytelm.evaluation.section import Section
from bytelm.figures import new_figure, save_figure

MEGA = 1e6
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of models, by Okabe and Ito."""


def language_sections(results: Sequence[Languages]) -> list[Section]:
    """Return a table for each model, one of unevenness, and the figure.

    Args:
        results: results on the same sentences.
    """
    return [*(_languages(one) for one in results), _unevenness(results)]


def units_of(result: Languages) -> str:
    """Return the units that a model reads: bytes, patches or tokens."""
    known = (BYTES, BITS, FLOPS, BITS_PER_BYTE)
    return next((one for one in result.quantities if one not in known), BYTES)


def _languages(result: Languages) -> Section:
    units = units_of(result)
    has_bits = BITS in result.quantities
    per_sentence = [BYTES, *([units] if units != BYTES else []), *([BITS, FLOPS] * has_bits)]
    columns = ["language"]
    for quantity in per_sentence:
        columns += ["MFLOPs" if quantity == FLOPS else quantity, "ratio"]
    columns += [BITS_PER_BYTE] * has_bits
    rows = []
    for language in result.languages:
        row: list[str | float] = [language]
        for quantity in per_sentence:
            mean = result.mean(quantity, language).value
            row.append(f"{mean / MEGA:.2f}" if quantity == FLOPS else f"{mean:.1f}")
            row.append(result.ratio(quantity, language).text(2))
        if has_bits:
            row.append(result.mean(BITS_PER_BYTE, language).text(3))
        rows.append(tuple(row))
    record = {
        language: {
            quantity: {
                "mean": result.mean(quantity, language).record(),
                "ratio": result.ratio(quantity, language).record(),
            }
            for quantity in result.quantities
        }
        for language in result.languages
    }
    return Section(
        title=f"languages: {result.name}",
        note=f"means of {result.num_sentences:,} parallel sentences, and their ratios to "
        f"{result.reference} (± half of the 95% interval, sentences resampled)",
        columns=tuple(columns),
        rows=tuple(rows),
        record={
            "model": result.name,
            "reference": result.reference,
            "sentences": result.num_sentences,
            "languages": record,
        },
        figures={},
    )


def _unevenness(results: Sequence[Languages]) -> Section:
    rows, record = [], []
    for result in results:
        for quantity in result.quantities:
            spreads = {name: result.spread(quantity, name) for name in SPREADS}
            means = {one: result.mean(quantity, one).value for one in result.languages}
            ends = f"{min(means, key=means.__getitem__)}-{max(means, key=means.__getitem__)}"
            cells = [one.text(2 if name == "max/min" else 3) for name, one in spreads.items()]
            rows.append((result.name, quantity, *cells, ends))
            record.append(
                {"model": result.name, "quantity": quantity}
                | {name: one.record() for name, one in spreads.items()}
            )
    differences = [one for other in results[1:] for one in _differences(results[0], other)]
    for one in differences:
        cells = [one[name].text(3, signed=True) for name in SPREADS]
        rows.append((f"{one['model']} - {one['minus']}", one["quantity"], *cells, None))
    return Section(
        title="unevenness across languages",
        note="of the means per sentence, and of bits per byte; 0 (max/min: 1) is the same for all "
        "languages. Differences of models are paired by sentence",
        columns=("model", "quantity", *SPREADS, "least-most"),
        rows=tuple(rows),
        record={
            "unevenness": record,
            "differences": [
                one | {name: one[name].record() for name in SPREADS} for one in differences
            ],
        },
        figures={"languages": lambda path: draw_languages(results, path)},
    )


def _differences(first: Languages, other: Languages) -> list[dict[str, Any]]:
    """Return how much more uneven another model is than the first, in what they share."""
    pairs = [(units_of(first), units_of(other)), (BITS, BITS), (FLOPS, FLOPS)]
    found = []
    for mine, theirs in pairs:
        if mine in first.quantities and theirs in other.quantities:
            values = {name: other.spread_difference(first, theirs, mine, name) for name in SPREADS}
            quantity = mine if mine == theirs else f"{theirs} - {mine}"
            found.append({"model": other.name, "minus": first.name, "quantity": quantity} | values)
    return found


def draw_languages(results: Sequence[Languages], path: Path) -> None:
    """Draw what a sentence costs in each language, as a ratio to the reference.

    A panel for each quantity has a line for each language, and a dot with its 95% interval for each
    model. Languages are in the order of bytes per sentence.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    first = results[0]
    order = sorted(first.languages, key=lambda one: first.mean(BYTES, one).value)
    panels: dict[str, list[tuple[Languages, str]]] = {"bytes per sentence": [(first, BYTES)]}
    read = [(one, units_of(one)) for one in results if units_of(one) != BYTES]
    names = " or ".join(dict.fromkeys(units for _, units in read))
    panels |= {f"{names} per sentence": read} if read else {}
    panels |= {
        f"{quantity} per sentence": [(one, quantity) for one in results if BITS in one.quantities]
        for quantity in (BITS, FLOPS)
        if any(BITS in one.quantities for one in results)
    }
    figure = new_figure(1.4 + 2.4 * len(panels), 1.3 + 0.26 * len(order))
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    step = 0.6 / max(len(results), 1)
    for axis, (title, shown) in zip(axes, panels.items(), strict=True):
        for result, quantity in shown:
            number = results.index(result)
            ratios = [result.ratio(quantity, one) for one in order]
            x = np.array([one.value for one in ratios])
            errors = np.abs(
                [
                    [x_ - one.low for x_, one in zip(x, ratios, strict=True)],
                    [one.high - x_ for x_, one in zip(x, ratios, strict=True)],
                ]
            )
            at = np.arange(len(order)) + step * (number - (len(results) - 1) / 2)
            colour = "0.4" if title.startswith(BYTES) else COLOURS[number % len(COLOURS)]
            axis.errorbar(x, at, xerr=errors, fmt="o", ms=4, lw=1, color=colour)
        axis.axvline(1, color="0.6", lw=0.8, ls=":")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel(f"ratio to {first.reference}", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(order)), order, fontsize=8)
    axes[0].invert_yaxis()
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", ls="", color=COLOURS[number % len(COLOURS)], label=one.name)
        for number, one in enumerate(results)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    save_figure(figure, path)
