"""Models of the harness where noise and questions ask a :class:`bytelm.LanguageModel`."""

from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

__all__ = ["HarnessText"]

Text = str | bytes


class HarnessText:
    """A model of the harness, such as one of ``transformers``, asked for likelihoods and text.

    Bytes that are no UTF-8 reach it as U+FFFD. It divides context and continuation into tokens as
    the harness does: white space at the end of the context counts as part of the continuation.

    Args:
        lm: the model.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def log_likelihood(self, context: Sequence[Text], continuation: Sequence[Text]) -> list[float]:
        """Return ``ln p(continuation | context)`` of each pair, in nats."""
        pairs = zip(map(_as_text, context), map(_as_text, continuation), strict=True)
        requests = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
        return [nats for nats, _ in self.lm.loglikelihood(requests)]

    def generate(
        self, prompt: Sequence[Text], *, max_bytes: int, stop: Sequence[Text]
    ) -> list[bytes]:
        """Return the greedy continuation of each prompt, up to where a stop text begins.

        Args:
            prompt: the prompts.
            max_bytes: most bytes of each; also the most tokens, which are of a byte at least.
            stop: texts that end a continuation.
        """
        options = {
            "until": [_as_text(one) for one in stop],
            "max_gen_toks": max_bytes,
            "do_sample": False,
        }
        requests = [
            Instance("generate_until", {}, (_as_text(one), options), at)
            for at, one in enumerate(prompt)
        ]
        return [text.encode()[:max_bytes] for text in self.lm.generate_until(requests)]


def _as_text(text: Text) -> str:
    return text if isinstance(text, str) else text.decode("utf-8", "replace")
