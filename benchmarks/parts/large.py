"""Part `large`: bytes of the recipe's BLT in bf16, one text at a time, and what memory allows.

A byte reads the weights of the local models once, and a patch those of the global model; no step
can be faster than reading them. Weights are random: that changes neither.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import choose
from benchmarks.parts.hardware import copy_rate
from benchmarks.parts.models import blt_config, build, num_parameters, scorer_config
from benchmarks.parts.notes import Notes, Target
from benchmarks.subjects import english
from benchmarks.timing import Sample, time_once
from bytelm import codec
from bytelm.inference import Session
from bytelm.inference.graphs import Strategy
from bytelm.lm import PatchedLM
from bytelm.patching import EntropyRule, Patcher, StaticRule
from bytelm.scoring import TransformerScorer

PROMPT_BYTES, TINY_PROMPT_BYTES = 1024, 64
NEW_BYTES, TINY_NEW_BYTES = 256, 8
STATIC_LENGTH = 4
PROFILED_BYTES = 16
FIRST_BYTES = 16
"""Bytes that are not timed: in them a session captures its graphs."""


@torch.no_grad()
def run(target: Target, notes: Notes) -> None:
    """Without a scorer, every fourth byte a patch; then with the entropy model."""
    bandwidth = copy_rate(target)
    notes.put("copy, bytes/s read and written", bandwidth)
    blt = build(blt_config(target), target.device).bfloat16().eval()
    notes.put("parameters", num_parameters(blt))
    ids = torch.from_numpy(codec.encode(english(prompt_bytes(target)))).to(target.device)
    with notes.attempt("static patches"):
        model = PatchedLM(blt, Patcher(StaticRule(STATIC_LENGTH)), None).eval()
        notes.put("static patches", measure(model, ids, target, bandwidth))
        if target.device == "cuda":
            eager = measure(model, ids, target, bandwidth, "eager")
            notes.put("static patches, without graphs", eager)
            notes.put("kernels per byte", _kernels(model, ids))
    with notes.attempt("entropy patches"):
        scorer = TransformerScorer(build(scorer_config(target), target.device)).eval()
        values = scorer.entropies(ids[None])[0].sort().values
        at = len(values) - len(values) // STATIC_LENGTH
        rule = EntropyRule(threshold=float(values[at - 1 : at + 1].mean()))
        model = PatchedLM(blt, Patcher(rule), scorer).eval()
        notes.put("entropy patches", measure(model, ids, target, bandwidth))


def prompt_bytes(target: Target) -> int:
    """Length of the prompt."""
    return TINY_PROMPT_BYTES if target.tiny else PROMPT_BYTES


def measure(
    model: PatchedLM,
    ids: Tensor,
    target: Target,
    bandwidth: float,
    strategy: Strategy = "auto",
) -> dict[str, Any]:
    """Rates of the prompt and of bytes after it, and the rate that memory allows."""
    count = TINY_NEW_BYTES if target.tiny else NEW_BYTES
    if target.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _generate(model, ids, 8, target, strategy)  # warm up
    prefill, steps, chosen = _generate(model, ids, count, target, strategy)
    text = torch.cat((ids, ids.new_tensor(chosen)))[None]
    patch_size = text.shape[1] / model.segment(text).patches.num_patches
    read = bytes_read(model, patch_size)
    found = {
        "prompt": prefill,
        "steps": steps,
        "ms per byte": 1000 * steps["wall"] / count,
        "new bytes": count,
        "bytes per patch": patch_size,
        "bytes/s": count / steps["wall"],
        "weights read": read,
        "bytes/s that memory allows": bandwidth / read["per byte, all in all"],
    }
    if target.device == "cuda":
        found["peak memory"] = torch.cuda.max_memory_allocated()
    return found


def bytes_read(model: PatchedLM, patch_size: float) -> dict[str, float]:
    """Bytes of weights that a byte and a patch must read; rows of tables are nothing."""
    blt = model.blt
    encoder, decoder = blt.encoder, blt.decoder
    per_patch = _size(blt.global_model) + _size(decoder.latent_projection)
    at_patch_end = [encoder.cross_attention, encoder.pool_projection, encoder.patch_projection]
    at_patch_end += [cross.key_value for cross in decoder.cross_attention]
    per_patch += sum(_size(module) for module in at_patch_end if module is not None)
    local = _size(blt) - _size(encoder.embedding) - per_patch
    scored = 0
    if isinstance(model.scorer, TransformerScorer):
        scored = _size(model.scorer) - _size(model.scorer.transformer.embedding)
    return {
        "per byte, local": local,
        "per byte, scorer": scored,
        "per patch": per_patch,
        "per byte, all in all": local + scored + per_patch / patch_size,
    }


def _size(module: Any) -> int:
    return sum(p.nbytes for p in module.parameters())


def _generate(
    model: PatchedLM, ids: Tensor, count: int, target: Target, strategy: Strategy
) -> tuple[Sample, Sample, list[int]]:
    session = Session(model, strategy)
    chosen: list[int] = []

    def prefill() -> None:
        chosen.append(choose(session.feed(ids)[-1]))

    def steps(count: int) -> None:
        for _ in range(count):
            chosen.append(choose(session.feed(ids.new_tensor(chosen[-1:]))[-1]))

    prefill_time = time_once(prefill, target.device)
    steps(FIRST_BYTES)
    return prefill_time, time_once(lambda: steps(count), target.device), chosen


def _kernels(model: PatchedLM, ids: Tensor) -> float:
    """Kernels and copies that the device runs for a byte, on average."""
    session = Session(model)
    chosen = choose(session.feed(ids)[-1])
    for _ in range(FIRST_BYTES):
        chosen = choose(session.feed(ids.new_tensor([chosen]))[-1])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_BYTES):
            chosen = choose(session.feed(ids.new_tensor([chosen]))[-1])
        torch.cuda.synchronize()
    on_device = [
        e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    return len(on_device) / PROFILED_BYTES
