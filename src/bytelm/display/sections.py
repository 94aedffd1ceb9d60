"""Sections of an evaluation as tables in the terminal."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bytelm.evaluation.section import Cell, Section, show_cell
from bytelm.terminal import Terminal, escape_line

MOST_WIDE = 10_000


def show_section(console: Console, section: Section) -> None:
    """Show the table of a section, with its title and note.

    Columns of numbers, also with a margin such as ``1.20 ±0.03``, are aligned at the right.
    """
    console.print(escape_line(section.title), style="bold", highlight=False, markup=False)
    if section.note:
        console.print(escape_line(section.note), style="dim", highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(section.columns):
        is_number = all(_is_number(row[index]) for row in section.rows)
        table.add_column(Text(escape_line(name)), justify="right" if is_number else "left")
    for row in section.rows:
        table.add_row(*(Text(escape_line(show_cell(cell))) for cell in row))
    # On a narrow terminal, wrap lines rather than cut numbers off.
    unlimited = console.options.update(max_width=MOST_WIDE)
    width = Measurement.get(console, unlimited, table).maximum
    wide = console if width <= console.width else Terminal(file=console.file, width=width)
    wide.print(table)


def _is_number(cell: Cell) -> bool:
    return not isinstance(cell, str) or cell == "-" or cell.lstrip("+-").split(".")[0].isdigit()
