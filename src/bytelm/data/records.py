"""Convert records, such as JSON objects and rows of tables, to documents."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bytelm.chat import as_messages, format_chat
from bytelm.codec import to_bytes
from bytelm.config import nearest
from bytelm.data.dataset import Split
from bytelm.errors import DataError
from bytelm.units import Ranges

MAX_MEANT = 4
"""Most fields that an error suggests."""


class Document(NamedTuple):
    """One document."""

    data: bytes
    source: str
    split: Split | None = None
    """``None`` if preparation decides it."""
    trained: Ranges | None = None
    """Ranges of its bytes that are trained on, each followed by EOS; ``None`` for the whole."""

    @property
    def ranges(self) -> Ranges:
        """Ranges of its bytes that are trained on."""
        return ((0, len(self.data)),) if self.trained is None else self.trained

    def part(self, begin: int, end: int) -> "Document":
        """Return some of its bytes as a document."""
        if self.trained is None:
            return self._replace(data=self.data[begin:end])
        trained = []
        for first, last in self.trained:
            # The EOS of an empty range belongs to the part that ends there.
            has_bytes = first < end and last > begin
            if has_bytes or first == last == end or first == last == begin == 0:
                trained.append((max(first, begin) - begin, min(last, end) - begin))
        return self._replace(data=self.data[begin:end], trained=tuple(trained))


class InvalidRecord(DataError):
    """A record that cannot be converted to a document."""


@dataclass(frozen=True)
class Fields:
    """Fields of a record, or columns of a table, that make a document.

    ``doc.text`` is the field ``text`` of the object in ``doc``, unless the record has a field that
    is itself called ``doc.text``. Of several fields, ``prompt,response``, the document is the
    texts of all, one after the other, and only the last is trained on. A single field may hold a
    conversation; see :mod:`bytelm.chat`.
    """

    text: str
    """Field that holds the text, or several with commas between them."""
    source: str | None = None
    """Field that names the source."""

    def columns(self, known: Container[str]) -> list[str]:
        """Return the names of the fields, if a record or table has ``known`` ones."""
        names = self._parts(known)
        return [*names, self.source] if self.source else names

    def _parts(self, known: Container[str]) -> list[str]:
        return [self.text] if self.text in known else [n.strip() for n in self.text.split(",")]

    def check_columns(self, names: Sequence[str], where: str) -> None:
        """Check that a table has the columns.

        Args:
            names: columns of the table, nested fields included.
            where: name of the table, for messages.

        Raises:
            DataError: a column is missing.
        """
        missing = [c for c in self.columns(names) if c not in names]
        if missing:
            raise DataError(
                f"{where} has no column {missing[0]!r}; it has {', '.join(names)}: "
                f"choose one with --field (or --source-field){_meant(missing[0], names)}"
            )

    def document(self, record: Mapping[str, Any], where: str, source: str) -> Document:
        """Return the document of a record.

        Args:
            record: the record.
            where: place of the record, for messages.
            source: source if no field names it.

        Raises:
            InvalidRecord: a field is missing, or holds no text nor conversation.
        """
        named = _find(record, self.source, where) if self.source else None
        label = source if named is None else _source_name(named)
        names = self._parts(record)
        if len(names) > 1:
            texts = [_text(record, name, where) for name in names]
            data = b"".join(texts)
            return Document(data, label, trained=((len(data) - len(texts[-1]), len(data)),))
        messages = as_messages(_find(record, names[0], where))
        if messages is None:
            return Document(_text(record, names[0], where), label)
        try:
            data, trained = format_chat(messages)
        except DataError as error:
            raise InvalidRecord(f"{where}, field {names[0]!r}: {error}") from None
        return Document(data, label, trained=trained)


def parse_record(line: bytes) -> dict[str, Any]:
    """Parse a JSON object; bytes that are not valid UTF-8 are escaped as surrogates.

    Raises:
        ValueError: the line is not a JSON object.
    """
    try:
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not an object")
    return record


def _text(record: Mapping[str, Any], name: str, where: str) -> bytes:
    text = _find(record, name, where)
    if not isinstance(text, str | bytes):
        raise InvalidRecord(f"{where}: field {name!r} holds {text!r:.60}, not text")
    return to_bytes(text)


def _find(record: Mapping[str, Any], path: str, where: str) -> Any:
    """Return the value of a field, which may be nested.

    Raises:
        InvalidRecord: there is no such field.
    """
    found = _lookup(record, path)
    if not found:
        raise InvalidRecord(
            f"{where} has no field {path!r}; it has {', '.join(map(repr, record))}: choose "
            f"one with --field (or --source-field){_meant(path, _paths(record))}"
        )
    return found[0]


def _meant(path: str, known: Iterable[str]) -> str:
    """Return a hint at the fields that were probably meant: of the same name elsewhere, or like it.

    For example, ``doc.text`` is meant by ``text`` and ``dok.text``.
    """
    names = list(known)
    same = [one for one in names if one.rpartition(".")[2] == path.rpartition(".")[2]]
    if len(same) > 1:
        return f"; did you mean one of {', '.join(map(repr, same[:MAX_MEANT]))}?"
    return f"; did you mean {same[0]!r}?" if same else nearest(path, names)


def _paths(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the names of all fields, nested ones with dots between their parts."""
    for name, value in record.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")


def _lookup(record: Any, path: str) -> list[Any]:
    """Return a list of the value at a path, or an empty one."""
    if not isinstance(record, Mapping):
        return []
    if path in record:
        return [record[path]]
    for at, character in reversed(list(enumerate(path))):
        if character == "." and path[:at] in record:
            found = _lookup(record[path[:at]], path[at + 1 :])
            if found:
                return found
    return []


def _source_name(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else valid_name(str(value))


def valid_name(name: str) -> str:
    """Return a source's name as valid Unicode; file systems and records allow other names."""
    return name.encode("utf-8", "replace").decode("utf-8")
