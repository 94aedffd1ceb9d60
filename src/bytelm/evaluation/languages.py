"""Cost and likelihood of the same content in several languages, and how uneven they are.

Parallel sentences (:mod:`bytelm.evaluation.parallel`) say the same in every language, so what a
model needs for one is comparable across languages: bytes, patches or tokens, FLOPs, and information
in bits. Bits per byte are not, since scripts need different numbers of bytes for the same content.

For quantities ``x`` of ``n`` languages, each the mean over sentences, unevenness is::

    max/min                    largest over smallest
    coefficient of variation   sqrt(mean((x - mean(x))^2)) / mean(x)
    Gini coefficient           sum over i, j of |x_i - x_j| / (2 n^2 mean(x))

Both coefficients are 0 if all are equal. The ratio to a reference, usually English, is the premium
of Petrov et al., 2023 (arXiv 2305.15425). Intervals resample sentences, the same for all
languages and models, so ratios and differences are paired.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from bytelm import codec
from bytelm.accounting import forward_flops
from bytelm.checkpoint import CheckpointConfig
from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.bootstrap import REPLICATES, Estimate, Floats, interval, resample
from bytelm.evaluation.parallel import Parallel
from bytelm.language_model import LanguageModel
from bytelm.lm import PatchedLM
from bytelm.progress import ignore

BYTES, BITS, FLOPS, BITS_PER_BYTE = "bytes", "bits", "FLOPs", "bits per byte"


@dataclass(frozen=True)
class Measured:
    """Quantities of parallel sentences under one model or tokenizer."""

    name: str
    languages: tuple[str, ...]
    quantities: dict[str, Floats]
    """Quantities of each sentence, ``[language, sentence]``: bytes; patches or tokens, unless the
    model reads bytes; bits; FLOPs. A tokenizer has no bits and no FLOPs."""


def measure(
    lm: LanguageModel,
    parallel: Parallel,
    name: str = "model",
    report: Callable[[int], None] = ignore,
) -> Measured:
    """Measure a model on parallel sentences, each a document of its own.

    Bits are those of the sentence's bytes, as in bits per byte. Patches do not count that of BOS,
    nor tokens the end of the document. FLOPs are those of one forward pass over the sentence with
    BOS, counted exactly (:mod:`bytelm.accounting`), and include the scorer.

    Args:
        lm: model of bytes, patches or tokens.
        parallel: the sentences.
        name: name of the model in tables.
        report: called with the bytes measured so far.

    Raises:
        ConfigError: the model is an n-gram scorer, or the costs of its kind are not known.
    """
    flops = lru_cache(maxsize=None)(lambda ids, patches: document_flops(lm.config, ids, patches))
    units = "patches" if isinstance(lm.module, PatchedLM) else lm.module.units.name
    names = (BYTES, BITS, FLOPS) if units == BYTES else (BYTES, units, BITS, FLOPS)
    rows: dict[str, list[list[float]]] = {one: [] for one in names}
    done = 0
    for sentences in parallel.sentences.values():
        labelled = ((str(index), data) for index, data in enumerate(sentences))
        found = lm.likelihood(labelled, report=lambda now, before=done: report(before + now))
        done += sum(map(len, sentences))
        for all_of_quantity in rows.values():
            all_of_quantity.append([])
        for index, data in enumerate(sentences):
            one = found[str(index)]
            count = one.num_units
            if isinstance(lm.module, PatchedLM) and lm.module.patcher.is_learned:
                count = _count_patches(lm.module, data)
            ids = count if units == "tokens" else one.num_positions
            values = {
                units: count - 1,
                BYTES: one.num_bytes,
                BITS: one.bits_per_byte * one.num_bytes,
                FLOPS: flops(ids, count),
            }
            for quantity in names:
                rows[quantity][-1].append(float(values[quantity]))
    return Measured(name, tuple(parallel.languages), {k: np.array(v) for k, v in rows.items()})


def _count_patches(module: PatchedLM, data: bytes) -> int:
    """Return the number of patches of a document by a learned rule, that of BOS included."""
    ids = torch.from_numpy(codec.encode(data))[None].to(module.device)
    with torch.inference_mode():
        return module.segment(ids).patches.num_patches


def document_flops(config: CheckpointConfig, num_ids: int, num_patches: int) -> int:
    """Return the FLOPs of a forward pass over one document, those of the scorer included.

    Args:
        config: description of the model.
        num_ids: ids that the model reads: BOS, and bytes or tokens.
        num_patches: patches, with that of BOS; not used by a plain transformer.

    Raises:
        ConfigError: the costs of this kind of model are not known.
    """
    parts = list(forward_flops(config.model, num_ids, num_patches).values())
    if config.scorer is not None:
        parts += forward_flops(config.scorer.model, num_ids).values()
    return sum(part.total for part in parts)


def count_tokens(path: str | Path, parallel: Parallel) -> Measured:
    """Count the tokens of parallel sentences, without a model.

    Args:
        path: ``tokenizer.json`` of the ``tokenizers`` library, such as that of a Hugging Face
            model. Tokens that it adds around a text are not counted.
        parallel: the sentences.

    Raises:
        ConfigError: the ``tokenizers`` package is not installed.
        DataError: the file is no tokenizer.
    """
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("tokenizers need a package: pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise DataError(
            f"{path} is not a tokenizer ({error}): give the tokenizer.json of a model"
        ) from None

    def count(data: bytes) -> float:
        text = data.decode("utf-8", "replace")
        return float(len(tokenizer.encode(text, add_special_tokens=False).ids))

    quantities = {
        BYTES: [[float(len(data)) for data in some] for some in parallel.sentences.values()],
        "tokens": [[count(data) for data in some] for some in parallel.sentences.values()],
    }
    arrays = {quantity: np.array(rows) for quantity, rows in quantities.items()}
    return Measured(Path(path).name, tuple(parallel.languages), arrays)


def max_over_min(x: Floats) -> Floats:
    """Return the largest value over the smallest, along the last axis."""
    return x.max(-1) / x.min(-1)


def variation(x: Floats) -> Floats:
    """Return the coefficient of variation along the last axis: standard deviation over mean."""
    return x.std(-1) / x.mean(-1)


def gini(x: Floats) -> Floats:
    """Return the Gini coefficient along the last axis.

    It is half the mean absolute difference of two values over their mean: 0 if all are equal, and
    ``1 - 1 / n`` if all but one of ``n`` are 0.
    """
    differences = np.abs(x[..., :, None] - x[..., None, :])
    return differences.mean((-2, -1)) / (2 * x.mean(-1))


SPREADS: dict[str, Callable[[Floats], Floats]] = {
    "max/min": max_over_min,
    "variation": variation,
    "Gini": gini,
}


class Languages:
    """Means and unevenness of what was measured, with 95% intervals.

    Args:
        measured: quantities of each sentence.
        reference: language that ratios refer to.
        replicates: replicates of the bootstrap.
        seed: seed of the resampling. Instances with the same seed and sentences are paired.

    Raises:
        ConfigError: the reference is none of the languages.
    """

    def __init__(
        self, measured: Measured, reference: str, replicates: int = REPLICATES, seed: int = 0
    ) -> None:
        if reference not in measured.languages:
            raise ConfigError(
                f"there are no sentences in {reference!r}: choose --reference from "
                f"{', '.join(measured.languages)}"
            )
        self.name, self.languages, self.reference = measured.name, measured.languages, reference
        num_sentences = next(iter(measured.quantities.values())).shape[1]
        self.num_sentences = num_sentences
        self._at = measured.languages.index(reference)
        # Row 0 is the sample itself.
        weights = np.ones((1 + replicates, num_sentences))
        weights[1:] = resample(num_sentences, replicates, seed)
        self._means = {
            quantity: weights @ values.T / num_sentences
            for quantity, values in measured.quantities.items()
        }
        if BITS in self._means:
            self._means[BITS_PER_BYTE] = self._means[BITS] / self._means[BYTES]

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the quantities, per sentence, and bits per byte."""
        return tuple(self._means)

    def mean(self, quantity: str, language: str) -> Estimate:
        """Return the mean of a quantity per sentence; or bits per byte, of all sentences."""
        return _estimate(self._means[quantity][:, self.languages.index(language)])

    def ratio(self, quantity: str, language: str) -> Estimate:
        """Return the ratio of a language's mean to that of the reference."""
        means = self._means[quantity]
        return _estimate(means[:, self.languages.index(language)] / means[:, self._at])

    def spread(self, quantity: str, statistic: str) -> Estimate:
        """Return how uneven a quantity is across languages, by one of :data:`SPREADS`."""
        return _estimate(SPREADS[statistic](self._means[quantity]))

    def spread_difference(
        self, other: "Languages", quantity: str, other_quantity: str, statistic: str
    ) -> Estimate:
        """Return by how much more uneven a quantity is than one of another model, paired.

        Args:
            other: another model on the same sentences, with the same seed.
            quantity: quantity of this model.
            other_quantity: quantity of the other.
            statistic: one of :data:`SPREADS`.
        """
        mine = SPREADS[statistic](self._means[quantity])
        return _estimate(mine - SPREADS[statistic](other._means[other_quantity]))


def _estimate(values: Floats) -> Estimate:
    """Return the estimate of a quantity from its value in the sample and in each replicate."""
    return Estimate(float(values[0]), *interval(values[1:]))
