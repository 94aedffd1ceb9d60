"""Read records of Arrow tables: Parquet files, and datasets that the `datasets` library saved.

Strings are read as bytes, since other writers do not ensure that they are valid UTF-8.
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bytelm.data.records import Fields
from bytelm.errors import DataError

BATCH = 1024
"""Rows converted at once."""
_BYTES: list[tuple[Callable[[pa.DataType], bool], pa.DataType]] = [
    (pa.types.is_string, pa.binary()),
    (pa.types.is_large_string, pa.large_binary()),
    (pa.types.is_string_view, pa.binary_view()),
]

Convert = Callable[[Any], Any]


def parquet_records(file: io.BufferedIOBase, fields: Fields, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, with the columns that the fields name.

    Raises:
        DataError: a column is missing.
        pa.ArrowException: the file is damaged.
    """
    table = pq.ParquetFile(file)
    fields.check_columns(_paths(table.schema_arrow), name)
    columns = fields.columns(table.schema_arrow.names)
    converters = _converters(table.schema_arrow)
    for batch in table.iter_batches(batch_size=BATCH, columns=columns):
        yield from _records(batch, converters)


def dataset_records(folder: Path, fields: Fields) -> Iterator[dict[str, Any]]:
    """Yield the rows of a saved dataset, with the columns that the fields name.

    Raises:
        DataError: the `datasets` library is not installed, the folder is damaged, or a column is
            missing.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{folder} was saved by the `datasets` library: install bytelm[hub] to read it"
        ) from None
    try:
        dataset: Any = datasets.load_from_disk(str(folder))
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"cannot read {folder}: {error!r}; save it again") from None
    schema = dataset.features.arrow_schema
    columns = _wanted(schema, fields, str(folder))
    converters = _converters(schema)
    for table in dataset.select_columns(columns).with_format("arrow").iter(BATCH):
        for batch in table.to_batches():
            yield from _records(batch, converters)


def table_records(
    table: pa.Table, features: Any, fields: Fields, name: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, with the columns that the fields name.

    Args:
        table: rows of a dataset.
        features: the dataset's types; ``None`` if they are not known, as those of JSON.
        fields: what is read of each row.
        name: name of the dataset for messages.

    Raises:
        DataError: a column is missing.
    """
    schema = table.schema if features is None else features.arrow_schema
    columns = _wanted(schema, fields, name)
    converters = _converters(schema)
    for batch in table.select(columns).to_batches():
        yield from _records(batch, converters)


def _wanted(schema: pa.Schema, fields: Fields, name: str) -> list[str]:
    fields.check_columns(_paths(schema), name)
    wanted = fields.columns(schema.names)
    # A nested field is read with its whole column.
    return [c for c in schema.names if any(w == c or w.startswith(f"{c}.") for w in wanted)]


def _records(batch: pa.RecordBatch, converters: dict[str, Convert]) -> Iterator[dict[str, Any]]:
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values = column.cast(_as_bytes(column.type)).to_pylist()
        columns.append(list(map(converters[name], values)) if name in converters else values)
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return a type with bytes for its strings, however deeply they are nested."""
    for is_text, raw in _BYTES:
        if is_text(kind):
            return raw
    if pa.types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        children = (kind.field(i) for i in range(kind.num_fields))
        return pa.struct([f.with_type(_as_bytes(f.type)) for f in children])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


def _paths(schema: pa.Schema) -> list[str]:
    """Return the names of all columns and nested fields, with dots between their parts."""

    def below(name: str, kind: pa.DataType) -> Iterator[str]:
        yield name
        if pa.types.is_struct(kind):
            for i in range(kind.num_fields):
                yield from below(f"{name}.{kind.field(i).name}", kind.field(i).type)

    return [path for field in schema for path in below(field.name, field.type)]


def _converters(schema: pa.Schema) -> dict[str, Convert]:
    """Return functions, by column, that name the classes of labels and parse values kept as JSON.

    The `datasets` library describes its types in the metadata of a schema, also in Parquet files.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {name: _converter(feature) for name, feature in features.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {name: convert for name, convert in found.items() if convert is not None}


def _converter(feature: Any) -> Convert | None:
    """Return a function that converts values of a feature; ``None`` if they stay as they are."""
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        names = feature["names"]

        def name(number: int | None) -> str | None:
            # The library writes -1 for a label that is missing.
            return names[number] if number is not None and 0 <= number < len(names) else None

        return name
    if feature.get("_type") == "Json":
        return lambda value: None if value is None else json.loads(value)
    if "_type" in feature:
        convert = _converter(feature.get("feature"))
        return convert and (lambda values: values and [convert(value) for value in values])
    children = {key: _converter(child) for key, child in feature.items()}
    if not any(children.values()):
        return None

    def members(value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {key: f(x) if (f := children.get(key)) else x for key, x in value.items()}

    return members
