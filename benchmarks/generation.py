"""Suite `generation`: greedy bytes after a prompt, the entropy model at work in both.

``transformers`` is only right without its cache, so each of its bytes is a full forward pass; ours
feeds a session. Both choose the most probable byte: special ids, the end of the document among
them, are left out, so that every run has the length asked for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.subjects import (
    PATCH_SIZE,
    Pair,
    autocast,
    build_pair,
    english,
    shape_of,
    takes_part,
)
from benchmarks.timing import Sample, time_once
from bytelm import codec
from bytelm.generation import start_session
from bytelm.patching import EntropyRule, Patcher

PROMPTS, QUICK_PROMPTS = (256, 1024, 2048), (64,)
NEW_BYTES, QUICK_NEW_BYTES = 256, 8


@torch.no_grad()
def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Time both after every prompt."""
    pair = build_pair(shape_of(settings.quick), settings.device)
    measurements = []
    for prompt_bytes in QUICK_PROMPTS if settings.quick else PROMPTS:
        report(f"generation: a prompt of {prompt_bytes:,} bytes")
        ids = torch.from_numpy(codec.encode(english(prompt_bytes))).to(settings.device)
        patches = _calibrate(pair, ids)
        measurement = _compare(pair, ids, settings)
        measurements.append({"prompt_bytes": prompt_bytes, "patches": patches, **measurement})
    return {"measurements": measurements}


def _calibrate(pair: Pair, ids: Tensor) -> int:
    """Set one threshold for both, in a wide gap between two entropies; patches of the prompt."""
    assert pair.ours.scorer is not None
    values = pair.ours.scorer.entropies(ids[None])[0].double().cpu().sort().values
    low, high = (int(q * (len(values) - 1)) for q in (0.74, 0.76))
    assert 1 - 1 / PATCH_SIZE == 0.75
    gaps = values[low + 1 : high + 1] - values[low:high]
    at = low + int(gaps.argmax())
    threshold = float((values[at] + values[at + 1]) / 2)
    pair.ours.patcher = Patcher(EntropyRule(threshold=threshold))
    pair.theirs.config.patching_threshold = threshold
    return pair.ours.segment(ids[None]).patches.num_patches


def _compare(pair: Pair, ids: Tensor, settings: Settings) -> dict[str, Any]:
    new_bytes = QUICK_NEW_BYTES if settings.quick else NEW_BYTES
    their_bytes = min(settings.their_bytes, new_bytes)
    if not takes_part(settings, len(ids) + their_bytes):
        their_bytes = 0
    _ours(pair, ids, 4, settings)  # warm up
    samples: dict[str, list[Sample]] = {"prefill": [], "steps": []}
    ours = theirs = b""
    for _ in range(settings.repeats):
        prefill, steps, ours = _ours(pair, ids, new_bytes, settings)
        samples["prefill"].append(prefill)
        samples["steps"].append(steps)
        if their_bytes:
            sample, theirs = _theirs(pair, ids, their_bytes, settings)
            samples.setdefault("theirs", []).append(sample)
    same = _common_prefix(ours, theirs)
    if settings.precision == "float32":
        assert same == their_bytes, f"after {same} of {their_bytes} bytes the two differ"
    return {
        "new_bytes": new_bytes,
        "their_bytes": their_bytes,
        "same_bytes": same,
        "samples": samples,
    }


def _ours(pair: Pair, ids: Tensor, count: int, settings: Settings) -> tuple[Sample, Sample, bytes]:
    """Times of the prompt and of ``count`` bytes one at a time, and the bytes.

    The prompt yields the first byte, and the last byte is fed as well, so there are ``count``
    steps and ``count`` bytes but for the one that the last step yields.
    """
    session = start_session(pair.ours)
    chosen: list[int] = []

    def prefill() -> None:
        chosen.append(choose(session.feed(ids)[-1]))

    def steps() -> None:
        for _ in range(count):
            chosen.append(choose(session.feed(ids.new_tensor(chosen[-1:]))[-1]))

    with autocast(settings.device, settings.precision):
        times = [time_once(phase, settings.device) for phase in (prefill, steps)]
    return times[0], times[1], codec.decode(chosen[:count])


def _theirs(pair: Pair, ids: Tensor, count: int, settings: Settings) -> tuple[Sample, bytes]:
    """Time of ``count`` full forward passes, and the bytes."""
    chosen: list[int] = []

    def steps() -> None:
        row = ids
        for _ in range(count):
            chosen.append(choose(pair.theirs(row[None], use_cache=False).logits[0, -1]))
            row = torch.cat((row, row.new_tensor(chosen[-1:])))

    return time_once(steps, settings.device), codec.decode(chosen)


def choose(logits: Tensor) -> int:
    """The most probable byte."""
    return int(logits[codec.OFFSET :].argmax()) + codec.OFFSET


def _common_prefix(ours: bytes, theirs: bytes) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
