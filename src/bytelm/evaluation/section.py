"""A section of an evaluation's results: what is shown, recorded and drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
