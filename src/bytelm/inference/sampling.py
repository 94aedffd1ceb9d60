"""Sampling of the next id from logits: greedy, temperature, top-k, top-p, min-p."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
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

# Added to the logits of the special ids; minus infinity excludes an id.
_SPECIAL = torch.zeros(codec.OFFSET, dtype=torch.float64)
_SPECIAL[[codec.BOE, codec.BOS, codec.BPE]] = float("-inf")


class Sampler:
    """Sampler of ids, which runs on the CPU, so that results do not depend on the device."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._num_chosen = 0

    def choose(self, logits: Float[Tensor, " vocab"]) -> int:
        """Sample the next id.

        Raises:
            NumericalError: a logit is NaN or plus infinity, or all are minus infinity.
        """
        allowed = logits.to("cpu", torch.float64, copy=True)
        allowed[: codec.OFFSET] += _SPECIAL
        highest, index = allowed.max(0)  # NaN if any logit is
        if not math.isfinite(highest):
            what = {math.inf: "infinite", -math.inf: "all minus infinity"}.get(
                float(highest), "not numbers (NaN)"
            )
            raise NumericalError(
                f"the model's logits after {self._num_chosen:,} generated ids are {what}: its "
                "weights are damaged, or its training diverged; use an earlier checkpoint"
            )
        self._num_chosen += 1
        if self._sampling.temperature == 0:
            return int(index)
        probabilities = filtered_probabilities(allowed, self._sampling)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def filtered_probabilities(
    logits: Float[Tensor, " vocab"], sampling: Sampling
) -> Float[Tensor, " vocab"]:
    """Return the probabilities after temperature and filters; they sum to 1."""
    # Shift first, or a tiny temperature would overflow.
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        kth = probabilities.topk(min(sampling.top_k, len(probabilities))).values[-1]
        probabilities = _keep(probabilities, probabilities >= kth)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # Keep an id if the sum of those before it is below top_p.
        kept = ordered.cumsum(0) - ordered < sampling.top_p
        probabilities = _keep(probabilities, torch.zeros_like(kept).scatter(0, order, kept))
    if sampling.min_p is not None:
        limit = sampling.min_p * probabilities.max()
        probabilities = _keep(probabilities, probabilities >= limit)
    return probabilities


def _keep(probabilities: Tensor, kept: Tensor) -> Tensor:
    probabilities = probabilities * kept
    return probabilities / probabilities.sum()
