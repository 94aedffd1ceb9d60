"""Tasks of lm-evaluation-harness under noise, with any of its models.

The paper noises the prompt, the completion, or both, and reports the mean of the three (BLT section
6.1). A model is wrapped, so any task runs on noised requests::

    run_tasks(NoisyLM(HarnessLM(lm), parse_noise("drop"), "prompt"), ["hellaswag_local"])
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from bytelm.evaluation.bootstrap import Estimate
from bytelm.evaluation.harness.adapter import HarnessLM
from bytelm.evaluation.harness.caching import WrappedLM, unwrapped
from bytelm.evaluation.noise import Noise
from bytelm.evaluation.scores import Difference, Scores, difference, score
from bytelm.evaluation.section import Section

__all__ = ["PARTS", "NoisyLM", "NoisyScore", "Part", "measure_noisy_tasks", "noisy_tasks_section"]

Part = Literal["prompt", "completion", "both"]
"""The part of a request that is noised."""
PARTS: tuple[Part, ...] = ("prompt", "completion", "both")
MEAN = "mean"
"""Name of the mean over the noised parts."""


class NoisyLM(WrappedLM):
    """A model of the harness that is asked noised requests.

    Text that is generated or measured as a whole has no completion: only its prompt, or the whole
    text, is noised. White space between prompt and completion stays as it is. Bytes that are no
    UTF-8 after noise reach models of this package as they are, and others as U+FFFD.

    Args:
        lm: the model that answers.
        noise: the noise.
        part: what is noised.
        seed: seed of the noise.
    """

    def __init__(self, lm: LM, noise: Noise, part: Part = "both", seed: int = 0) -> None:
        super().__init__(lm)
        self.noise, self.part, self.seed = noise, part, seed
        self._errors = "surrogateescape" if isinstance(unwrapped(lm), HarnessLM) else "replace"

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of noised continuations after noised contexts."""
        return self.lm.loglikelihood(self._noised(requests, ("prompt", "completion")))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of noised texts."""
        return self.lm.loglikelihood_rolling(self._noised(requests, ("prompt",)))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return what is generated after noised contexts."""
        return self.lm.generate_until(self._noised(requests, ("prompt",)))

    def _noised(self, requests: list[Instance], roles: tuple[Part, ...]) -> list[Instance]:
        """Return the requests with those of their arguments noised whose role is the part."""

        def arguments(request: Instance) -> tuple[Any, ...]:
            noised = [
                self._apply(text) if self.part in (role, "both") else text
                for role, text in zip(roles, request.args, strict=False)
            ]
            return (*noised, *request.args[len(roles) :])

        return [replace(one, arguments=arguments(one)) for one in requests]

    def _apply(self, text: str) -> str:
        inner = text.strip()
        begin = len(text) - len(text.lstrip())
        noised = self.noise(inner, self.seed).decode("utf-8", self._errors)
        return text[:begin] + noised + text[begin + len(inner) :]


class NoisyScore(NamedTuple):
    """Score of one task under one noise."""

    noise: str
    part: str
    """``prompt``, ``completion``, ``both``, or ``mean`` over these; empty for clean requests."""
    scores: Scores
    value: Estimate
    change: Difference
    """The score minus that on clean requests, paired by document."""


def measure_noisy_tasks(
    run: Callable[[LM], Sequence[Scores]],
    lm: LM,
    clean: Sequence[Scores],
    noises: Sequence[Noise],
    *,
    parts: Sequence[Part] = PARTS,
    seed: int = 0,
) -> list[NoisyScore]:
    """Run tasks on noised requests, and compare with the scores on clean ones.

    Args:
        run: runs the tasks with a model, such as
            ``lambda lm: run_tasks(lm, ["hellaswag_local"]).scores``.
        lm: the model.
        clean: its scores on clean requests, ``run(lm)``.
        noises: noises of the requests.
        parts: parts of requests to noise, each in a run of its own.
        seed: seed of the noise.

    Returns:
        For every task and metric the clean score, and for every noise those of the parts and their
        mean.

    Raises:
        DataError: as ``run``.
    """
    found: dict[tuple[str, str], Sequence[Scores]] = {("clean", ""): clean}
    for noise in noises:
        noised: dict[str, Sequence[Scores]] = {
            part: run(NoisyLM(lm, noise, part, seed)) for part in parts
        }
        if len(parts) > 1:
            noised[MEAN] = [_mean(each) for each in zip(*noised.values(), strict=True)]
        found |= {(str(noise), part): scores for part, scores in noised.items()}
    return [
        NoisyScore(*key, scores[at], score(scores[at]), difference(scores[at], clean[at]))
        for at in range(len(clean))
        for key, scores in found.items()
    ]


def _mean(each: Sequence[Scores]) -> Scores:
    """Return the mean of the scores of each document."""
    return each[0]._replace(
        values=np.mean([one.values for one in each], axis=0),
        weights=np.mean([one.weights for one in each], axis=0),
    )


def noisy_tasks_section(found: Sequence[NoisyScore], title: str = "tasks under noise") -> Section:
    """Return the scores as a table."""
    rows = tuple(
        (
            one.scores.task,
            one.scores.metric,
            one.noise,
            one.part,
            f"{one.value.value:.4f} ±{one.value.margin:.4f}",
            f"{one.change.estimate.value:+.4f} ±{one.change.estimate.margin:.4f}",
        )
        for one in found
    )
    note = (
        "scores on noised requests, and their change from clean ones, paired by document; ± is "
        "half of the 95% interval. mean: over noised prompts, noised completions and both"
    )
    record = {
        "scores": [
            {
                "task": one.scores.task,
                "metric": one.scores.metric,
                "noise": one.noise,
                "part": one.part,
                "documents": len(one.scores.documents),
                **one.value._asdict(),
                "change": {**one.change.estimate._asdict(), "p": one.change.p},
            }
            for one in found
        ]
    }
    columns = ("task", "metric", "noise", "noised", "score", "change")
    return Section(title, note, columns, rows, record, figures={})
