"""Prepare text into Arrow shards, in parallel, and resumable after a kill.

Documents are distributed, in reading order, over shards of about equal size, one series for
training and one for validation. Held-out inputs are read first, and copies of their documents are
held out too; prepared data keeps its split; for other documents a hash of the bytes decides, so
that copies of a document are in the same split. Worker processes score and write the shards, each
file under a temporary name first. A journal lists the finished shards; after a kill, the same
command reads the inputs again and skips them.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bytelm.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    fingerprint,
    load_scorer,
    read_config,
    save_scorer,
)
from bytelm.data.corpus import Reader
from bytelm.data.dataset import (
    JOURNAL,
    MANIFEST,
    RESUME,
    SCORER,
    LeftOut,
    Manifest,
    ScorerRecord,
    ShardRecord,
    Split,
    check_shard,
    read_manifest,
    write_manifest,
)
from bytelm.data.inputs import Input, ReadOptions, find_inputs
from bytelm.data.records import Document
from bytelm.data.splitting import Splitter
from bytelm.data.writing import Shard, writers
from bytelm.errors import DataError
from bytelm.storage import (
    append_line,
    atomic_folder,
    disk_errors,
    is_vacant,
    locked,
    read_lines,
    remove_unfinished,
    to_json,
    write_text,
)
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
    shard_bytes: int = 32 * 2**20
    """Bytes of text per shard."""
    workers: int | None = None
    """Number of processes; ``None`` for one per core if there is a scorer, otherwise one."""
    leave_out: tuple[Path, ...] = ()
    """Folders inside the inputs that are not read; the output folder never is."""

    @property
    def num_workers(self) -> int:
        """Number of processes."""
        if self.workers is not None:
            return max(self.workers, 1)
        return (os.cpu_count() or 1) if self.scorer else 1

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
        finished = {} if streams else _finished(out, settings)
        if not finished:
            _clear(out)
        _write_journal(out, settings, finished)
        scorer = _copy_scorer(out, options)
        reader = Reader(options.read)
        shards = _run(inputs, out, options, reader, finished, report)
        if not shards:
            raise DataError(f"the inputs hold no text: name others ({_reasons(reader)})")
        manifest = Manifest(
            bytelm=__version__,
            settings=settings,
            shards=shards,
            inputs=reader.records,
            left_out=_left_out(reader),
            scorer=scorer,
        )
        write_manifest(out, manifest)
        (out / JOURNAL).unlink()
    return manifest


def _left_out(reader: Reader) -> LeftOut:
    records = reader.records
    return LeftOut(
        empty_documents=sum(one.empty_documents for one in records),
        invalid_records=sum(one.invalid_records for one in records),
        binary_files=sum(one.kind == "binary" for one in records),
        skipped_files=sum(one.kind == "skipped" for one in records),
    )


def _reasons(reader: Reader) -> str:
    """Return why there are no documents, for a message."""
    counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in _left_out(reader) if count]
    named = [f"{one.name}: {one.note}" for one in reader.records[:3] if one.note]
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
    }


def _check_settings(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    # Options that an earlier version did not have had their defaults.
    read = asdict(ReadOptions()) | dict(old.get("read") or {})
    changed = [key for key in new if (read if key == "read" else old.get(key)) != new[key]]
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


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, ShardRecord]:
    """Return the shards that a stopped preparation with the same settings finished, by file."""
    entries: list[Any] = []
    if (out / JOURNAL).exists():
        # Shards after a damaged line are made again.
        with suppress(ValueError):
            entries.extend(map(json.loads, read_lines(out / JOURNAL)))
    if not entries or entries[0] != settings:
        return {}
    records = [ShardRecord.model_validate(entry) for entry in entries[1:]]
    return {record.file: record for record in records if _is_intact(out, record)}


def _clear(out: Path) -> None:
    """Remove the shards and the scorer of a stopped preparation."""
    for path in out.glob("*.arrow"):
        path.unlink()
    shutil.rmtree(out / SCORER, ignore_errors=True)


def _write_journal(out: Path, settings: dict[str, Any], finished: dict[str, ShardRecord]) -> None:
    """Write a journal of the settings and the finished shards, atomically."""
    entries = [settings, *(record.model_dump(mode="json") for record in finished.values())]
    write_text(out / JOURNAL, "".join(to_json(entry) + "\n" for entry in entries))


def _is_intact(out: Path, record: ShardRecord) -> bool:
    try:
        check_shard(out, record, contents=False)
    except DataError:
        return False
    return True


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


def _run(
    inputs: list[Input],
    out: Path,
    options: PrepareOptions,
    reader: Reader,
    finished: dict[str, ShardRecord],
    report: Callable[[PreparationState], None],
) -> list[ShardRecord]:
    """Read the inputs and write all shards; return their records, sorted by name."""
    records = dict[str, ShardRecord]()
    total = sum(i.num_bytes for i in inputs if i.is_read)
    progress = PreparationState(0, total, 0, 0)
    reading = _Reading(inputs, reader, progress, report)
    splitter = Splitter(inputs, options.hashed_share, options.read.cut_bytes)
    # Bytes of input read between a shard and the one before it.
    spans = dict[str, int]()

    def done(record: ShardRecord) -> None:
        records[record.file] = record
        progress.shards += 1
        progress.done_bytes += spans.pop(record.file)
        if record.file not in finished:
            append_line(out / JOURNAL, to_json(record.model_dump(mode="json")))
        report(progress)

    num_workers = options.num_workers
    scorer = out / SCORER if options.scorer else None
    with writers(
        out, scorer, reset_at_newline=options.reset_at_newline, num_workers=num_workers
    ) as submit:
        pending: set[Future[ShardRecord]] = set()
        for shard in _deal(iter(reading), splitter, options.shard_bytes):
            spans[shard.name] = reading.take_span()
            if shard.name in finished:
                done(finished[shard.name])
                continue
            pending.add(submit(shard))
            # Wait only if too much text is pending; otherwise record what is finished.
            timeout = None if len(pending) > 2 * num_workers else 0
            ready, pending = wait(pending, timeout, return_when=FIRST_COMPLETED)
            for future in ready:
                done(future.result())
        for future in as_completed(pending):
            done(future.result())
    return [records[name] for name in sorted(records)]


class _Reading:
    """Iterator over the documents of all inputs that reports its position."""

    def __init__(
        self,
        inputs: list[Input],
        reader: Reader,
        progress: PreparationState,
        report: Callable[[PreparationState], None],
    ) -> None:
        self._inputs, self._reader = inputs, reader
        self._progress, self._report = progress, report
        self._position = self._taken = 0

    def __iter__(self) -> Iterator[Document]:
        before, reported = 0, 0.0
        for source in self._inputs:
            num_bytes = source.num_bytes if source.is_read else 0
            for document in self._reader.read(source):
                self._progress.documents += 1
                self._position = before + min(self._reader.position, num_bytes)
                if time.monotonic() - reported > 0.1:
                    reported = time.monotonic()
                    self._report(self._progress)
                yield document
            before += num_bytes
            self._position = before

    def take_span(self) -> int:
        """Return the bytes of input read since the last call."""
        span = self._position - self._taken
        self._taken = self._position
        return span


def _deal(documents: Iterator[Document], splitter: Splitter, shard_bytes: int) -> Iterator[Shard]:
    """Distribute documents, in reading order, over shards of each split; yield full shards."""
    open_shards: dict[Split, list[Document]] = {"train": [], "validation": []}
    sizes, numbers = Counter[Split](), Counter[Split]()

    def close(split: Split) -> Shard:
        shard = Shard(f"{split}-{numbers[split]:05d}.arrow", split, open_shards[split])
        numbers[split] += 1
        sizes[split] = 0
        open_shards[split] = []
        return shard

    for document in documents:
        split = splitter.split(document)
        open_shards[split].append(document)
        sizes[split] += len(document.data)
        if sizes[split] >= shard_bytes:
            yield close(split)
    for split in ("train", "validation"):
        if open_shards[split]:
            yield close(split)
