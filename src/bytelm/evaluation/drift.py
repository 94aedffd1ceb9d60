"""Entropy drift: patches that grow as a document goes on.

A scorer that has seen much of a document, above all one that repeats itself, predicts the rest more
surely. Its entropies fall, and patches grow, though the threshold was calibrated on the text as a
whole (BLT, section 4.4 and appendix E). Measured here are the mean bytes per patch by position, ::

    bytes per patch of positions [a, b) = (b - a) / patches that begin there

for several rules, with and without a reset of the scorer's context at newlines, in documents as
they are and made of one line repeated. Every rule is calibrated to the same mean on the documents
as they are, so curves differ by drift alone; ``space`` depends on no scorer, and shows what the
text itself does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bytelm import codec
from bytelm.config import (
    CombinedPatching,
    EntropyPatching,
    MonotonicPatching,
    PatchingConfig,
    SpacePatching,
)
from bytelm.errors import DataError, PatchingError
from bytelm.evaluation.bootstrap import Estimate, ratio_estimate
from bytelm.language_model import LanguageModel
from bytelm.lm import CausalLM, PatchedLM, ScorerLM
from bytelm.patching import (
    PatchSample,
    Scorer,
    build_patcher,
    calibrate,
    patch_statistics,
)
from bytelm.progress import ignore
from bytelm.scoring import score_documents

PERIOD = 256
"""Bytes of the line that a repetitive document repeats, its newline included."""
FIRST_POSITION = 64
"""End of the first range of positions; every further range is as long as all before it."""
DEFAULT_PATCH_SIZE = 4.5
"""Mean bytes per patch that rules are calibrated to, if the model has no patches itself."""


class Curve(NamedTuple):
    """Patches of one rule by position."""

    text: str
    """``as it is`` or ``repeated``."""
    rule: PatchingConfig
    """The rule, with its threshold."""
    reset: bool | None
    """Whether newlines reset the scorer; ``None`` if the rule needs none."""
    sizes: tuple[Estimate, ...]
    """Mean bytes per patch in each range of positions."""


@dataclass(frozen=True)
class Drift:
    """Patches by position."""

    edges: tuple[int, ...]
    """Limits of the ranges of positions, in bytes of the document."""
    num_documents: int
    """Documents that are at least as long as the last limit; only these are used."""
    patch_size: float
    """Mean bytes per patch that the rules are calibrated to."""
    curves: tuple[Curve, ...]
    left_out: tuple[str, ...]
    """Rules that cannot have this mean, and why."""


def position_edges(lengths: Sequence[int]) -> list[int]:
    """Return limits 0, 64, 128, 256 ... up to a length that half of the documents have.

    Raises:
        DataError: that length is below 256 bytes.
    """
    median = sorted(lengths)[len(lengths) // 2] if lengths else 0
    edges = [0, FIRST_POSITION]
    while 2 * edges[-1] <= median:
        edges.append(2 * edges[-1])
    if edges[-1] < 4 * FIRST_POSITION:
        raise DataError(
            f"half of the documents are shorter than {median + 1:,} bytes, too short to drift: "
            f"give documents of at least {4 * FIRST_POSITION} bytes, better thousands"
        )
    return edges


def repetitive(data: bytes, length: int) -> bytes:
    """Return the beginning of a document as one line of :data:`PERIOD` bytes, repeated.

    Newlines in it become spaces, so that the line has one at its end only.
    """
    line = data[: PERIOD - 1].replace(b"\n", b" ") + b"\n"
    return (line * (length // len(line) + 1))[:length]


def measure_drift(
    lm: LanguageModel,
    documents: Sequence[bytes],
    *,
    patch_size: float | None = None,
    report: Callable[[int], None] = ignore,
) -> Drift:
    """Measure the mean patch size by position in documents.

    Args:
        lm: model with a scorer, or that can be one.
        documents: the text; documents much shorter than most are not used.
        patch_size: mean bytes per patch to calibrate rules to; ``None`` for that of the model's own
            patches in these documents, or 4.5 if it has none.
        report: called with the bytes scored so far.

    Raises:
        ConfigError: the model has no scorer.
        DataError: the documents are too short.
        NumericalError: an entropy is not finite.
    """
    edges = position_edges([len(data) for data in documents])
    whole = [data[: edges[-1]] for data in documents if len(data) >= edges[-1]]
    texts = {"as it is": whole, "repeated": [repetitive(data, edges[-1]) for data in whole]}
    samples = {}
    for reset, scorer in scorers(lm.module).items():
        for text, some in texts.items():
            before = len(samples) * len(whole) * edges[-1]
            samples[text, reset] = _sample(
                scorer, some, lm.device, lambda done, before=before: report(before + done)
            )
    size = patch_size or _own_patch_size(lm, samples)
    curves, left_out = [], []
    for config in (EntropyPatching(), MonotonicPatching(), CombinedPatching(increase=0.0)):
        for reset in dict.fromkeys(reset for _, reset in samples):
            try:
                rule = calibrate(config, samples["as it is", reset], size)
            except PatchingError as error:
                left_out.append(f"{config.kind}{', reset' * bool(reset)}: {error}")
                continue
            for text in texts:
                sizes = _sizes(rule, samples[text, reset], edges)
                curves.append(Curve(text, rule, reset, sizes))
    for (text, _), sample in {key: one for key, one in samples.items() if not key[1]}.items():
        curves.append(Curve(text, SpacePatching(), None, _sizes(SpacePatching(), sample, edges)))
    return Drift(tuple(edges), len(whole), size, tuple(curves), tuple(left_out))


def scorers(module: CausalLM) -> dict[bool, Scorer]:
    """Return the scorer of a model without and with a reset at newlines, if it can do both.

    Raises:
        ConfigError: the model has no scorer and cannot serve as one.
    """
    scorer: Any = module.get_scorer()
    own = getattr(scorer, "reset_at_newline", None)
    if own is None or not isinstance(scorer, nn.Module):
        return {False: scorer}
    return {reset: ScorerLM(scorer).get_scorer(reset_at_newline=reset) for reset in (False, True)}


def _sample(
    scorer: Scorer,
    documents: Sequence[bytes],
    device: torch.device,
    report: Callable[[int], None],
) -> PatchSample:
    """Return documents with their entropies, on the CPU."""
    ids = [torch.from_numpy(codec.encode(data)) for data in documents]
    found = score_documents(scorer, [one.to(device) for one in ids], report=report)
    return PatchSample.join([(a, b.float().cpu()) for a, b in zip(ids, found, strict=True)])


def _own_patch_size(lm: LanguageModel, samples: dict[tuple[str, bool], PatchSample]) -> float:
    if not isinstance(lm.module, PatchedLM) or lm.module.patcher.is_learned:
        return DEFAULT_PATCH_SIZE
    own = bool(getattr(lm.module.scorer, "reset_at_newline", False))
    sample = samples.get(("as it is", own), samples["as it is", False])
    return patch_statistics(lm.module.patcher, sample).mean_size


def _sizes(rule: PatchingConfig, sample: PatchSample, edges: Sequence[int]) -> tuple[Estimate, ...]:
    """Return the mean bytes per patch in ranges of positions, of documents of one length.

    A range in which no patch begins counts as one patch, so its size is a lower bound.
    """
    boundary = build_patcher(rule).next_boundary(*sample).numpy().reshape(-1, edges[-1] + 1)
    # boundary[:, i] says whether byte i, counted without BOS, starts a patch.
    sizes = []
    for begin, end in pairwise(edges):
        counts = boundary[:, begin:end].sum(1).astype(np.float64)
        counts[0] += not counts.any()
        sizes.append(ratio_estimate(np.full(len(counts), float(end - begin)), counts))
    return tuple(sizes)
