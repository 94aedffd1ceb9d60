"""Other thresholds at inference: bits per byte, bytes per patch and scores, weights unchanged.

The paper's largest model is trained with a threshold of 0.6 and read with 0.1: more patches, more
steps of the global transformer, better scores (BLT, section 5.2).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bytelm.config import CalibratedPatching
from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.bootstrap import Estimate, Floats, ratio_estimate
from bytelm.evaluation.languages import document_flops
from bytelm.evaluation.scores import Difference, Scores, difference, score
from bytelm.language_model import LanguageModel
from bytelm.lm import PatchedLM
from bytelm.patching import build_patcher
from bytelm.progress import ignore


@dataclass(frozen=True)
class ThresholdPoint:
    """A model that reads text with some threshold."""

    threshold: float
    """In nats; the limit of the increase for the monotonic rule."""
    is_own: bool
    """Whether it is the threshold of the model's own rule."""
    patch_size: Estimate
    """Mean bytes per patch."""
    bits_per_byte: Estimate
    change: Estimate
    """Bits per byte minus those with the model's own threshold, paired by document."""
    flops: float
    """Forward FLOPs per byte, with the scorer, in a context of the model's length."""


def with_threshold(lm: LanguageModel, threshold: float) -> LanguageModel:
    """Return the model with another threshold of its rule. It shares the weights.

    Args:
        lm: BLT whose rule has a threshold.
        threshold: in nats; the increase, for the monotonic rule.

    Raises:
        ConfigError: the model has no rule with a threshold.
    """
    own = lm.config.patching
    if not isinstance(lm.module, PatchedLM) or not isinstance(own, CalibratedPatching):
        name = "no patches" if own is None else f"{own.kind} patches"
        raise ConfigError(
            f"the model has {name}, and no threshold to change: load a BLT with an entropy rule"
        )
    rule = own.with_threshold(threshold)
    module = PatchedLM(lm.module.blt, build_patcher(rule), lm.module.scorer).eval()
    return LanguageModel(module, lm.config.model_copy(update={"patching": rule}))


def _own_threshold(lm: LanguageModel) -> float:
    """Return the threshold of a model's rule; any number if it has none."""
    rule: Any = lm.config.patching
    return getattr(rule, getattr(rule, "threshold_name", ""), 0.0)


def measure_thresholds(
    lm: LanguageModel,
    documents: Sequence[bytes],
    thresholds: Sequence[float],
    report: Callable[[int], None] = ignore,
) -> list[ThresholdPoint]:
    """Measure bits per byte with other thresholds at inference, weights unchanged.

    Args:
        lm: BLT whose rule has a threshold.
        documents: the text, not empty.
        thresholds: thresholds in nats; the model's own is measured too.
        report: called with the bytes measured so far, of all thresholds.

    Returns:
        Points in the order of thresholds.

    Raises:
        ConfigError: the model has no rule with a threshold.
        DataError: there is no text.
    """
    documents = [data for data in documents if data]
    if not documents:
        raise DataError("there is no text to measure thresholds on: name other files")
    own = _own_threshold(lm)
    models = {one: with_threshold(lm, one) for one in sorted({*thresholds, own})}
    num_bytes = np.array([float(len(data)) for data in documents])
    bits: dict[float, Floats] = {}
    points = []
    # The model's own threshold comes first, since the others are compared with it.
    for number, threshold in enumerate(sorted(models, key=lambda one: one != own)):
        before = number * int(num_bytes.sum())
        found = models[threshold].likelihood(
            ((str(index), data) for index, data in enumerate(documents)),
            report=lambda done, before=before: report(before + done),
        )
        each = [found[str(index)] for index in range(len(documents))]
        bits[threshold] = np.array([one.nats / math.log(2) for one in each])
        positions = np.array([float(one.num_positions) for one in each])
        patch_size = ratio_estimate(positions, np.array([float(one.num_units) for one in each]))
        context = lm.context_bytes
        flops = document_flops(lm.config, context, round(context / patch_size.value)) / context
        points.append(
            ThresholdPoint(
                threshold=threshold,
                is_own=threshold == own,
                patch_size=patch_size,
                bits_per_byte=ratio_estimate(bits[threshold], num_bytes),
                change=ratio_estimate(bits[threshold] - bits[own], num_bytes),
                flops=flops,
            )
        )
    return sorted(points, key=lambda one: one.threshold)


class ThresholdScore(NamedTuple):
    """Score of a task by a model that reads with some threshold."""

    threshold: float
    """In nats; the limit of the increase for the monotonic rule."""
    is_own: bool
    """Whether it is the threshold of the model's own rule."""
    scores: Scores
    value: Estimate
    change: Difference
    """The score minus that with the model's own threshold, paired by document."""


def measure_task_thresholds(
    run: Callable[[LanguageModel], Sequence[Scores]],
    lm: LanguageModel,
    own: Sequence[Scores],
    thresholds: Sequence[float],
) -> list[ThresholdScore]:
    """Run tasks with other thresholds at inference, weights unchanged.

    Args:
        run: runs the tasks with a model, such as
            ``lambda lm: run_tasks(HarnessLM(lm), ["piqa_local"]).scores``.
        lm: BLT whose rule has a threshold.
        own: its scores with its own threshold, ``run(lm)``.
        thresholds: thresholds in nats.

    Returns:
        Scores by metric of each task, in the order of thresholds.

    Raises:
        ConfigError: the model has no rule with a threshold.
        DataError: as ``run``.
    """
    threshold = _own_threshold(lm)
    others = {one: with_threshold(lm, one) for one in thresholds if one != threshold}
    found = {threshold: own} | {one: run(model) for one, model in others.items()}
    return [
        ThresholdScore(
            threshold=one,
            is_own=one == threshold,
            scores=scores[at],
            value=score(scores[at]),
            change=difference(scores[at], own[at]),
        )
        for at in range(len(own))
        for one, scores in sorted(found.items())
    ]
