"""From logits to the next id: greedy, temperature, top-k, top-p, min-p."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bytelm import codec
from bytelm.errors import BytelmError, ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen.

    Filters apply in the order temperature, top-k, top-p, min-p. A byte or the end of the document
    can be chosen, never another special id.
    """

    temperature: float = 1.0
    """0 for greedy."""
    top_k: int | None = None
    """Keep this many of the most probable ids, and any as probable as the last of them."""
    top_p: float | None = None
    """Keep the fewest most probable ids whose probabilities reach this sum."""
    min_p: float | None = None
    """Keep ids at least this fraction as probable as the most probable."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, not {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, not {value}")


GREEDY = Sampling(temperature=0.0)

# Added to the logits of the special ids: minus infinity for those that are never chosen.
_SPECIAL = torch.zeros(codec.OFFSET, dtype=torch.float64)
_SPECIAL[[codec.BOE, codec.BOS, codec.BPE]] = float("-inf")


class Sampler:
    """Chooses ids one after another, on the CPU: the same logits and seed, the same choices."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Float[Tensor, " vocab"]) -> int:
        """The next id.

        Raises:
            BytelmError: the logits are not numbers.
        """
        allowed = logits.to("cpu", torch.float64, copy=True)
        allowed[: codec.OFFSET] += _SPECIAL
        highest, index = allowed.max(0)  # not a number if any of them is not
        if math.isnan(highest):
            raise BytelmError(
                "the model's predictions are not numbers: its weights are damaged, or its training "
                "diverged; use an earlier checkpoint"
            )
        if self._sampling.temperature == 0:
            return int(index)
        probabilities = filtered_probabilities(allowed, self._sampling)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def filtered_probabilities(
    logits: Float[Tensor, " vocab"], sampling: Sampling
) -> Float[Tensor, " vocab"]:
    """Probabilities after temperature and filters; they sum to 1."""
    # Shifted first, or a tiny temperature would make infinities of which nothing is left.
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        kth = probabilities.topk(min(sampling.top_k, len(probabilities))).values[-1]
        probabilities = _keep(probabilities, probabilities >= kth)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # An id stays if the ones before it fall short of top_p.
        kept = ordered.cumsum(0) - ordered < sampling.top_p
        probabilities = _keep(probabilities, torch.zeros_like(kept).scatter(0, order, kept))
    if sampling.min_p is not None:
        limit = sampling.min_p * probabilities.max()
        probabilities = _keep(probabilities, probabilities >= limit)
    return probabilities


def _keep(probabilities: Tensor, kept: Tensor) -> Tensor:
    probabilities = probabilities * kept
    return probabilities / probabilities.sum()
