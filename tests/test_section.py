import io

from rich.console import Console

from bytelm.display import show_section
from bytelm.evaluation.section import Section


def shown(section):
    console = Console(file=io.StringIO(), width=60)
    show_section(console, section)
    return console.file.getvalue().splitlines()


def test_a_section_is_a_table_with_a_title_and_a_note():
    rows = (("en", 1234, 0.123456, "1.20 ±0.03", None), ("[b]\n", 5, 10.0, "-12.34 ±0.10", 1.0))
    columns = ("language", "count", "bits", "ratio", "more")
    lines = shown(Section("A [title]", "in bits", columns, rows, {}, {}))
    assert [line.rstrip() for line in lines] == [
        "A [title]",
        "in bits",
        "language  count    bits         ratio  more",
        "en        1,234  0.1235    1.20 ±0.03     -",
        r"[b]\x0a       5      10  -12.34 ±0.10     1",
    ]


def test_a_section_without_rows_shows_its_columns():
    assert shown(Section("t", "", ("a", "b"), (), {}, {}))[0] == "t"


def test_a_wide_table_is_not_cut_on_a_narrow_terminal():
    columns = ("a long name of a column", *"bcd")
    row = ("x" * 50, "one two", "+0.1234 ±0.0123", "z" * 30)
    _, _, line = shown(Section("t", "", columns, (row,), {}, {}))
    assert line.split("  ") == list(row)
