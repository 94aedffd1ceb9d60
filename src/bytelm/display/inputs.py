"""Console table of inputs: what was read, what was skipped, and why."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bytelm.data import InputRecord
from bytelm.terminal import escape_line

NUM_ROWS = 12
"""Rows for inputs that were read, and for those with a note, before a table is shortened."""


def show_inputs(console: Console, records: Sequence[InputRecord], more: str = "") -> None:
    """Show each input with what was read from it and a note on what was not.

    Args:
        console: the console.
        records: the inputs.
        more: where a shortened table is to be found whole.
    """
    if not records:
        return
    # Files that were read, though not as they are, before those that were not meant to be.
    noted = sorted((one for one in records if _note(one)), key=lambda one: one.kind in UNREAD)
    plain = [one for one in records if not _note(one)]
    table = Table(box=None, pad_edge=False)
    table.add_column("input", overflow="fold")
    table.add_column("as")
    for name in ("documents", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for group, what in ((plain, "more inputs"), (noted, "more inputs with notes")):
        shown = group if len(group) <= NUM_ROWS else group[: NUM_ROWS - 1]
        style = "yellow" if group is noted else ""
        for one in shown:
            row = (escape_line(one.name), one.kind, *_sizes([one]), escape_line(_note(one)))
            table.add_row(*row, style=style)
        rest = group[len(shown) :]
        if rest:
            table.add_row(f"{len(rest):,} {what}", "", *_sizes(rest), more, style=style or "dim")
    if len(records) > 1:
        counts = [f"{sum(one.kind not in UNREAD for one in records):,} read"]
        unread = sum(one.kind in UNREAD for one in records)
        counts += [f"{unread:,} not read"] if unread else []
        table.add_row(", ".join(counts), "", *_sizes(records), "")
    console.print(table)


UNREAD = ("binary", "skipped")


def _sizes(records: Sequence[InputRecord]) -> tuple[str, str]:
    documents = sum(one.documents for one in records)
    return f"{documents:,}", f"{sum(one.text_bytes for one in records):,}"


def _note(one: InputRecord) -> str:
    counts = [
        f"{count:,} {name} skipped"
        for count, name in (
            (one.invalid_records, "invalid records"),
            (one.empty_documents if one.documents else 0, "empty documents"),
        )
        if count
    ]
    return "; ".join([part for part in (one.note, *counts) if part])
