"""Sampling of the next id from logits: greedy, temperature, top-k, top-p, min-p.

An id is sampled by the Gumbel-max trick: the highest of ``log p + noise``, where the noise depends
on the seed and on the position in the continuation only. So a choice does not depend on what else
is decoded, and decoding that drafts and verifies makes the choices of decoding that does not.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from bytelm import codec
from bytelm.errors import ConfigError, NumericalError


@dataclass(frozen=True)
class Sampling:
    """Options of sampling.

    They apply in the order temperature, top-k, top-p, min-p. Special ids other than the end of the
    document are never sampled.

    Raises:
        ConfigError: an option is out of range.
    """

    temperature: float = 1.0
    """0 for greedy."""
    top_k: int | None = None
    """Keep this many of the most probable ids, and all as probable as the last of them."""
    top_p: float | None = None
    """Keep the smallest set of the most probable ids whose probabilities reach this sum."""
    min_p: float | None = None
    """Keep ids with at least this fraction of the highest probability."""
    seed: int = 0
    """Any integer of 64 bits."""

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"the seed must be an integer of 64 bits, not {self.seed}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, not {value}")


GREEDY = Sampling(temperature=0.0)


class Sampler:
    """Sampler of ids, which runs on the host, so that results do not depend on the device."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._noise = sampling, Noise(sampling.seed)

    def choose(self, logits: Float[Tensor, " vocab"], position: int) -> int:
        """Sample the id at a position of the continuation, the first of which is 0.

        Raises:
            NumericalError: a logit is NaN or plus infinity, or all are minus infinity.
        """
        allowed = allowed_logits(logits)
        index = int(allowed.argmax())  # that of NaN if any logit is
        highest = float(allowed[index])
        if not math.isfinite(highest):
            what = {math.inf: "infinite", -math.inf: "all minus infinity"}.get(
                highest, "not numbers (NaN)"
            )
            raise NumericalError(
                f"the model's logits after {position:,} generated ids are {what}: its weights are "
                "damaged, or its training diverged; use an earlier checkpoint"
            )
        if self._sampling.temperature == 0:
            return index
        probabilities = filtered_probabilities(allowed, self._sampling)
        own = self._noise.at(position, len(probabilities))
        kept = probabilities.nonzero()[0]
        return int(kept[(np.log(probabilities[kept]) + own[kept]).argmax()])


def allowed_logits(logits: Float[Tensor, " vocab"]) -> Float[np.ndarray, " vocab"]:
    """Return the logits in fp64, minus infinity for ids that are never sampled."""
    return logits.cpu().double().numpy() + _never(len(logits))


@cache
def _never(size: int) -> Float[np.ndarray, " vocab"]:
    """Return minus infinity for ids that are never sampled, and 0 for others."""
    never = np.zeros(size)
    never[list(codec.NEVER_SAMPLED)] = -np.inf
    return never


class Noise:
    """Gumbel noise of a seed, as a function of the position in a continuation."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed % 2**64, counter=0)
        self._generator = np.random.Generator(self._bits)
        self._start: Any = self._bits.state

    def at(self, position: int, size: int) -> Float[np.ndarray, " size"]:
        """Return the noise of each of ``size`` ids at a position."""
        # Much faster than a generator for each position, and the same numbers.
        self._start["state"]["counter"][3] = position
        self._bits.state = self._start
        return self._generator.gumbel(size=size)


def filtered_probabilities(
    logits: Float[np.ndarray, " vocab"], sampling: Sampling
) -> Float[np.ndarray, " vocab"]:
    """Return the probabilities after temperature and filters; they sum to 1."""
    # Shift first, so that a tiny temperature can only overflow to minus infinity.
    with np.errstate(over="ignore"):
        probabilities = np.exp((logits - logits.max()) / sampling.temperature)
    probabilities /= probabilities.sum()
    if sampling.top_k is not None and sampling.top_k < len(probabilities):
        kth = np.partition(probabilities, -sampling.top_k)[-sampling.top_k]
        probabilities = _keep(probabilities, probabilities >= kth)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        ordered = probabilities[order]
        # Keep an id if the sum of those before it is below top_p.
        kept = np.zeros(len(order), dtype=bool)
        kept[order] = ordered.cumsum() - ordered < sampling.top_p
        probabilities = _keep(probabilities, kept)
    if sampling.min_p is not None:
        limit = sampling.min_p * probabilities.max()
        probabilities = _keep(probabilities, probabilities >= limit)
    return probabilities


def _keep(
    probabilities: Float[np.ndarray, " vocab"], kept: Bool[np.ndarray, " vocab"]
) -> Float[np.ndarray, " vocab"]:
    probabilities = probabilities * kept
    return probabilities / probabilities.sum()
