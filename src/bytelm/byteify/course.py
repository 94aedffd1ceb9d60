"""The course of a student: lessons of the encoder, of both parts, and of all together, in a run.

Rows are a function of the seed and the step, and nothing else is random, so a course that resumes
from a checkpoint goes on to the same bits.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bytelm import cpu
from bytelm.byteify.boundaries import Divided
from bytelm.byteify.donor import Donor
from bytelm.byteify.lessons import Lesson, Teacher, TokenLesson, groups, text_groups
from bytelm.byteify.teacher import Vocabulary
from bytelm.byteify.teaching import encoder_loss, parts_losses, together_losses
from bytelm.checkpoint import load_scorer, load_tensors, read_config, save_tensors, write_model
from bytelm.config import OptimizerConfig
from bytelm.errors import TrainingError
from bytelm.layout import METRICS, MODEL, check_checkpoint, saved_steps, step_folder, step_number
from bytelm.lm import PatchedLM, build_lm
from bytelm.storage import (
    append_line,
    atomic_folder,
    read_json,
    remove_unfinished,
    to_json,
    truncate_to_lines,
    write_json,
)
from bytelm.training.optim import build_optimizer, learning_rate
from bytelm.training.saving import moments
from bytelm.training.state import OPTIMIZER, TRAINER, set_moments


class Lessons(NamedTuple):
    """How long a student is taught, and with which rates."""

    read_bytes: int = 3_000_000
    """Most bytes of text that the donor reads."""
    encoder_steps: int = 600
    parts_steps: int = 900
    together_steps: int = 30
    row_bytes: int = 4096
    """Bytes of text in a step, unless a document is longer."""
    parts_rate: float = 2e-3
    """Learning rate of encoder and decoder; embeddings learn at three times the rate."""
    together_rate: float = 5e-4
    """Learning rate together; the global transformer learns at a tenth of it."""
    save_every: int = 100

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return self.encoder_steps + self.parts_steps + self.together_steps


class Stage(NamedTuple):
    """A part of a course, with its own optimiser and schedule."""

    name: str
    begin: int
    """Step of the course at which it begins."""
    steps: int
    rate: float
    multipliers: dict[str, float]
    trained: tuple[str, ...]
    """Parts of the BLT that learn."""

    @property
    def end(self) -> int:
        """Step at which it ends."""
        return self.begin + self.steps


_TABLES = {"embeddings": 3.0}
_ALL = ("encoder", "global_model", "decoder")


def stages(lessons: Lessons) -> list[Stage]:
    """Return the stages of a course that have steps; the last one if none has."""
    parts, whole = lessons.parts_rate, lessons.together_rate
    first = lessons.encoder_steps
    second = first + lessons.parts_steps
    every = (
        Stage("encoder", 0, first, parts, _TABLES, ("encoder",)),
        Stage("parts", first, lessons.parts_steps, parts, _TABLES, ("encoder", "decoder")),
        Stage("together", second, lessons.together_steps, whole, {"global": 0.1}, _ALL),
    )
    return [one for one in every if one.steps] or [every[-1]]


class Course:
    """The steps of a student, from the newest checkpoint of a run on.

    A step is :meth:`learn`, which can be abandoned, and :meth:`update`, which cannot.

    Args:
        folder: folder of the run, with a checkpoint.
        donor: the donor.
        vocabulary: its tokens.
        shards: its readings.
        text: text for the encoder, which needs no readings.
        lessons: how long, and with which rates.
        seed: seed of the order of the text.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(
        self,
        folder: Path,
        donor: Donor,
        vocabulary: Vocabulary,
        shards: Sequence[Path],
        text: Sequence[Divided],
        lessons: Lessons,
        seed: int,
    ) -> None:
        self._folder, self._lessons, self._seed = folder, lessons, seed
        self._shards, self._text = shards, text
        checkpoint = saved_steps(folder)[-1]
        check_checkpoint(checkpoint)
        self.step = self._saved = step_number(checkpoint)
        self._description = read_config(checkpoint)
        scorer, _ = load_scorer(checkpoint, reset_at_newline=False)
        lm = build_lm(self._description, scorer=scorer)
        assert isinstance(lm, PatchedLM)
        lm.blt.load_state_dict(load_tensors(checkpoint / MODEL, lm.blt))
        cpu.fuse(lm.blt)
        self._lm, self._teacher = lm, Teacher(donor, vocabulary, lm)
        self._begin_stage()
        if self.step > self._stage.begin:
            set_moments(lm.blt, self._optimizer, load_tensors(checkpoint / OPTIMIZER, lm.blt))
        if (folder / METRICS).exists():
            known = (checkpoint / TRAINER).exists()
            size = read_json(checkpoint / TRAINER)["metrics_bytes"] if known else 0
            truncate_to_lines(folder / METRICS, size)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self._lessons.steps

    def _begin_stage(self) -> None:
        """Begin a stage, or go on with it: optimiser, schedule and lessons."""
        every = stages(self._lessons)
        self._stage = next((one for one in every if self.step < one.end), every[-1])
        for name, part in self._lm.blt.named_children():
            part.requires_grad_(name in self._stage.trained)
        self._config = OptimizerConfig(
            learning_rate=self._stage.rate,
            warmup_steps=min(100, self._stage.steps // 10),
            weight_decay=0.01,
            lr_multipliers=self._stage.multipliers,
        )
        self._optimizer = build_optimizer(self._lm.blt, self._config)
        self._lesson: Lesson | TokenLesson | None = None
        self._rows = islice(self._groups(), self.step - self._stage.begin, None)
        self._began = time.monotonic()

    def _groups(self) -> Iterator[Any]:
        """Yield the documents of every step of the stage."""
        # Each stage trains another number of parts, and so has an order of its own.
        row_bytes, seed = self._lessons.row_bytes, 3 * self._seed + len(self._stage.trained)
        if self._stage.name == "encoder":
            return text_groups(self._text, row_bytes, seed)
        return groups(self._shards, row_bytes, seed)

    def _next_lesson(self) -> Lesson | TokenLesson:
        group = next(self._rows)
        if self._stage.name == "encoder":
            return self._teacher.token_lesson(group)
        return self._teacher.lesson(group)

    def learn(self) -> None:
        """Compute the gradients of a step; if it is abandoned, everything is as before."""
        self._began = time.monotonic()
        if self._lesson is None:
            self._lesson = self._next_lesson()
        self._optimizer.zero_grad(set_to_none=True)
        lesson = self._lesson
        if isinstance(lesson, TokenLesson):
            self._loss, self._figure = encoder_loss(self._teacher, lesson), "embedding_error"
            self._value = float(self._loss.detach())
        else:
            learn = parts_losses if self._stage.name == "parts" else together_losses
            self._loss, divergence = learn(self._teacher, lesson)
            self._figure, self._value = "divergence", float(divergence) / math.log(2)
        self._loss.backward()

    def update(self) -> str:
        """Complete the step, save as often as the lessons say, and return figures of it.

        Raises:
            TrainingError: the loss is not finite; the parameters are unchanged.
        """
        loss = float(self._loss.detach())
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.step + 1} is {loss}: lower the learning rates, and resume "
                "in another folder"
            )
        trained = [one for one in self._lm.blt.parameters() if one.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, self._config.clip_norm)
        rate = learning_rate(self.step - self._stage.begin, self._stage.steps, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        self._optimizer.step()
        self.step += 1
        figures = self._record()
        self._lesson = None
        if self.step == self._stage.end and not self.finished:
            self._begin_stage()
            self.save()
        elif self.step % self._lessons.save_every == 0:
            self.save()
        return figures

    def _record(self) -> str:
        record = {"step": self.step, self._figure: self._value}
        append_line(self._folder / METRICS, to_json(record))
        assert self._lesson is not None
        rate = self._lesson.ids.numel() / (time.monotonic() - self._began)
        unit = "of the embeddings missed" if self._figure == "embedding_error" else "bits/byte off"
        return f"{self._stage.name}: {self._value:.3f} {unit}  {rate:,.0f} B/s"

    def save(self) -> None:
        """Save a checkpoint, unless there is one of this step, and remove the one before.

        Raises:
            CheckpointError: it cannot be written; the one before is unchanged.
        """
        if self.step == self._saved:
            return
        path = self._folder / METRICS
        state = {
            "step": self.step,
            "threads": torch.get_num_threads(),
            "metrics_bytes": path.stat().st_size,
        }
        folder = step_folder(self._folder, self.step)
        remove_unfinished(folder.parent)
        with atomic_folder(folder) as temporary:
            training = {**(self._description.training or {}), "distilled_steps": self.step}
            write_model(temporary, self._lm, self._description, training)
            save_tensors(temporary / OPTIMIZER, moments(self._lm.blt, self._optimizer))
            write_json(temporary / TRAINER, state)
        for older in saved_steps(self._folder):
            if older != folder:
                shutil.rmtree(older)
        self._saved = self.step
