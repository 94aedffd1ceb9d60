"""Figures: entropies with patches, rules side by side, curves, shares of a cost, prepared data.

Needs matplotlib (``bytelm[figures]``). Each function draws one figure and saves it; the format
follows from the file's name.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bytelm.config import CombinedPatching, EntropyPatching
from bytelm.data.dataset import Calibration, SourceStatistics
from bytelm.data.statistics import BIN, NUM_BINS, bytes_per_patch
from bytelm.errors import ConfigError
from bytelm.language_model import PatchedText
from bytelm.storage import atomic_file, disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PATCH_COLOURS = ("#cfe3f7", "#fbe3c5")
LINE_COLOUR = "#1f5a99"
BOUNDARY_COLOUR = "#9a9a9a"
THRESHOLD_COLOUR = "#c2410c"
PART_COLOURS = {
    "embedding": "#9a9a9a",
    "byte embedding": "#9a9a9a",
    "hash embeddings": "#d4d4d4",
    "encoder": "#8fbce6",
    "encoder cross-attention": "#c3dcf2",
    "patch projections": "#8a6fb0",
    "global": "#5b93cf",
    "transformer": "#5b93cf",
    "decoder": "#e8a15c",
    "decoder cross-attention": "#f5d0a9",
    "output": "#c2410c",
    "scorer": "#7fb58a",
}
"""Greys for embeddings, blues for parts before the latents, oranges for parts after them."""
BYTES_PER_LINE = 96
SMALLEST_LABELLED = 0.05
"""Smallest share of a bar that has room for its number."""
LARGEST_PATCH = 32
"""Largest mean size of patches that is drawn."""
MOST_LABELLED = 12
"""Most sources with an entry in a legend."""
MARKS = {" ": "_", "\n": "\\n", "\t": "\\t", "$": "\\$"}
"""Labels of characters that cannot be drawn as they are; a bare dollar begins a formula."""
FONTS = ("DejaVu Sans Mono", "Noto Sans Mono CJK JP", "Noto Sans CJK JP", "DejaVu Sans")
"""Monospace first; the others cover more scripts, if they are installed."""


def check_matplotlib() -> None:
    """Check that matplotlib is installed, before long work whose figures need it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import_module("matplotlib")
    except ImportError:
        raise ConfigError("figures need matplotlib: install bytelm[figures]") from None


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure to a file; the suffix of the name chooses the format, PNG by default.

    Raises:
        ConfigError: the format is unknown, or the file cannot be written.
    """
    from matplotlib import rc_context

    # matplotlib would add its default suffix to the temporary name.
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    # Make the file reproducible: no date, and ids that do not change.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    try:
        with (
            rc_context({"svg.hashsalt": "bytelm"}),
            disk_errors(path, ConfigError, "{remedy}"),
            atomic_file(path) as temporary,
        ):
            figure.savefig(temporary, dpi=150, metadata=metadata)
    except ValueError as error:
        raise ConfigError(f"cannot draw {path}: {error}") from None


def draw_entropies(patched: PatchedText, path: Path) -> None:
    """Draw the entropy of each byte's prediction, the threshold, and the patch boundaries.

    As in the paper's Figure 4, a dot above each byte shows how uncertain the scorer was about it,
    and a grey line stands before each byte that starts a patch. Long texts take several panels of
    :data:`BYTES_PER_LINE` bytes.

    Raises:
        ConfigError: the text has no entropies, matplotlib is missing, or the file cannot be
            written.
    """
    if patched.entropies is None:
        raise ConfigError(
            f"the {patched.rule.kind} rule needs no entropies, so there are none to draw: choose "
            "an entropy rule, or a model with a scorer"
        )
    length = len(patched.data)
    panels = max(-(-length // BYTES_PER_LINE), 1)
    width = 1.5 + 0.135 * min(length, BYTES_PER_LINE)
    figure = new_figure(max(width, 4.0), 2.2 * panels + 0.4)
    axes = np.atleast_1d(figure.subplots(panels, 1, sharey=True))
    labels = byte_labels(patched.data)
    for panel, axis in enumerate(axes):
        begin = panel * BYTES_PER_LINE
        end = min(begin + BYTES_PER_LINE, length)
        x = np.arange(begin, end)
        axis.plot(x, patched.entropies[begin:end], ".-", color=LINE_COLOUR, lw=1, ms=4)
        for boundary in patched.boundaries:
            if begin <= boundary < end:
                axis.axvline(boundary - 0.5, color=BOUNDARY_COLOUR, lw=0.8)
        if isinstance(patched.rule, EntropyPatching | CombinedPatching):
            assert patched.rule.threshold is not None
            axis.axhline(patched.rule.threshold, color=THRESHOLD_COLOUR, lw=1, ls="--")
        axis.set_xlim(begin - 0.7, begin + min(length, BYTES_PER_LINE) - 0.3)
        axis.set_xticks(x, labels[begin:end], fontfamily=list(_fonts()), fontsize=7)
        axis.tick_params(axis="x", length=0)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("entropy (nats)")
        axis.spines[["top", "right"]].set_visible(False)
    rule = _rule_name(patched)
    axes[0].set_title(
        f"{rule}: {len(patched.boundaries)} patches, {patched.patch_size:.2f} bytes each",
        fontsize=9,
        loc="left",
    )
    save_figure(figure, path)


def draw_rules(patched: Sequence[PatchedText], path: Path) -> None:
    """Draw the patches of one text under several rules, one rule per line (paper Figure 3).

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    data = patched[0].data[:BYTES_PER_LINE]
    labels = byte_labels(data)
    figure = new_figure(2.0 + 0.135 * len(data), 0.5 + 0.42 * len(patched))
    axis = figure.subplots()
    for line, text in enumerate(patched):
        _draw_boxes(axis, text, line, len(data))
        for x, label in enumerate(labels):
            axis.text(
                x, line, label, ha="center", va="center", fontsize=7, fontfamily=list(_fonts())
            )
    names = [f"{_rule_name(text)}  ({text.patch_size:.1f})" for text in patched]
    axis.set_yticks(range(len(patched)), names, fontsize=8)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.set_xlim(-0.7, len(data) - 0.3)
    axis.set_ylim(len(patched) - 0.4, -0.6)
    axis.spines[:].set_visible(False)
    axis.set_title("bytes per patch in brackets", fontsize=8, loc="right")
    save_figure(figure, path)


