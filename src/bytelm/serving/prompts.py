"""The log-probabilities of prompts, for completions that echo them."""

from collections.abc import Callable, Sequence

import torch

from bytelm import codec
from bytelm.inference import Choice
from bytelm.language_model import LanguageModel
from bytelm.progress import ignore

NEVER = [codec.BOE, codec.BOS, codec.BPE]
"""Ids that are not chosen in generation, and so have no probability there either."""


@torch.inference_mode()
def prompt_choices(
    lm: LanguageModel,
    prompts: Sequence[bytes],
    num_top: int,
    report: Callable[[int], None] = ignore,
) -> dict[bytes, list[Choice]]:
    """Return the bytes of prompts as choices, as if the model had chosen them.

    The first byte has a log-probability too: that of the beginning of a document.

    Args:
        lm: the model.
        prompts: the prompts.
        num_top: number of the most probable ids that each choice has.
        report: called with the number of prompts done so far.
    """
    found: dict[bytes, list[Choice]] = {}
    units = lm.module.units
    for number, prompt in enumerate(dict.fromkeys(prompts)):
        report(number)
        ids = torch.from_numpy(units.encode(codec.encode(prompt)))
        logits = lm.module(ids[None].to(lm.device))[0, :-1].to("cpu", torch.float64)
        logits[:, NEVER] = -torch.inf
        log_probs = logits.log_softmax(-1)
        top = log_probs.topk(num_top)
        own = log_probs.gather(1, ids[1:, None])[:, 0].tolist()
        rows = zip(ids[1:].tolist(), own, top.indices.tolist(), top.values.tolist(), strict=True)
        found[prompt] = [
            Choice(
                units.decode(chosen),
                log_prob,
                tuple(
                    (b"" if one == codec.EOS else units.decode(one), value)
                    for one, value in zip(best, values, strict=True)
                ),
                None,
                None,
            )
            for chosen, log_prob, best, values in rows
        ]
    return found
