"""Text cut into patches by a model's own rule, or by any other rule and scorer."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm import codec
from bytelm.config import ModelDescription, PatchingConfig, kind_of
from bytelm.errors import ConfigError
from bytelm.lm import CausalLM, PatchedLM
from bytelm.patching import Patcher, Rule, Scorer, StatefulRule, build_patcher
from bytelm.progress import ignore
from bytelm.scoring import score_documents

AnyRule = PatchingConfig | Patcher | Rule | StatefulRule
"""A rule: its configuration, or the object that decides, registered or not."""


@dataclass(frozen=True)
class PatchedText:
    """Text and its patches."""

    data: bytes
    boundaries: tuple[int, ...]
    """Positions in ``data`` that start a patch; the first is 0, since BOS is a patch by itself."""
    entropies: NDArray[np.float32] | None
    """``entropies[i]`` is the entropy, in nats, of the prediction of byte ``i``. There is one more
    than there are bytes: the last is that of the byte after the text."""
    rule: PatchingConfig
    """The rule; of an object that has no configuration, the name of its class as ``kind``."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end of each patch in ``data``; empty if there is no text."""
        return list(pairwise([*self.boundaries, len(self.data)]))

    @property
    def patches(self) -> list[bytes]:
        """The bytes of each patch."""
        return [self.data[begin:end] for begin, end in self.spans]

    @property
    def patch_size(self) -> float:
        """Mean bytes per patch, without the patch of BOS."""
        return len(self.data) / max(len(self.boundaries), 1)


def patch_text(
    lm: CausalLM,
    description: ModelDescription,
    data: bytes,
    rule: AnyRule | None = None,
    scorer: Scorer | None = None,
    report: Callable[[int], None] = ignore,
) -> PatchedText:
    """Cut a text into patches.

    Args:
        lm: model whose rule and scorer are used unless others are given.
        description: its description.
        data: any bytes.
        rule: rule to use instead of the model's own.
        scorer: scorer to use instead of the model's own.
        report: called with the number of bytes scored so far.

    Raises:
        ConfigError: there is no rule or no scorer; or the rule is learned, or reads the encoder's
            states, and does not belong to this model.
        PatchingError: the rule has no threshold.
        NumericalError: an entropy is not finite.
    """
    rule = rule or description.patching
    if rule is None:
        raise ConfigError(
            f"a {kind_of(type(description.model))} model has no patching rule of its own: "
            "name one, such as EntropyPatching(threshold=1.3), or `--rule entropy --threshold 1.3` "
            "on the command line"
        )
    patcher, is_own = _patcher(lm, description, rule)
    entropies = None
    with nullcontext() if patcher.needs_entropies else suppress(ConfigError):
        entropies = text_entropies(lm, data, scorer, report)
    device = lm.device if is_own or patcher.needs_states else torch.device("cpu")
    scores = None if entropies is None else torch.from_numpy(entropies)[None].to(device)
    ids = torch.from_numpy(codec.encode(data))[None].to(device)
    with torch.inference_mode():
        states = None
        if patcher.needs_states:
            assert isinstance(lm, PatchedLM)
            states = lm.encoder_states(ids)
        next_boundary = patcher.next_boundary(ids, scores, states=states)[0, : len(data)]
    boundaries = tuple(next_boundary.nonzero().flatten().tolist())
    config = rule
    if not isinstance(rule, PatchingConfig):
        config = PatchingConfig(kind=type(patcher.rule).__name__, max_length=patcher.max_length)
    assert isinstance(config, PatchingConfig)
    return PatchedText(data, boundaries, entropies, config)


def text_entropies(
    lm: CausalLM,
    data: bytes,
    scorer: Scorer | None = None,
    report: Callable[[int], None] = ignore,
) -> NDArray[np.float32]:
    """Return the entropy of the prediction of each byte, and of the byte after the text.

    Raises:
        ConfigError: no scorer is given and the model has none.
        NumericalError: an entropy is not finite.
    """
    scorer = lm.get_scorer() if scorer is None else scorer
    ids = torch.from_numpy(codec.encode(data)).to(getattr(scorer, "device", lm.device))
    (entropies,) = score_documents(scorer, [ids], name=lambda _: "the text", report=report)
    return entropies.float().cpu().numpy()


def _patcher(lm: CausalLM, description: ModelDescription, rule: AnyRule) -> tuple[Patcher, bool]:
    """Return the patcher of a rule, and whether it is the model's own."""
    if not isinstance(rule, PatchingConfig):
        patcher = rule if isinstance(rule, Patcher) else Patcher(rule)
        if patcher.needs_states and not isinstance(lm, PatchedLM):
            raise ConfigError(
                f"{type(patcher.rule).__name__} reads the encoder's states, and this model has no "
                "encoder: load a BLT, or use another rule"
            )
        return patcher, False
    own = _own_patcher(lm, description, rule)
    patcher = own or build_patcher(rule)
    if own is None and patcher.is_learned:
        raise ConfigError(
            f"the {rule.kind} rule is learned, and this model was not trained with it: load a "
            "model that was, or name another rule"
        )
    return patcher, own is not None


def _own_patcher(
    lm: CausalLM, description: ModelDescription, rule: PatchingConfig
) -> Patcher | None:
    """Return the model's own patcher if it applies the rule, with the rule's limit."""
    own = description.patching
    if own is None or not isinstance(lm, PatchedLM):
        return None
    if rule.model_copy(update={"max_length": own.max_length}) != own:
        return None
    return replace(lm.patcher, max_length=rule.max_length)
