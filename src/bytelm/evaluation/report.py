"""A report of an evaluation: one HTML page without other files, and the same as JSON."""

import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from bytelm.errors import ConfigError
from bytelm.evaluation.section import Section, show_cell
from bytelm.storage import disk_errors, write_json, write_text
from bytelm.version import __version__

__all__ = ["PAGE", "RECORD", "versions", "write_report"]

PAGE, RECORD = "report.html", "report.json"
PACKAGES = ("torch", "numpy", "lm_eval", "transformers", "datasets")
STYLE = Path(__file__).with_name("report.css")


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the packages that results depend on."""
    found = {"bytelm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_report(
    folder: Path,
    sections: Sequence[Section],
    *,
    title: str,
    facts: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Path:
    """Write the sections of an evaluation as a page and as JSON, and return the page.

    Args:
        folder: folder of both files; files of an earlier report are replaced.
        sections: results.
        title: title of the page.
        facts: what is said at the top, by name: command, models, date.
        settings: more that the JSON records.

    Raises:
        ConfigError: matplotlib is missing, or a file cannot be written.
    """
    facts = {**facts, "versions": ", ".join(f"{k} {v}" for k, v in versions().items())}
    page = "\n".join(_page(sections, title, facts))
    record = {
        "title": title,
        **settings,
        **facts,
        "versions": versions(),
        "sections": {one.title: {"note": one.note, **one.record} for one in sections},
    }
    with disk_errors(folder, ConfigError, "{remedy}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PAGE, page)
        write_json(folder / RECORD, record)
    return folder / PAGE


def _page(sections: Sequence[Section], title: str, facts: Mapping[str, str]) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>{STYLE.read_text()}</style>\n</head>\n<body>"
    yield f"<h1>{escape(title)}</h1>\n<dl>"
    for name, text in facts.items():
        shown = f"<code>{escape(text)}</code>" if name == "command" else escape(text)
        yield f"<dt>{escape(name)}</dt><dd>{shown}</dd>"
    yield "</dl>"
    for number, section in enumerate(sections):
        yield f"<section>\n<h2>{escape(section.title)}</h2>"
        if section.note:
            yield f'<p class="note">{escape(section.note)}</p>'
        yield from _figures(section, number)
        yield from _table(section)
        yield "</section>"
    yield "</body>\n</html>\n"


def _table(section: Section) -> Iterator[str]:
    texts = [
        any(isinstance(row[index], str) for row in section.rows)
        for index in range(len(section.columns))
    ]
    marks = ["" if is_text else ' class="number"' for is_text in texts]
    yield '<div class="scroll"><table>\n<thead><tr>'
    for name, mark in zip(section.columns, marks, strict=True):
        yield f"<th{mark}>{escape(name)}</th>"
    yield "</tr></thead>\n<tbody>"
    for row in section.rows:
        cells = zip(row, marks, strict=True)
        yield (
            "<tr>" + "".join(f"<td{m}>{escape(show_cell(one))}</td>" for one, m in cells) + "</tr>"
        )
    yield "</tbody>\n</table></div>"


def _figures(section: Section, number: int) -> Iterator[str]:
    """Yield the figures of a section as SVG within the page."""
    for index, (name, draw) in enumerate(section.figures.items()):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figure.svg"
            draw(path)
            svg = path.read_text(encoding="utf-8")
        # Without the XML declaration and document type. Ids must differ between figures.
        svg = svg[svg.index("<svg") :]
        prefix = f"f{number}-{index}-"
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
        yield f"<figure aria-label={_quoted(name)}>\n{svg}</figure>"


def _quoted(text: str) -> str:
    return f'"{escape(text, quote=True)}"'
