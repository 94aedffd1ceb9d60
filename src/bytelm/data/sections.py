"""Divide inputs into sections, and sections into blocks: the units of reading and of writing.

A section is a run of consecutive inputs, small ones together. Sections can be read by different
processes, and each yields its documents in blocks of about a shard's size. Sections and blocks
depend only on the inputs and the options, not on what reads them or in what order, and a block
becomes at most one shard of each split. So shards are the same however many processes make them,
and one that is lost can be made again without the others::

    inputs      a.txt  b.txt  big.jsonl            hub:x/y
    sections    [ a.txt b.txt ][ big.jsonl        ][ hub:x/y ]
    blocks      [ 0           ][ 1     2     3    ][ 4 ...   ]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bytelm.data.corpus import Reader
from bytelm.data.dataset import InputRecord, Split
from bytelm.data.inputs import Input, ReadOptions
from bytelm.data.records import Document
from bytelm.data.splitting import document_digest


@dataclass(frozen=True)
class Section:
    """Consecutive inputs that are read one after the other."""

    inputs: tuple[Input, ...]
    sizes: tuple[int, ...]
    """Bytes of each input, for the progress; 0 if unknown or not read."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all inputs."""
        return sum(self.sizes)

    @property
    def is_held_out(self) -> bool:
        """Whether its inputs are held out whole."""
        return self.inputs[0].split == "validation"


@dataclass(frozen=True)
class Outline:
    """What must be known of a block's documents to decide where they go, without their text."""

    digests: list[int]
    """Hash of each document."""
    splits: list[Split | None]
    """Split of each document, if its input has decided it."""
    input_bytes: int
    """Bytes of the inputs that were read for it."""
    records: list[InputRecord]
    """Records of the inputs that ended in it."""


def divide(inputs: Sequence[Input], section_bytes: int) -> list[Section]:
    """Divide inputs into sections of at least ``section_bytes``, except where another must begin.

    Streams, and data sets of unknown size, are sections by themselves; a section's inputs are all
    held out whole or none is.
    """
    sections: list[Section] = []
    group: list[Input] = []
    sizes: list[int] = []

    def close() -> None:
        if group:
            sections.append(Section(tuple(group), tuple(sizes)))
        group.clear()
        sizes.clear()

    for one in inputs:
        is_alone = one.is_stream or one.kind in ("datasets", "hub")
        if is_alone or (group and group[0].split != one.split):
            close()
        group.append(one)
        sizes.append(one.num_bytes if one.is_read else 0)
        if is_alone or sum(sizes) >= section_bytes:
            close()
    close()
    return sections


def read_section(
    section: Section, options: ReadOptions, block_bytes: int
) -> Iterator[tuple[Outline, list[Document]]]:
    """Yield the blocks of a section; the last may have no documents.

    Args:
        section: the inputs.
        options: how to read them.
        block_bytes: size at which a block ends.

    Raises:
        DataError: an input or a record cannot be read.
    """
    reader = Reader(options)
    block: list[Document] = []
    size = position = taken = num_records = 0

    def outline() -> Outline:
        return Outline(
            digests=[document_digest(document.data) for document in block],
            splits=[document.split for document in block],
            input_bytes=position - taken,
            records=reader.records[num_records:],
        )

    before = 0
    for source, num_bytes in zip(section.inputs, section.sizes, strict=True):
        for document in reader.read(source):
            position = before + min(reader.position, num_bytes)
            block.append(document)
            size += len(document.data)
            if size >= block_bytes:
                yield outline(), block
                block, size, taken, num_records = [], 0, position, len(reader.records)
        before += num_bytes
    position = section.num_bytes
    yield outline(), block
