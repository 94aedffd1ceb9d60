"""Prepare text into Arrow shards, in parallel, and resumable after a kill.

Inputs are divided into sections and blocks (:mod:`bytelm.data.sections`), which an engine reads
and writes in processes of its own, here or on Ray. In reading order, this module decides which
documents of each block are held out: those of held-out inputs, which are read first, and all their
copies; prepared data keeps its split; for other documents a hash of the bytes decides, so that
copies of a document are in the same split. Each file is written under a temporary name first, and
a journal lists the finished blocks; after a kill, the same command makes the others.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bytelm.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    fingerprint,
    load_scorer,
    read_config,
    save_scorer,
)
from bytelm.data.dataset import (
    JOURNAL,
    MANIFEST,
    RESUME,
    SCORER,
    InputRecord,
    LeftOut,
    Manifest,
    ScorerRecord,
    SourceStatistics,
    Split,
    check_shard,
    read_manifest,
    shard_documents,
    write_manifest,
)
from bytelm.data.engines import Device, Engine, Work, local_engine
from bytelm.data.finding import find_inputs
from bytelm.data.inputs import Input, ReadOptions
from bytelm.data.journal import BlockRecord, Journal, SectionRecord
from bytelm.data.sections import Outline, Section, divide
from bytelm.data.splitting import Seen, Splitter, document_digest
from bytelm.data.statistics import add_up
from bytelm.errors import ConfigError, DataError
from bytelm.storage import atomic_folder, disk_errors, is_vacant, locked, remove_unfinished
from bytelm.version import __version__


@dataclass(frozen=True)
class PrepareOptions:
    """Options of :func:`prepare`."""

    read: ReadOptions = field(default_factory=ReadOptions)
    scorer: Path | None = None
    """Checkpoint of the scorer that computes the entropies, or of a model that has one."""
    reset_at_newline: bool = False
    """Whether a newline begins a new context for the scorer."""
    validation: tuple[str, ...] = ()
    """Inputs that are held out whole."""
    validation_share: float | None = None
    """Share of the other documents to hold out; ``None`` for 0.01, or 0 with ``validation``."""
    deduplicate: bool = False
    """Whether of documents with the same bytes only the first, in reading order, is kept."""
    shard_bytes: int = 32 * 2**20
    """Bytes of text per shard."""
    engine: Literal["local", "ray"] = "local"
    """``local``: processes of this computer; ``ray``: Ray, here or on the cluster at
    ``RAY_ADDRESS``."""
    workers: int | None = None
    """Number of processes that score. ``None`` is, on this computer, one per core if the scorer is
    for the CPU, otherwise one; on Ray, where they also write, one per core, or per GPU for
    ``cuda``. Without a scorer, one process of this computer does all."""
    device: Device = "cpu"
    """Device that scores; entropies of ``cuda`` differ from those of ``cpu`` in their last bits."""
    leave_out: tuple[Path, ...] = ()
    """Folders inside the inputs that are not read; the output folder never is."""

    @property
    def num_workers(self) -> int:
        """Number of processes of the local engine."""
        if self.workers is not None:
            return max(self.workers, 1)
        return (os.cpu_count() or 1) if self.scorer and self.device == "cpu" else 1

    @property
    def hashed_share(self) -> float:
        """Share of documents that are held out by their hash."""
        if self.validation_share is not None:
            return self.validation_share
        return 0.0 if self.validation else 0.01


@dataclass
class PreparationState:
    """Progress of a preparation."""

    done_bytes: int
    """Bytes of the input files whose documents have been written."""
    total_bytes: int
    documents: int
    shards: int


def prepare(
    arguments: list[str],
    out: Path,
    options: PrepareOptions,
    report: Callable[[PreparationState], None] = lambda progress: None,
) -> Manifest:
    """Prepare inputs into a folder, unless it is already prepared with the same settings.

    Args:
        arguments: inputs; see :func:`bytelm.data.find_inputs`.
        out: folder to create.
        options: options of the preparation.
        report: called with the progress.

    Raises:
        ConfigError: an input is a stream, which Ray cannot read, or Ray cannot be used.
        DataError: an input cannot be read, the inputs hold no text, a validation share is given for
            prepared data only, ``out`` is not empty, or it was prepared with other settings.
        CheckpointError: the scorer cannot be loaded.
    """
    if not 0 <= options.hashed_share < 1:
        raise DataError(
            f"the validation share must be at least 0 and below 1, not {options.validation_share}"
        )
    options = _with_own_reset(options)
    skip = [out, *options.leave_out]
    held_out = find_inputs(options.validation, options.read, skip) if options.validation else []
    inputs = [replace(one, split="validation") for one in held_out]
    found = find_inputs(arguments, options.read, skip, known=inputs)
    if options.validation_share and all(one.kind == "prepared" for one in found if one.is_read):
        name = next(one.name for one in found if one.is_read)
        raise DataError(
            f"{name} is prepared data, which keeps its split: leave out the validation share, or "
            "prepare the text that it was made of with another one"
        )
    inputs += found
    settings = _settings(inputs, options)
    streams = [one.name for one in inputs if one.is_stream]
    if streams and options.engine == "ray":
        raise ConfigError(
            f"{streams[0]} can be read by this process only, not by others of Ray: leave out "
            "--engine ray, or write it to a file first"
        )
    if (out / MANIFEST).exists():
        if streams:
            raise DataError(
                f"{out} exists, and may have been made from other {streams[0]}: remove it, "
                "or choose another folder"
            )
        manifest = read_manifest(out)
        _check_settings(manifest.settings, settings, out)
        for shard in manifest.shards:
            check_shard(out, shard, contents=False)
        return manifest
    _check_is_ours(out)
    with disk_errors(out, DataError, RESUME), locked(out):
        remove_unfinished(out)
        # A stream may hold another text this time, so no shard of it counts as finished.
        journal = Journal(out, settings, resume=not streams)
        manifest = _make(inputs, out, options, journal, settings, report)
        write_manifest(out, manifest)
        journal.remove()
    return manifest


def _make(
    inputs: list[Input],
    out: Path,
    options: PrepareOptions,
    journal: Journal,
    settings: dict[str, Any],
    report: Callable[[PreparationState], None],
) -> Manifest:
    """Make all shards that are not finished, and return the manifest."""
    scorer = _copy_scorer(out, options)
    work = Work(
        out=out,
        read=options.read,
        block_bytes=options.shard_bytes,
        scorer=out / SCORER if options.scorer else None,
        reset_at_newline=options.reset_at_newline,
        device=options.device if options.scorer else "cpu",
    )
    with _engine(options, work) as engine:
        preparation = _Preparation(inputs, options, engine, journal, out, report)
        preparation.run()
    blocks = [journal.blocks[number] for number in range(preparation.num_blocks)]
    shards = sorted((one for block in blocks for one in block.shards), key=lambda one: one.split)
    if not shards:
        raise DataError(f"the inputs hold no text: name others ({_reasons(preparation.inputs)})")
    statistics = add_up([block.statistics for block in blocks])
    return Manifest(
        bytelm=__version__,
        settings=settings,
        shards=shards,
        inputs=preparation.inputs,
        left_out=_left_out(preparation.inputs, statistics),
        statistics=statistics,
        scorer=scorer,
    )


def _engine(options: PrepareOptions, work: Work) -> AbstractContextManager[Engine]:
    if options.engine == "local":
        return local_engine(work, options.num_workers)
    try:
        from bytelm.data.ray_engine import ray_engine
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--engine ray needs {error.name}, which is not installed: pip install 'bytelm[ray]'"
        ) from None
    return ray_engine(work, options.workers)


def _left_out(records: list[InputRecord], statistics: Mapping[str, SourceStatistics]) -> LeftOut:
    return LeftOut(
        duplicate_documents=sum(one.duplicate_documents for one in statistics.values()),
        empty_documents=sum(one.empty_documents for one in records),
        invalid_records=sum(one.invalid_records for one in records),
        binary_files=sum(one.kind == "binary" for one in records),
        skipped_files=sum(one.kind == "skipped" for one in records),
    )


def _reasons(records: list[InputRecord]) -> str:
    """Return why there are no documents, for a message."""
    counts = [
        f"{count:,} {name.replace('_', ' ')}" for name, count in _left_out(records, {}) if count
    ]
    named = [f"{one.name}: {one.note}" for one in records[:3] if one.note]
    return "; ".join([", ".join(counts), *named])


def _settings(inputs: list[Input], options: PrepareOptions) -> dict[str, Any]:
    """Return everything that the result depends on, ready for JSON."""
    scorer = None
    if options.scorer is not None:
        scorer = fingerprint(find_checkpoint(options.scorer))
    return {
        "inputs": [i.identity for i in inputs if i.kind != "skipped"],
        "read": asdict(options.read),
        "scorer": scorer,
        "reset_at_newline": options.reset_at_newline,
        "validation_share": options.hashed_share,
        "shard_bytes": options.shard_bytes,
        "device": options.device if options.scorer else "cpu",
        "deduplicate": options.deduplicate,
    }


def _check_settings(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    # Options that an earlier version did not have had their defaults.
    read = asdict(ReadOptions()) | dict(old.get("read") or {})
    old = {"device": "cpu", "deduplicate": False, **old, "read": read}
    changed = [key for key in new if old.get(key) != new[key]]
    if changed:
        raise DataError(
            f"{out} was prepared with other settings ({', '.join(changed)} differ): choose another "
            "folder, or remove it"
        )


def _check_is_ours(out: Path) -> None:
    """Check that a folder is vacant, or holds a preparation that was stopped."""
    if not (out / JOURNAL).exists() and not is_vacant(out):
        raise DataError(
            f"{out} is not empty and was not made by `bytelm data prepare`: choose another folder"
        )


def _copy_scorer(out: Path, options: PrepareOptions) -> ScorerRecord | None:
    """Copy the scorer into the folder, so that the data is complete by itself."""
    if options.scorer is None:
        return None
    source = find_checkpoint(options.scorer)
    scorer, config = load_scorer(source, reset_at_newline=options.reset_at_newline)
    if not (out / SCORER).exists():
        if read_config(source).scorer is not None:
            save_scorer(out / SCORER, scorer, config)
        else:
            with atomic_folder(out / SCORER) as folder:
                for name in ("config.json", "model.safetensors"):
                    (folder / name).write_bytes((source / name).read_bytes())
    return ScorerRecord(
        fingerprint=fingerprint(out / SCORER), reset_at_newline=options.reset_at_newline
    )


def _with_own_reset(options: PrepareOptions) -> PrepareOptions:
    """Return options by which the scorer of a model resets as it did when the model was trained.

    Raises:
        CheckpointError: the scorer is not a checkpoint, or it is damaged.
        DataError: the options ask for another behaviour.
    """
    if options.scorer is None:
        return options
    folder = find_checkpoint(options.scorer)
    check_checkpoint(folder)
    own = read_config(folder).scorer
    if own is None:
        return options
    if options.reset_at_newline and not own.reset_at_newline:
        raise DataError(
            f"{folder} was trained with a scorer that does not reset at newlines: leave out "
            "--reset-at-newline"
        )
    return replace(options, reset_at_newline=own.reset_at_newline)


class _Preparation:
    """Reads all sections and writes all blocks that are not finished."""

    def __init__(
        self,
        inputs: list[Input],
        options: PrepareOptions,
        engine: Engine,
        journal: Journal,
        out: Path,
        report: Callable[[PreparationState], None],
    ) -> None:
        self.num_blocks = 0
        self.inputs: list[InputRecord] = []
        self._sections = divide(inputs, options.shard_bytes)
        self._splitter = Splitter(inputs, options.hashed_share, options.read.cut_bytes)
        self._seen = Seen() if options.deduplicate else None
        self._engine, self._journal, self._out = engine, journal, out
        self._progress = PreparationState(0, sum(one.num_bytes for one in self._sections), 0, 0)
        self._report = report
        self._pending = set[Future[BlockRecord]]()
        self._input_bytes = dict[int, int]()
        """Bytes of input of each block that is not finished."""

    def run(self) -> None:
        """Prepare all sections, in order."""
        known = self._journal.sections
        unread = [one for number, one in enumerate(self._sections) if number not in known]
        readings = self._engine.read(unread)
        for number, section in enumerate(self._sections):
            if number in known:
                self._skip(section, known[number])
            else:
                self._read(number, next(readings))
        for future in as_completed(self._pending):
            self._finish(future.result())

    def _skip(self, section: Section, record: SectionRecord) -> None:
        """Do as if a section had been read whose blocks are all written."""
        blocks = range(record.first, record.first + record.blocks)
        shards = [one for block in blocks for one in self._journal.blocks[block].shards]
        if section.is_held_out or self._seen is not None:
            for shard in shards:
                documents = shard_documents(self._out / shard.file)
                digests = [document_digest(document) for document in documents]
                if section.is_held_out:
                    self._splitter.hold_out(digests)
                if self._seen is not None:
                    self._seen.add(digests)
        assert record.first == self.num_blocks
        self.num_blocks += record.blocks
        self.inputs += record.inputs
        self._progress.documents += record.documents
        self._progress.done_bytes += section.num_bytes
        self._progress.shards += len(shards)
        self._report(self._progress)

    def _read(self, number: int, reading: Iterator[tuple[Outline, Any]]) -> None:
        first, documents, inputs = self.num_blocks, self._progress.documents, len(self.inputs)
        for outline, block in reading:
            self.inputs += outline.records
            self._progress.documents += len(outline.digests)
            if outline.digests:
                self._write(outline, block)
            else:
                self._progress.done_bytes += outline.input_bytes
            self._report(self._progress)
        record = SectionRecord(
            section=number,
            first=first,
            blocks=self.num_blocks - first,
            documents=self._progress.documents - documents,
            inputs=self.inputs[inputs:],
        )
        self._journal.add(record)

    def _write(self, outline: Outline, block: Any) -> None:
        """Write a block unless it is finished, and note which others are finished by now."""
        splits = self._splits(outline)
        number = self.num_blocks
        self.num_blocks += 1
        self._input_bytes[number] = outline.input_bytes
        if number in self._journal.blocks:
            self._finish(self._journal.blocks[number])
            return
        self._pending.add(self._engine.write(number, block, splits))
        # Wait only if too much text is pending; otherwise note what is finished.
        timeout = None if len(self._pending) > 2 * self._engine.num_workers else 0
        ready, self._pending = wait(self._pending, timeout, return_when=FIRST_COMPLETED)
        for future in ready:
            self._finish(future.result())

    def _splits(self, outline: Outline) -> list[Split | None]:
        """Return the split of each document, or ``None`` for copies to leave out."""
        splits: list[Split | None] = [
            self._splitter.split(digest, decided)
            for digest, decided in zip(outline.digests, outline.splits, strict=True)
        ]
        if self._seen is None:
            return splits
        is_new = self._seen.add(outline.digests)
        return [split if new else None for split, new in zip(splits, is_new, strict=True)]

    def _finish(self, record: BlockRecord) -> None:
        if record.block not in self._journal.blocks:
            self._journal.add(record)
        self._progress.shards += len(record.shards)
        self._progress.done_bytes += self._input_bytes.pop(record.block)
        self._report(self._progress)
