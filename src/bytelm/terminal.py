r"""Output for terminals: text is printed as it is written, and control characters are escaped.

Titles, names, paths and generated text may hold anything. Printed on a plain Rich console,
``[red]`` would become markup, ``:bug:`` an emoji, and ``\x1b[2J`` would clear the screen.
"""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_UNSAFE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""Control characters except newline and tab, separators of lines, marks that reorder text, and
surrogates, which stand for bytes that are not UTF-8."""


def escape_controls(text: str) -> str:
    r"""Return a text in which what a terminal would obey is written as ``\x1b`` or ``\u202e``."""
    return _UNSAFE.sub(_escape, text)


def escape_line(text: str) -> str:
    r"""Return a text on one line: newlines and tabs are escaped too, as ``\x0a`` and ``\x09``."""
    return re.sub("[\n\t]", _escape, escape_controls(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Terminal(Console):
    """Console without markup, emoji codes and highlighting, which escapes control characters.

    The arguments are those of :class:`rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text as it is, with control characters escaped."""
        return super().render_str(escape_controls(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of anything, with control characters in its text escaped."""
        for segment in super().render(renderable, options):
            if segment.control or not _UNSAFE.search(segment.text):
                yield segment
            else:
                yield Segment(escape_controls(segment.text), segment.style)
