"""Journal of a preparation: which blocks are written, and which sections are read to their end.

::

    {"layout": 2, "settings": {...}}
    {"block": 0, "shards": [...]}                   appended when the block's shards are on disk
    {"section": 0, "first": 0, "blocks": 3, ...}    appended when all blocks of it are known

A preparation that is run again skips a section whose blocks are all written, and reads another
one again, but writes only its blocks that are missing.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytelm.config import Node
from bytelm.data.dataset import (
    JOURNAL,
    SCORER,
    InputRecord,
    ShardRecord,
    SourceStatistics,
    check_shard,
)
from bytelm.errors import DataError
from bytelm.storage import append_line, read_lines, to_json, write_text

LAYOUT = 2
"""Number that changes with the way in which documents are divided into shards."""


class BlockRecord(Node):
    """Shards and statistics of one block."""

    block: int
    shards: list[ShardRecord]
    statistics: dict[str, SourceStatistics]


class SectionRecord(Node):
    """Blocks and inputs of one section."""

    section: int
    first: int
    """Number of its first block."""
    blocks: int
    """Number of blocks."""
    documents: int
    inputs: list[InputRecord]


class Journal:
    """Journal in a folder.

    Args:
        out: folder of the data.
        settings: settings of the preparation.
        resume: whether what was done with the same settings counts as done.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self._out = out
        self._path = out / JOURNAL
        self.blocks: dict[int, BlockRecord] = {}
        """Blocks whose shards are on disk, by number."""
        self.sections: dict[int, SectionRecord] = {}
        """Sections that need not be read again, by number."""
        header = {"layout": LAYOUT, "settings": settings}
        if resume:
            self._load(header)
        if not self.blocks:
            self._clear()
        entries = [*self.blocks.values(), *self.sections.values()]
        lines = [header, *(entry.model_dump(mode="json") for entry in entries)]
        write_text(self._path, "".join(to_json(line) + "\n" for line in lines))

    def add(self, record: BlockRecord | SectionRecord) -> None:
        """Add a record; it is on disk when this returns.

        Raises:
            OSError: the line cannot be written.
        """
        append_line(self._path, to_json(record.model_dump(mode="json")))
        if isinstance(record, BlockRecord):
            self.blocks[record.block] = record

    def remove(self) -> None:
        """Remove the journal of a preparation that has ended."""
        self._path.unlink()

    def _load(self, header: dict[str, Any]) -> None:
        entries: list[Any] = []
        if self._path.exists():
            # What follows a damaged line is done again.
            with suppress(ValueError):
                entries.extend(map(json.loads, read_lines(self._path)))
        if not entries or entries[0] != header:
            return
        sections = []
        for entry in entries[1:]:
            if "section" in entry:
                sections.append(SectionRecord.model_validate(entry))
                continue
            record = BlockRecord.model_validate(entry)
            if all(self._is_intact(shard) for shard in record.shards):
                self.blocks[record.block] = record
        for section in sections:
            if all(section.first + i in self.blocks for i in range(section.blocks)):
                self.sections[section.section] = section

    def _is_intact(self, shard: ShardRecord) -> bool:
        try:
            check_shard(self._out, shard, contents=False)
        except DataError:
            return False
        return True

    def _clear(self) -> None:
        """Remove the shards and the scorer of a preparation with other settings."""
        for path in self._out.glob("*.arrow"):
            path.unlink()
        shutil.rmtree(self._out / SCORER, ignore_errors=True)
