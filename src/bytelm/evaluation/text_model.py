"""What noise and questions ask of a model."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

__all__ = ["TextModel"]

Text = str | bytes


@runtime_checkable
class TextModel(Protocol):
    """Anything that tells likelihoods and generates text, such as :class:`bytelm.LanguageModel`."""

    def log_likelihood(
        self, context: Sequence[Text], continuation: Sequence[Text], /
    ) -> float | list[float]:
        """Return ``ln p(continuation | context)`` of each pair, in nats."""
        ...

    def generate(
        self, prompt: Sequence[Text], /, *, max_bytes: int, stop: Sequence[Text]
    ) -> list[bytes]:
        """Return the greedy continuation of each prompt, up to where a stop text begins."""
        ...