def draw_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    *,
    x_label: str,
    y_label: str = "held-out bits per byte",
) -> None:
    """Draw one line per name over a logarithmic x axis.

    Args:
        curves: x and y values by name.
        path: the file.
        x_label: label of the x axis.
        y_label: label of the y axis.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(6.0, 3.6)
    axis = figure.subplots()
    for name, (x, y) in curves.items():
        axis.plot(x, y, "o-", ms=3.5, lw=1.4, label=name)
    axis.set_xscale("log")
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_figure(figure, path)


def draw_shares(costs: Mapping[str, Mapping[str, float]], path: Path, *, title: str) -> None:
    """Draw a stacked bar for each quantity, divided by the share of each part.

    Args:
        costs: values by label of the quantity and name of the part; all have the same parts.
        path: the file.
        title: title of the figure.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(8.0, 1.2 + 0.55 * len(costs))
    axis = figure.subplots()
    totals = [sum(parts.values()) or 1.0 for parts in costs.values()]
    begins = np.zeros(len(costs))
    for name in next(iter(costs.values())):
        shares = [parts[name] / all_ for parts, all_ in zip(costs.values(), totals, strict=True)]
        bars = axis.barh(
            range(len(costs)), shares, left=begins, color=PART_COLOURS[name], label=name
        )
        labels = [f"{share:.0%}" if share >= SMALLEST_LABELLED else "" for share in shares]
        axis.bar_label(bars, labels, label_type="center", fontsize=7)
        begins += shares
    axis.set_yticks(range(len(costs)), list(costs), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=9, loc="left")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_data(
    statistics: Mapping[str, SourceStatistics], calibration: Calibration | None, path: Path
) -> None:
    """Draw the size of each source, and its entropies and patches if there are any.

    The patches are those that start wherever an entropy is above a threshold; a dashed line is the
    calibrated one.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    has_entropies = any(one.histogram for one in statistics.values())
    figure = new_figure(9.0 if has_entropies else 5.0, 1.6 + 0.25 * len(statistics))
    figure.set_figheight(max(figure.get_figheight(), 3.2 if has_entropies else 0.0))
    axes = np.atleast_1d(figure.subplots(1, 3 if has_entropies else 1))
    axes[0].barh(range(len(statistics)), [one.text_bytes / 1e6 for one in statistics.values()])
    axes[0].set_yticks(range(len(statistics)), [_plain(name) for name in statistics], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("text (MB)")
    thresholds = BIN * np.arange(NUM_BINS)
    for name, one in statistics.items():
        if one.histogram:
            share = np.array(one.histogram) / max(sum(one.histogram), 1)
            axes[1].step(thresholds, share, where="post", lw=1.2, label=_plain(name))
            sizes = bytes_per_patch(one)
            axes[2].plot(thresholds, np.where(sizes <= LARGEST_PATCH, sizes, np.nan), lw=1.2)
    for axis, label in zip(axes[1:], ("share of bytes", "bytes per patch"), strict=False):
        axis.set_xlabel("entropy (nats)" if axis is axes[1] else "threshold (nats)")
        axis.set_ylabel(label)
        threshold = calibration and calibration.rule.get("threshold")
        if isinstance(threshold, float):
            axis.axvline(threshold, color=THRESHOLD_COLOUR, lw=1, ls="--")
    if has_entropies and len(statistics) <= MOST_LABELLED:
        axes[1].legend(frameon=False, fontsize=7)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _plain(name: str) -> str:
    """Return a name in which a dollar begins no formula."""
    return name.replace("$", "\\$")


def _draw_boxes(axis: "Axes", text: PatchedText, line: int, length: int) -> None:
    from matplotlib.patches import Rectangle

    for number, (begin, end) in enumerate(text.spans):
        if begin < length:
            box = Rectangle(
                (begin - 0.47, line - 0.38),
                min(end, length) - begin - 0.06,
                0.76,
                color=PATCH_COLOURS[number % 2],
                lw=0,
            )
            axis.add_patch(box)


def byte_labels(data: bytes) -> list[str]:
    """Return a label for each byte.

    The first byte of a character has the character as its label, the others an empty one. Bytes
    that are not printable, or not in an installed font, are shown as a mark or in hexadecimal.
    """
    labels = [f"{byte:02x}" for byte in data]
    at = 0
    for character in data.decode("utf-8", "surrogateescape"):
        size = len(character.encode("utf-8", "surrogateescape"))
        if not "\udc80" <= character <= "\udcff":
            if character in MARKS:
                labels[at] = MARKS[character]
            elif character.isprintable() and _is_drawable(character):
                labels[at : at + size] = [character] + [""] * (size - 1)
        at += size
    return labels


def _rule_name(patched: PatchedText) -> str:
    rule = patched.rule
    details = []
    for name, symbol in (("length", "length"), ("threshold", "H >"), ("increase", "H rises by >")):
        value = getattr(rule, name, None)
        if value is not None:
            details.append(f"{symbol} {value:.3g}")
    return f"{rule.kind} {', '.join(details)}".strip()


@cache
def _fonts() -> dict[str, str]:
    """Return the files of those of :data:`FONTS` that are installed, by name."""
    from matplotlib import font_manager

    files = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    return {name: files[name] for name in FONTS if name in files}


@cache
def _is_drawable(character: str) -> bool:
    from matplotlib.font_manager import get_font

    return any(get_font(file).get_char_index(ord(character)) for file in _fonts().values())
