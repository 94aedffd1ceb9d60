"""Read the records of JSON files: one object per line, an array of objects, or objects in a row."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from bytelm.data.opening import Content
from bytelm.data.records import parse_record

_CHUNK = 2**16
_SEPARATORS = re.compile(r"[\s,]*")

Found = tuple[str, dict[str, Any] | ValueError]
"""Place of a record in its file, and the record, or why it is none."""


def line_records(lines: Iterable[bytes], first: int = 1) -> Iterator[Found]:
    """Yield the record on each line that is not blank; lines are counted from ``first``."""
    for number, line in enumerate(lines, first):
        if line.strip():
            try:
                yield f"line {number}", parse_record(line)
            except ValueError as error:
                yield f"line {number}", error


def json_records(content: Content) -> Iterator[Found]:
    """Yield the records of a JSON file, whose content decides how they are written.

    Raises:
        OSError: the file cannot be read.
    """
    stream = content.stream
    if content.head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _values(iter(partial(stream.read, _CHUNK), b""))
        return
    lines, blank = iter(stream), 0
    for line in lines:
        if not line.strip():
            blank += 1
        elif line.rstrip().endswith(b"}") or not line.lstrip().startswith(b"{"):
            yield from line_records(chain([line], lines), blank + 1)
        else:
            yield from _values(chain([line], lines))


def _values(chunks: Iterator[bytes]) -> Iterator[Found]:
    """Yield the objects of an array, or objects one after another, without keeping them all."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    scan = json.JSONDecoder().raw_decode
    text = _more("", chunks, decoder).removeprefix("\ufeff").lstrip()
    is_array, number, ended = text.startswith("["), 1, False
    text = text.removeprefix("[")
    at = 0
    while True:
        separators = _SEPARATORS.match(text, at)
        at = separators.end() if separators else at
        if is_array and text.startswith("]", at):
            return
        failure: Exception = ValueError("it ends too early")
        if at < len(text):
            try:
                value, end = scan(text, at)
                # A number may go on in the next chunk.
                if end < len(text) or ended:
                    yield f"record {number}", _checked(value)
                    number, at = number + 1, end
                    continue
            except (ValueError, RecursionError) as error:
                failure = error
        if ended:
            if is_array or at < len(text):
                yield f"record {number}", ValueError(f"is not JSON: {failure}")
            return
        before = len(text) - at
        text, at = _more(text[at:], chunks, decoder), 0
        ended = len(text) == before


def _more(text: str, chunks: Iterator[bytes], decoder: codecs.IncrementalDecoder) -> str:
    """Return a text with what follows it, which makes it at least twice as long except at the end.

    So a long value is parsed again only a few times.
    """
    parts, missing = [text], max(len(text), 1)
    while missing > 0:
        chunk = next(chunks, None)
        parts.append(decoder.decode(chunk or b"", final=chunk is None))
        missing -= len(parts[-1])
        if chunk is None:
            break
    return "".join(parts)


def _checked(value: Any) -> dict[str, Any] | ValueError:
    if isinstance(value, dict):
        return value
    return ValueError(f"holds {type(value).__name__}, not an object")
