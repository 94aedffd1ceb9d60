"""The course of a student: steps of lessons, first in parts and then together, in a run's folder.

Rows are a function of the seed and the step, and nothing else is random, so a course that resumes
from a checkpoint goes on to the same bits.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bytelm import cpu
from bytelm.byteify.cache import CachedDocument
from bytelm.byteify.donor import Donor
from bytelm.byteify.lessons import Teacher, groups
from bytelm.byteify.teacher import Vocabulary
from bytelm.byteify.teaching import Losses, parts_losses, together_losses
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

    read_bytes: int = 2_000_000
    """Most bytes of text that the donor reads."""
    parts_steps: int = 4000
    together_steps: int = 500
    row_bytes: int = 4096
    """Bytes of text in a step, unless a document is longer."""
    parts_rate: float = 2e-3
    """Learning rate while parts are taught; embeddings learn at three times the rate."""
    together_rate: float = 5e-4
    """Learning rate together; the global transformer learns at a tenth of it."""
    save_every: int = 250

    @property
    def steps(self) -> int:
        """Steps of both."""
        return self.parts_steps + self.together_steps


class Course:
    """The steps of a student, from the newest checkpoint of a run on.

    A step is :meth:`learn`, which can be abandoned, and :meth:`update`, which cannot.

    Args:
        folder: folder of the run, with a checkpoint.
        donor: the donor.
        vocabulary: its tokens.
        shards: its readings.
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
        lessons: Lessons,
        seed: int,
    ) -> None:
        self._folder, self._shards, self._lessons, self._seed = folder, shards, lessons, seed
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
        self._norm: Tensor = donor.model.model.norm.weight
        self._begin_stage()
        if self._step_of_stage:
            set_moments(lm.blt, self._optimizer, load_tensors(checkpoint / OPTIMIZER, lm.blt))
        if (folder / METRICS).exists():
            known = (checkpoint / TRAINER).exists()
            size = read_json(checkpoint / TRAINER)["metrics_bytes"] if known else 0
            truncate_to_lines(folder / METRICS, size)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self._lessons.steps

    @property
    def _is_in_parts(self) -> bool:
        return self.step < self._lessons.parts_steps

    @property
    def _step_of_stage(self) -> int:
        return self.step if self._is_in_parts else self.step - self._lessons.parts_steps

    def _begin_stage(self) -> None:
        """Begin a stage, or go on with it: optimiser, schedule and rows."""
        lessons, blt = self._lessons, self._lm.blt
        blt.requires_grad_(True)
        if self._is_in_parts:
            blt.global_model.requires_grad_(False)
            self._steps, rate, multipliers = lessons.parts_steps, lessons.parts_rate, _PARTS
        else:
            self._steps, rate, multipliers = lessons.together_steps, lessons.together_rate, _WHOLE
        self._config = OptimizerConfig(
            learning_rate=rate,
            warmup_steps=min(100, self._steps // 10),
            weight_decay=0.01,
            lr_multipliers=multipliers,
        )
        self._optimizer = build_optimizer(blt, self._config)
        rows = groups(self._shards, lessons.row_bytes, 2 * self._seed + self._is_in_parts)
        self._rows: Iterator[list[CachedDocument]] = islice(rows, self._step_of_stage, None)
        self._next: list[CachedDocument] | None = None
        self._began = time.monotonic()

    def learn(self) -> None:
        """Compute the gradients of a step; if it is abandoned, everything is as before."""
        self._began = time.monotonic()
        if self._next is None:
            self._next = next(self._rows)
        self._optimizer.zero_grad(set_to_none=True)
        lesson = self._teacher.lesson(self._next)
        if self._is_in_parts:
            losses = parts_losses(self._teacher, self._norm, lesson)
        else:
            losses = together_losses(self._lm.blt, lesson)
        losses.backward(self._lm.blt)
        self._losses, self._num_bytes = losses, lesson.ids.numel()

    def update(self) -> str:
        """Complete the step, save as often as the lessons say, and return figures of it.

        Raises:
            TrainingError: the loss is not finite; the parameters are unchanged.
        """
        loss = float(self._losses.total.detach())
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.step + 1} is {loss}: lower the learning rates, and resume "
                "in another folder"
            )
        trained = [one for one in self._lm.blt.parameters() if one.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, self._config.clip_norm)
        rate = learning_rate(self._step_of_stage, self._steps, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        self._optimizer.step()
        self._next = None
        self.step += 1
        figures = self._record()
        if self.step == self._lessons.parts_steps and not self.finished:
            self._begin_stage()
            self.save()
        elif self.step % self._lessons.save_every == 0:
            self.save()
        return figures

    def _record(self) -> str:
        losses: Losses = self._losses
        divergence = float(losses.divergence) / math.log(2)
        record: dict[str, float] = {"step": self.step, "divergence": divergence}
        text = f"{divergence:.3f} bits/byte from the donor"
        if losses.embedding_error is not None:
            record["embedding_error"] = float(losses.embedding_error.detach())
            text += f"  embeddings {record['embedding_error']:.3f}"
        append_line(self._folder / METRICS, to_json(record))
        return f"{text}  {self._num_bytes / (time.monotonic() - self._began):,.0f} B/s"

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


_PARTS = {"embeddings": 3.0}
_WHOLE = {"global": 0.1}
