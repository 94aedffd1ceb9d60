"""Suite `scorer`: entropies per second, of whole rows and of a document as it arrives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.parts.models import build
from benchmarks.settings import Settings
from benchmarks.subjects import Pair, build_pair, random_words, shape_of, takes_part
from benchmarks.timing import measure
from bytelm import codec, cpu
from bytelm.config import NgramConfig, TransformerConfig, load_recipe
from bytelm.patching import Scorer
from bytelm.scoring import NgramScorer, TransformerScorer, fit_ngram_scorer, score_document

ROW_BYTES, QUICK_ROW_BYTES = 8192, 256
STREAMED_ROWS = 4
"""Rows' worth of bytes in a document that is streamed."""
SINGLE_BYTES, QUICK_SINGLE_BYTES = 512, 16
"""Bytes that are fed one at a time."""
TOLERANCE = 1e-4
"""Largest difference of entropies, in nats, between the two."""
NGRAM_BYTES, QUICK_NGRAM_BYTES = 2_000_000, 20_000
"""Text whose n-grams are counted."""


@torch.no_grad()
def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Time every scorer; the comparison model's beside its twin in the other implementation."""
    pair = build_pair(shape_of(settings.quick), settings.device)
    row_bytes = QUICK_ROW_BYTES if settings.quick else ROW_BYTES
    text = random_words(row_bytes * STREAMED_ROWS - 1)
    ids = torch.from_numpy(codec.encode(text)).to(settings.device)
    assert isinstance(pair.ours.scorer, TransformerScorer)
    scorers: dict[str, Scorer] = {
        "transformer of the comparison model": pair.ours.scorer,
        "transformer of recipe entropy-tiny": _entropy_tiny().to(settings.device),
        "n-gram scorer": _ngrams(settings).to(settings.device),
    }
    measurements = []
    for name, scorer in scorers.items():
        report(f"scorer: {name}")
        theirs = pair if scorer is pair.ours.scorer else None
        measurements += _measure(name, scorer, theirs, ids, row_bytes, settings)
    return {"measurements": measurements}


def _measure(
    name: str, scorer: Scorer, pair: Pair | None, ids: Tensor, row_bytes: int, settings: Settings
) -> list[dict[str, Any]]:
    row = ids[None, :row_bytes]
    single = ids[: QUICK_SINGLE_BYTES if settings.quick else SINGLE_BYTES]
    whole: dict[str, Callable[[], object]] = {"ours": lambda: scorer.entropies(row)}
    if pair is not None and takes_part(settings, row_bytes):
        whole["theirs"] = lambda: pair.theirs.model.patcher(row)[0]
        torch.testing.assert_close(whole["ours"](), whole["theirs"](), rtol=0, atol=TOLERANCE)
    ways: dict[str, tuple[int, dict[str, Callable[[], object]]]] = {
        "a whole row": (row_bytes, whole),
        f"streamed, {row_bytes:,} bytes at a time": (
            len(ids),
            {"ours": lambda: list(score_document(scorer, ids, row_bytes))},
        ),
        "streamed, 1 byte at a time": (
            len(single),
            {"ours": lambda: list(score_document(scorer, single, 1))},
        ),
    }
    return [
        {
            "scorer": name,
            "way": way,
            "bytes": num_bytes,
            "samples": measure(subjects, settings.repeats, settings.device),
        }
        for way, (num_bytes, subjects) in ways.items()
    ]


def _entropy_tiny() -> TransformerScorer:
    config = load_recipe("entropy-tiny").model
    assert isinstance(config, TransformerConfig)
    return TransformerScorer(cpu.fuse(build(config, "cpu"))).eval()


def _ngrams(settings: Settings) -> NgramScorer:
    """Counted on other text than it scores."""
    num_bytes = QUICK_NGRAM_BYTES if settings.quick else NGRAM_BYTES
    sequences = [codec.encode(random_words(num_bytes, seed=1)).astype(np.int64)]
    return fit_ngram_scorer(sequences, NgramConfig())
