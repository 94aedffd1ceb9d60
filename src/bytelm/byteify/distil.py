"""Distil a donor: a byteified model that the donor teaches, in a folder that resumes.

::

    RUN/distil.json                     donor and settings
    RUN/readings/                       what the donor predicts of the text (bytelm.byteify.cache)
    RUN/metrics.jsonl                   losses
    RUN/checkpoints/step-00000500/      the newest checkpoint: a complete model, and
        optimizer.safetensors           moments by parameter name
        trainer.json                    step, threads, size of the metrics

First the encoder is taught, then the decoder as well, without the global transformer; then all
(:mod:`bytelm.byteify.teaching`). A stopped run resumes to the same bits: rows are a function of the
seed and the step.
"""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bytelm import codec
from bytelm.byteify import LocalSizes, byteify
from bytelm.byteify.boundaries import divide
from bytelm.byteify.cache import cache_readings, find_shards
from bytelm.byteify.course import Course, Lessons
from bytelm.byteify.donor import Donor, open_donor
from bytelm.byteify.lessons import patch_ends
from bytelm.byteify.patches import SAMPLE_BYTES, sample_text
from bytelm.byteify.teacher import Vocabulary, read_vocabulary
from bytelm.checkpoint import load_model
from bytelm.data import ReadOptions
from bytelm.errors import CheckpointError, ConfigError
from bytelm.layout import saved_steps, step_folder
from bytelm.lm import PatchedLM
from bytelm.progress import Progress
from bytelm.stopping import Stopped, Stopping
from bytelm.storage import at_home, is_vacant, locked, read_json, write_json

RUN, READINGS = "distil.json", "readings"
PART_CHARACTERS = 4000
"""Longest document that the donor reads; longer ones are cut."""
SHARD_BYTES = 200_000


class Distilled(NamedTuple):
    """A run that has finished or stopped."""

    folder: Path
    step: int
    finished: bool
    stopped: str | None
    """Why it stopped, such as ``SIGINT``."""


class _Work(NamedTuple):
    """What a run is made of."""

    donor: str
    inputs: list[str]
    folder: Path
    lessons: Lessons
    readings: Path | None
    patch_size: float | None
    sizes: LocalSizes
    seed: int
    read: ReadOptions
    progress: Progress

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same to resume the run."""
        return {
            "donor": self.donor,
            "seed": self.seed,
            "patch_size": self.patch_size,
            "sizes": self.sizes._asdict(),
            "lessons": self.lessons._asdict(),
            "readings": None if self.readings is None else str(self.readings.resolve()),
        }


def distil(
    donor: str | PathLike[str],
    texts: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    lessons: Lessons | None = None,
    readings: str | PathLike[str] | None = None,
    patch_size: float | None = None,
    sizes: LocalSizes | None = None,
    seed: int = 0,
    read: ReadOptions | None = None,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Make a byte model of a donor that teaches it; or resume the run in the folder.

    Args:
        donor: folder, GGUF file or Hub repository of a model of the Llama family, with a byte-level
            tokenizer.
        texts: inputs to learn on, as for :func:`bytelm.prepare`.
        out: folder of the run.
        lessons: how long, and with which rates.
        readings: folder of readings that another run of the same donor made; ``None`` to let the
            donor read the text.
        patch_size: mean bytes per patch; ``None`` for the donor's bytes per token.
        sizes: sizes of encoder and decoder.
        seed: seed of the random weights, and of the order of the text.
        read: options of reading the text.
        time_limit: seconds from now until the run stops with a checkpoint.
        progress: receives the progress.

    Raises:
        CheckpointError: the donor cannot be transplanted, or has no byte-level tokenizer; or the
            run cannot be resumed.
        ConfigError: the folder holds a run with other settings, or something else.
        DataError: the text cannot be read, or there is too little of it; the disk has too little
            room for the readings; or ``readings`` holds none.
        TrainingError: a loss is not finite.
    """
    work = _Work(
        str(donor),
        [fspath(one) for one in texts],
        at_home(out),
        lessons or Lessons(),
        None if readings is None else at_home(readings),
        patch_size,
        sizes or LocalSizes(),
        seed,
        read or ReadOptions(),
        progress or Progress(),
    )
    stop = Stopping(time_limit)
    with locked(work.folder), stop.listening():
        _claim(work.folder, work.settings)
        return _run(work, stop)


