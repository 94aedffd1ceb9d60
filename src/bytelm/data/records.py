"""Convert records, such as JSON objects and rows of tables, to documents."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bytelm.codec import to_bytes
from bytelm.data.dataset import Split
from bytelm.errors import DataError


class Document(NamedTuple):
    """One document."""

    data: bytes
    source: str
    split: Split | None = None
    """``None`` if preparation decides it."""


class InvalidRecord(DataError):
    """A record that cannot be converted to a document."""


@dataclass(frozen=True)
class Fields:
    """Fields of a record, or columns of a table, that make a document."""

    text: str
    """Field that holds the text."""
    source: str | None = None
    """Field that names the source."""

    @property
    def columns(self) -> list[str]:
        """Columns to read of a table."""
        return [self.text, self.source] if self.source else [self.text]

    def check_columns(self, names: Iterable[str], where: str) -> None:
        """Check that a table has the columns.

        Raises:
            DataError: a column is missing.
        """
        missing = [c for c in self.columns if c not in names]
        if missing:
            raise DataError(
                f"{where} has no column {missing[0]!r}; it has {', '.join(names)}: "
                "choose one with --field (or --source-field)"
            )

    def document(self, record: Mapping[str, Any], where: str, source: str) -> Document:
        """Return the document of a record.

        Args:
            record: the record.
            where: place of the record, for messages.
            source: source if no field names it.

        Raises:
            InvalidRecord: a field is missing or holds no text.
        """
        for name in self.columns:
            if name not in record:
                raise InvalidRecord(
                    f"{where} has no field {name!r}; it has {', '.join(map(repr, record))}: choose "
                    "one with --field (or --source-field)"
                )
        text = record[self.text]
        if not isinstance(text, str | bytes):
            raise InvalidRecord(f"{where}: field {self.text!r} holds {text!r:.60}, not text")
        named = record[self.source] if self.source else None
        return Document(to_bytes(text), source if named is None else valid_name(str(named)))


def valid_name(name: str) -> str:
    """Return a source's name as valid Unicode; file systems and records allow other names."""
    return name.encode("utf-8", "replace").decode("utf-8")
