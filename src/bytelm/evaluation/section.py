"""A section of an evaluation's results: what is shown, recorded and drawn."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.errors import ConfigError
from bytelm.storage import disk_errors

Cell = str | float | int | None
"""A cell of a table; ``None`` for what is not known."""


class Section(NamedTuple):
    """Result of one measurement, ready for the terminal, JSON and a report."""

    title: str
    note: str
    """A sentence or two below the title: what the columns are, and on how much text."""
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    record: dict[str, Any]
    """The same in full precision, as strict JSON."""
    figures: dict[str, Callable[[Path], None]]
    """Functions that draw a figure into a file, by name. They need matplotlib when called."""


def draw_sections(sections: Iterable[Section], folder: Path) -> list[Path]:
    """Draw the figures of sections into a folder, as SVG, and return their files.

    Raises:
        ConfigError: matplotlib is missing, or a file cannot be written.
    """
    with disk_errors(folder, ConfigError, "{remedy}"):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for section in sections:
        for name, draw in section.figures.items():
            draw(folder / f"{name}.svg")
            paths.append(folder / f"{name}.svg")
    return paths


def show_cell(cell: Cell) -> str:
    """Return a cell as text: numbers with four digits, ``-`` for none."""
    if cell is None:
        return "-"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else cell
