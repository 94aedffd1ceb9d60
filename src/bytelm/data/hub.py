"""Read data sets of the Hugging Face Hub by name, streamed: ``hub:OWNER/NAME:CONFIG:SPLIT``."""

from collections.abc import Iterator
from typing import Any

from bytelm.data.records import Fields
from bytelm.data.tables import BATCH, table_records
from bytelm.errors import DataError

PREFIX = "hub:"


def hub_parts(named: str) -> tuple[str, str | None, str]:
    """Return the name of a data set, its configuration and its split (``train`` by default).

    Raises:
        DataError: the name has more than three parts, or is empty.
    """
    name, *rest = named.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2:
        raise DataError(
            f"{named!r} must look like hub:OWNER/NAME, hub:OWNER/NAME:CONFIG or "
            "hub:OWNER/NAME:CONFIG:SPLIT"
        )
    config, split = [*rest, "", ""][:2]
    return name, config or None, split or "train"


def hub_records(named: str, fields: Fields) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set with the columns that the fields name, as they are downloaded.

    Nothing is kept on the disk. Local folders with the layout of a data set can be named too.

    Args:
        named: the data set, as ``hub:OWNER/NAME:CONFIG:SPLIT``.
        fields: what is read of each row.

    Raises:
        DataError: the `datasets` library is not installed, the data set cannot be read, or it has
            no such column.
    """
    name, config, split = hub_parts(named)
    try:
        import datasets
    except ImportError:
        raise DataError(f"{named} needs the `datasets` library: install bytelm[hub]") from None
    try:
        dataset: Any = datasets.load_dataset(name, config, split=split, streaming=True)
        for table in dataset.with_format("arrow").iter(BATCH):
            yield from table_records(table, dataset.features, fields, named)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # The library raises errors of many kinds, also those of the network.
        what = " ".join(str(error).split()).rstrip(".") or repr(error)
        raise DataError(
            f"cannot read {named}: {what[:400]}; check the name, its configuration and split, and "
            "the network (a private data set needs `hf auth login`), or name a folder with a copy"
        ) from error
