"""The training of the quickstart: two models in turns, with progress and advice."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from bytelm.config import Recipe, load_recipe
from bytelm.progress import Callback, Progress
from bytelm.training import TrainingResult, Turns, train_in_turns

FLOPS = 4e12
"""Training FLOPs of each of the two models, if the time allows."""
MIN_FLOPS = FLOPS / 2
"""Fewer FLOPs than these say little: the BLT is not yet better than xz, which saw no other text."""
EVALUATION_SHARE, DRAWING_SHARE = 0.08, 0.02
"""Shares of the time kept for evaluation, and for sampling and figures."""
PROBE_SECONDS = 10.0
"""Time of training by which its speed is judged."""


def _training_recipe(name: str, out: Path, seed: int) -> Recipe:
    overrides = [
        f"data.path={out / ('scored' if name == 'blt' else 'text')}",
        f"train.seed={seed}",
        # The clock decides the number of steps, and when to validate.
        *(f"train.{name}={10**9}" for name in ("steps", "validate_every", "checkpoint_every")),
    ]
    recipe = load_recipe(f"quickstart-{name}", overrides)
    assert isinstance(recipe, Recipe)
    return recipe


class Coach:
    """Training of the two models within the time, with its progress and warnings."""

    def __init__(self, progress: Progress, out: Path, began: float, minutes: float) -> None:
        self._progress, self._out = progress, out
        self._began, self._minutes = began, minutes
        self._preparation = time.monotonic() - began
        self._figures: dict[str, str] = {}
        self._wanted: int | None = None

    def train(self, seed: int) -> list[TrainingResult]:
        """Train both models; returns the results of the BLT and of the byte transformer."""
        recipes = [(_training_recipe(n, self._out, seed), self._out / n) for n in ("blt", "byte")]
        callbacks = [_Latest(name, self._figures, self._progress) for name in ("BLT", "byte")]
        deadline = self._began + 60 * self._minutes * (1 - EVALUATION_SHARE - DRAWING_SHARE)
        with self._progress.counting("training", 100) as count:

            def report(turns: Turns) -> None:
                count(int(100 * turns.share), ", ".join(self._figures.values()))
                self.check_speed(turns)

            return train_in_turns(recipes, FLOPS, deadline, callbacks=callbacks, report=report)

    def check_speed(self, turns: Turns) -> None:
        """Say once if the time will not be enough; ``_wanted`` is the time that would be."""
        if turns.seconds < min(PROBE_SECONDS, 0.1 * 60 * self._minutes):
            return
        training = 2 * FLOPS / turns.flops_per_second
        share = 1 - EVALUATION_SHARE - DRAWING_SHARE
        is_first = self._wanted is None
        self._wanted = math.ceil(1.1 * (self._preparation + training) / share / 60)
        if is_first and turns.reachable < MIN_FLOPS:
            self._progress.note(self._advice(turns.reachable))

    def caution(self, flops: float) -> str | None:
        """Return a warning if a model got fewer FLOPs than a meaningful comparison needs."""
        return self._advice(flops) if flops < 0.99 * MIN_FLOPS else None

    def _advice(self, flops: float) -> str:
        wanted = self._wanted
        if wanted is None:
            wanted = math.ceil(self._minutes * FLOPS / max(flops, 1.0))
        allow = "minute allows" if self._minutes == 1 else "minutes allow"
        return (
            f"{self._minutes:g} {allow} {flops / FLOPS:.0%} of the usual training on this "
            "computer now, too little for a meaningful result: "
            f"--minutes {wanted}, with another --out, would allow all of it"
        )


class _Latest(Callback):
    """Latest metrics of a model, for the progress of both."""

    def __init__(self, name: str, figures: dict[str, str], progress: Progress) -> None:
        self._name, self._figures, self._progress = name, figures, progress

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if "validation_bpb" in metrics:
            bpb = metrics["validation_bpb"]
            self._progress.note(f"{self._name}, step {step}: held-out {bpb:.3f} bpb")
        else:
            self._figures[self._name] = f"{self._name} {metrics['bpb']:.3f} bpb"