def _run(work: _Work, stop: Stopping) -> Distilled:
    course = None
    try:
        with stop.interruptible():
            course = _prepared(work)
        with work.progress.counting("distilling", work.lessons.steps, course.step) as show:
            while not course.finished and not stop.reason:
                with stop.interruptible():
                    course.learn()
                figures = course.update()
                show(course.step, figures)
                stop.agree()
    except Stopped:
        # The step in progress changed nothing yet.
        pass
    if course is None:
        return Distilled(work.folder, 0, False, stop.reason)
    course.save()
    return Distilled(work.folder, course.step, course.finished, stop.reason)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Check that a folder is vacant or holds a run with these settings, and record them.

    Raises:
        ConfigError: it holds something else.
    """
    path = folder / RUN
    # Settings of a run that made nothing, such as one whose donor was mistyped, bind nobody.
    if path.exists() and saved_steps(folder):
        known = read_json(path, CheckpointError)
        changed = [name for name, value in settings.items() if known.get(name) != value]
        if changed:
            raise ConfigError(
                f"{folder} holds a run with other settings ({', '.join(changed)}): use another "
                "folder, or the same settings to resume it"
            )
    elif not path.exists() and not is_vacant(folder):
        raise ConfigError(f"{folder} is not empty and holds no run: choose another folder")
    else:
        write_json(path, settings)


def _prepared(work: _Work) -> Course:
    """Return the course of a run, with a model and readings, which are made if they are missing."""
    progress = work.progress
    if not saved_steps(work.folder):
        byteify(
            work.donor,
            work.inputs,
            step_folder(work.folder, 0),
            boundaries=True,
            vocabulary=True,
            patch_size=work.patch_size,
            sizes=work.sizes,
            seed=work.seed,
            read=work.read,
            progress=progress,
        )
    with progress.waiting("loading the donor"):
        donor = open_donor(work.donor)
    vocabulary = read_vocabulary(donor)
    readings = work.readings
    if readings is None:
        readings = work.folder / READINGS
        _read(work, donor, vocabulary, readings)
    shards = find_shards(donor, readings)
    with progress.waiting("loading the model and the text"):
        text = divide(donor, vocabulary, [one.encode() for one in _documents(work, SAMPLE_BYTES)])
        return Course(work.folder, donor, vocabulary, shards, text, work.lessons, work.seed)


def _read(work: _Work, donor: Donor, vocabulary: Vocabulary, readings: Path) -> None:
    """Let the donor read the text as the student divides it, or the part that it has not read."""
    documents = _documents(work, work.lessons.read_bytes)
    student = load_model(work.folder)[0]
    assert isinstance(student, PatchedLM)
    ends = [_ends(student, text) for text in documents]
    with work.progress.counting("the donor reads", len(documents)) as show:
        cache_readings(
            donor,
            vocabulary,
            documents,
            readings,
            ends=ends,
            shard_bytes=SHARD_BYTES,
            report=lambda done: show(done, "documents"),
        )


def _ends(student: PatchedLM, text: str) -> list[int]:
    """Return after which bytes of a text its tokens have to end: one before a patch does."""
    ids = torch.from_numpy(codec.encode(text.encode()))[None]
    ends = patch_ends(student, ids, torch.zeros_like(ids))
    return [at - 1 for at in ends[0].nonzero().flatten().tolist() if at > 1]


def _documents(work: _Work, max_bytes: int) -> list[str]:
    """Return parts of the text in random order."""
    text = sample_text(work.inputs, work.read, max_bytes=max_bytes)
    whole = [part.decode("utf-8", "ignore") for part in (*text.counted, *text.calibration)]
    parts = [
        part[at : at + PART_CHARACTERS]
        for part in whole
        for at in range(0, len(part), PART_CHARACTERS)
    ]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(work.seed))
    return [parts[index] for index in order.tolist()]
