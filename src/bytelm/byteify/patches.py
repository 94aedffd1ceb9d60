"""The scorer and the threshold of a byteified model: patches as long as the donor's tokens."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bytelm import codec
from bytelm.byteify.boundaries import BoundaryCounting, divide, fit_boundary_scorer
from bytelm.byteify.donor import Donor
from bytelm.byteify.teacher import read_vocabulary
from bytelm.checkpoint import load_scorer
from bytelm.config import (
    CalibratedPatching,
    EntropyPatching,
    FittedNgramConfig,
    NgramConfig,
    ScorerConfig,
)
from bytelm.data import Reader, ReadOptions, find_inputs
from bytelm.errors import DataError
from bytelm.patching import PatchSample, Scorer, calibrate
from bytelm.scoring import fit_ngram_scorer, score_documents

SAMPLE_BYTES = 8_000_000
"""Most text to find patches on."""
CALIBRATION_BYTES = 500_000
"""Most text that the donor's tokens are measured on, and the threshold calibrated."""
CALIBRATION_SHARE = 8
"""One of so many parts of the text is for calibration; the others are counted."""
MIN_BYTES = 10_000
_PART_BYTES = 16_384


class TextSample(NamedTuple):
    """A sample of text: parts of documents."""

    counted: list[bytes]
    """To count n-grams in."""
    calibration: list[bytes]
    """To measure the donor's tokens and calibrate the threshold on: entropies of counted text are
    lower than those of other text."""


class DonorPatches(NamedTuple):
    """How a byteified model finds its patches."""

    scorer: Scorer
    config: ScorerConfig
    rule: CalibratedPatching
    bytes_per_token: float
    """Of the donor, on the calibration text."""


def sample_text(
    texts: Iterable[str], read: ReadOptions, max_bytes: int = SAMPLE_BYTES
) -> TextSample:
    """Return a sample of inputs, without their held-out documents.

    Args:
        texts: the inputs.
        read: options of reading them.
        max_bytes: most text, an equal share of each input.

    Raises:
        DataError: an input cannot be read, or there is too little text.
    """
    inputs = [one for one in find_inputs(list(texts), read) if one.is_read]
    share = max(max_bytes // max(len(inputs), 1), _PART_BYTES)
    reader = Reader(read)
    parts: list[bytes] = []
    for one in inputs:
        taken = 0
        for document in reader.read(one):
            if document.split == "validation":
                continue
            data = document.data[: share - taken]
            parts += [data[at : at + _PART_BYTES] for at in range(0, len(data), _PART_BYTES)]
            taken += len(data)
            if taken >= share:
                break
    if (size := sum(map(len, parts))) < MIN_BYTES:
        raise DataError(
            f"there are {size:,} bytes of text to find patches on: name at least {MIN_BYTES:,}"
        )
    calibration = parts[::CALIBRATION_SHARE]
    counted = [part for at, part in enumerate(parts) if at % CALIBRATION_SHARE] or calibration
    return TextSample(counted, _first(calibration, CALIBRATION_BYTES))


def _first(parts: list[bytes], max_bytes: int) -> list[bytes]:
    """Return parts spread over a list, about ``max_bytes`` in total."""
    step = max(sum(map(len, parts)) // max_bytes, 1)
    return parts[::step]


def bytes_per_token(donor: Donor, texts: Sequence[bytes]) -> float:
    """Return the mean bytes of a donor's tokens on some text; invalid UTF-8 is left out."""
    decoded = [text.decode("utf-8", "ignore") for text in texts]
    num_tokens = sum(len(donor.encode(text)) for text in decoded)
    return sum(len(text.encode()) for text in decoded) / max(num_tokens, 1)


def find_patches(
    donor: Donor,
    text: TextSample,
    scorer: Path | None = None,
    patch_size: float | None = None,
    *,
    boundaries: bool = False,
) -> DonorPatches:
    """Return a scorer, and the threshold that makes patches as long as the donor's tokens.

    Args:
        donor: the donor.
        text: a sample of text.
        scorer: checkpoint of a scorer; ``None`` to count n-grams in the text.
        patch_size: mean bytes per patch; ``None`` for the donor's bytes per token, and with
            boundaries for patches that end where a token has probably ended.
        boundaries: count where the donor's tokens end, not n-grams.

    Raises:
        CheckpointError: the scorer cannot be loaded; or boundaries cannot be counted, since the
            tokenizer is not byte-level.
        DataError: there is no text that the donor's tokens spell.
        PatchingError: no threshold gives that size.
    """
    own_size = bytes_per_token(donor, text.calibration)
    if scorer is not None:
        module, config = load_scorer(scorer, reset_at_newline=False)
    elif boundaries:
        documents = divide(donor, read_vocabulary(donor), text.counted)
        if not documents:
            raise DataError("the donor's tokens do not spell the text: name text in UTF-8")
        module, fitted = fit_boundary_scorer(documents, BoundaryCounting())
        config = ScorerConfig(model=fitted)
    else:
        counting = NgramConfig()
        module = fit_ngram_scorer([codec.encode(part) for part in text.counted], counting)
        fitted = FittedNgramConfig(max_order=counting.max_order, num_contexts=len(module.keys))
        config = ScorerConfig(model=fitted)
    if boundaries and patch_size is None:
        # A patch ends where a token has more probably ended than not: about as long as a token.
        rule = EntropyPatching(patch_size=round(own_size, 4), threshold=0.5)
        return DonorPatches(module, config, rule, own_size)
    ids = [torch.from_numpy(codec.encode(part)) for part in text.calibration]
    entropies = score_documents(module, ids)
    sample = PatchSample.join(list(zip(ids, entropies, strict=True)))
    wanted = own_size if patch_size is None else patch_size
    rule = EntropyPatching(patch_size=round(wanted, 4))
    return DonorPatches(module, config, calibrate(rule, sample, wanted), own_size)
